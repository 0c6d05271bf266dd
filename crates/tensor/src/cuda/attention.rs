//! `ops/attention_dense.rs` and `ops/attention_nsa.rs` on a device, by `tercet_attention::cuda`.

use tercet_attention::cpu::Mask;
use tercet_attention::cuda::{
    AttendGrads, AttendInput, Batch, NsaBatch, NsaGrads, NsaInput, NsaSaved, Plan, Slice,
    attend_backward, attend_forward, nsa_backward, nsa_forward,
};
use tercet_attention::{Dims, NsaSpec};
use tercet_cuda::{Buffer, Gpu, Label};

use super::{at, number, stale};
use crate::{Error, Result, Tensor};

const DENSE: &str = "attention_dense";
const NSA: &str = "attention_nsa";

/// A tensor's numbers, for calls whose work is enqueued before the tensor is dropped.
fn slice(tensor: &Tensor) -> Result<Slice> {
    // SAFETY: memory is freed in the stream's order, so after all work enqueued until then.
    Ok(unsafe { Slice::new(at(tensor)?, tensor.len()) })
}

/// Room for the gradients of tensors.
fn like<const N: usize>(gpu: &Gpu, tensors: &[Tensor; N]) -> Result<([Tensor; N], [Slice; N])> {
    // Clones only hold the places.
    let mut room = tensors.clone();
    for (room, x) in room.iter_mut().zip(tensors) {
        *room = stale(gpu, x.dtype(), x.shape())?;
    }
    let slices = slices(&room)?;
    Ok((room, slices))
}

fn slices<const N: usize>(tensors: &[Tensor; N]) -> Result<[Slice; N]> {
    // SAFETY: no numbers at all.
    let mut slices = [unsafe { Slice::new(0, 0) }; N];
    for (to, tensor) in slices.iter_mut().zip(tensors) {
        *to = slice(tensor)?;
    }
    Ok(slices)
}

/// One call of dense or window attention.
pub(crate) struct Dense {
    plan: Plan,
    batch: Batch,
    /// q, k, v.
    values: [Tensor; 3],
    mask: Mask,
    /// `[T, H]`, f32.
    lse: Buffer,
}

impl Dense {
    /// The output, and what the backward needs beside it.
    pub(crate) fn forward(
        gpu: &Gpu,
        dims: Dims,
        values: [Tensor; 3],
        cu_seqlens: &[i32],
        mask: Mask,
    ) -> Result<(Tensor, Dense)> {
        let dtype = values[0].dtype();
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(DENSE))?;
        let batch = Batch::new(gpu, cu_seqlens).map_err(Error::attention(DENSE))?;
        let shape = [batch.tokens(), dims.heads, dims.value_dim];
        let label = Label::shaped("log-sum-exps", &shape[..2]);
        let lse = gpu.alloc_for(shape[0] * shape[1] * 4, label)?;
        let call = Dense { plan, batch, values, mask, lse };
        let out = stale(gpu, dtype, &shape)?;
        attend_forward(&call.input()?, mask, slice(&out)?, call.lse())
            .map_err(Error::attention(DENSE))?;
        Ok((out, call))
    }

    /// Gradients of q, k and v.
    pub(crate) fn backward(&self, out: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
        let (room, [q, k, v]) = like(self.plan.gpu(), &self.values)?;
        let grads = AttendGrads { q, k, v };
        attend_backward(&self.input()?, self.mask, slice(out)?, self.lse(), slice(grad)?, grads)
            .map_err(Error::attention(DENSE))?;
        Ok(room)
    }

    fn input(&self) -> Result<AttendInput<'_>> {
        let [q, k, v] = slices(&self.values)?;
        let (plan, batch, scale) = (&self.plan, &self.batch, self.plan.dims().scale());
        Ok(AttendInput { plan, batch, scale, q, k, v })
    }

    fn lse(&self) -> Slice {
        // SAFETY: the buffer lives as long as the call, see `slice`.
        unsafe { Slice::new(self.lse.ptr(), self.lse.bytes() / 4) }
    }
}

/// One call of the sparse operator.
pub(crate) struct Nsa {
    plan: Plan,
    batch: NsaBatch,
    /// In the order of `NsaVars`.
    values: [Tensor; 8],
    /// Only when a backward is to follow.
    saved: Option<NsaSaved>,
}

impl Nsa {
    /// The output, and what the backward needs when `save`.
    pub(crate) fn forward(
        gpu: &Gpu,
        dims: Dims,
        values: [Tensor; 8],
        spec: &NsaSpec,
        cu_seqlens: &[i32],
        save: bool,
    ) -> Result<(Tensor, Nsa)> {
        let dtype = values[0].dtype();
        let plan = Plan::new(gpu, dims, number(dtype)).map_err(Error::attention(NSA))?;
        let batch = NsaBatch::new(gpu, spec, cu_seqlens).map_err(Error::attention(NSA))?;
        let out = stale(gpu, dtype, &[batch.tokens(), dims.heads, dims.value_dim])?;
        let mut call = Nsa { plan, batch, values, saved: None };
        call.saved =
            nsa_forward(&call.input()?, slice(&out)?, save).map_err(Error::attention(NSA))?;
        Ok((out, call))
    }

    /// Gradients in the order of the inputs.
    pub(crate) fn backward(&self, grad: &Tensor) -> Result<[Tensor; 8]> {
        let Some(saved) = &self.saved else {
            return Err(Error::Tape("the forward of attention_nsa has kept nothing"));
        };
        let (room, [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]) =
            like(self.plan.gpu(), &self.values)?;
        let grads = NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
        nsa_backward(&self.input()?, &saved.state(), slice(grad)?, grads)
            .map_err(Error::attention(NSA))?;
        Ok(room)
    }

    /// The selected blocks, and the log-sum-exps of cmp, slc, win; nothing where nothing was saved.
    pub(crate) fn chosen(&self) -> Result<(Vec<i32>, [Vec<f32>; 3])> {
        let Some(saved) = &self.saved else { return Ok(Default::default()) };
        let mut indices = vec![0; saved.indices().bytes() / 4];
        saved.indices().download(&mut indices)?;
        let mut lses = saved.lses().each_ref().map(|lse| vec![0.0; lse.bytes() / 4]);
        for (lse, host) in saved.lses().iter().zip(&mut lses) {
            lse.download(host)?;
        }
        Ok((indices, lses))
    }

    fn input(&self) -> Result<NsaInput<'_>> {
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = slices(&self.values)?;
        let (plan, batch, scale) = (&self.plan, &self.batch, self.plan.dims().scale());
        Ok(NsaInput { plan, batch, scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate })
    }
}
