//! What the sparse operator chose on a device, for whoever wants to see it: nothing here is
//! recorded.

use tercet_attention::Dims;

use crate::{Device, Error, NsaSpec, Result, Tensor, cuda};

const OP: &str = "attention_nsa";

/// A forward pass of the sparse operator with its choice.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// `[T, H, V]`, on the device.
    pub out: Tensor,
    /// Selected blocks `[T, K, S]`, ascending, −1 padded.
    pub indices: Vec<i32>,
    /// Log-sum-exps `[T, H]` of cmp, slc, win; −∞ where nothing is visible.
    pub lses: [Vec<f32>; 3],
}

/// The operator on tensors of a GPU, in the order of [`crate::ops::NsaVars`]; waits for its end.
pub fn choose(tensors: [Tensor; 8], spec: &NsaSpec, cu_seqlens: &[i32]) -> Result<Chosen> {
    let Device::Cuda(gpu) = tensors[0].device() else {
        return Err(Error::value(OP, "the tensors are on the CPU, expected a CUDA device"));
    };
    let (&[_, heads, key_dim], &[_, kv_heads, value_dim]) =
        (tensors[0].shape(), tensors[4].shape())
    else {
        return Err(Error::shape(OP, "q", "[T, H, D]", tensors[0].shape()));
    };
    let dims = Dims { heads, kv_heads, key_dim, value_dim };
    let (out, call) = cuda::attention::Nsa::forward(&gpu, dims, tensors, spec, cu_seqlens, true)?;
    let (indices, lses) = call.chosen()?;
    Ok(Chosen { out, indices, lses })
}
