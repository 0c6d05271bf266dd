//! The operator from raw compression keys and values: φ, then the three branches.

use super::nsa::{NsaGrads, NsaInput, NsaOutput, nsa_backward, nsa_forward};
use super::{CompressInput, Phi, PhiGrads, compress_backward, compress_forward};
use crate::Result;

/// The operator's inputs before compression.
#[derive(Clone, Copy)]
pub struct OperatorInput<'a> {
    /// As in [`NsaInput`], but `k_cmp` `[T, K, D]` and `v_cmp` `[T, K, V]` are raw.
    pub raw: NsaInput<'a>,
    /// φ of the keys.
    pub phi_k: Phi<'a>,
    /// φ of the values.
    pub phi_v: Phi<'a>,
}

/// Gradients of [`OperatorInput`].
#[derive(Clone, Debug, PartialEq)]
pub struct OperatorGrads {
    /// Of the inputs; `k_cmp` and `v_cmp` are those of the raw ones.
    pub raw: NsaGrads,
    /// Of φ of the keys.
    pub phi_k: PhiGrads,
    /// Of φ of the values.
    pub phi_v: PhiGrads,
}

/// The whole operator.
pub fn operator_forward(input: &OperatorInput) -> Result<NsaOutput> {
    let (k_cmp, v_cmp) = input.compressed()?;
    nsa_forward(&input.ready(&k_cmp, &v_cmp))
}

/// Gradients from the result of [`operator_forward`] and `d_out` `[T, H, V]`.
pub fn operator_backward(
    input: &OperatorInput,
    output: &NsaOutput,
    d_out: &[f64],
) -> Result<OperatorGrads> {
    let (k_cmp, v_cmp) = input.compressed()?;
    let mut raw = nsa_backward(&input.ready(&k_cmp, &v_cmp), output, d_out)?;
    let (keys, values) = input.compress_inputs();
    let (d_k, phi_k) = compress_backward(&keys, &raw.k_cmp)?;
    let (d_v, phi_v) = compress_backward(&values, &raw.v_cmp)?;
    (raw.k_cmp, raw.v_cmp) = (d_k, d_v);
    Ok(OperatorGrads { raw, phi_k, phi_v })
}

impl<'a> OperatorInput<'a> {
    /// The compressed keys `[N, K, D]` and values `[N, K, V]`.
    pub fn compressed(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let (keys, values) = self.compress_inputs();
        Ok((compress_forward(&keys)?, compress_forward(&values)?))
    }

    /// These inputs with compressed keys and values in the place of the raw ones.
    pub fn ready<'b>(&self, k_cmp: &'b [f64], v_cmp: &'b [f64]) -> NsaInput<'b>
    where
        'a: 'b,
    {
        NsaInput { k_cmp, v_cmp, ..self.raw }
    }

    fn compress_inputs(&self) -> (CompressInput<'a>, CompressInput<'a>) {
        let NsaInput { spec, dims, cu_seqlens, k_cmp, v_cmp, .. } = self.raw;
        let part =
            |dim, x, phi| CompressInput { spec, cu_seqlens, kv_heads: dims.kv_heads, dim, x, phi };
        (part(dims.key_dim, k_cmp, self.phi_k), part(dims.value_dim, v_cmp, self.phi_v))
    }
}
