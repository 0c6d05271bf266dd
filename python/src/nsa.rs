//! The whole operator, forward and backward.

use pyo3::prelude::*;
use tercet_attention::cpu::{NsaGrads, NsaInput, NsaSaved, nsa_backward, nsa_forward, pieces};
use tercet_attention::cuda;
use tercet_attention::{Dims, Element, NsaSpec, cu_compressed, sequences};

use crate::call::{self, SpecNumbers, with_cpu_type};
use crate::cuda::{Stream, slice};
use crate::dlpack::{DType, Device, Number, Tensor, refuse};
use crate::error::value_error;

const NAMES: [&str; 8] = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"];
const GRADS: [&str; 8] =
    ["d_q", "d_k_cmp", "d_v_cmp", "d_k_slc", "d_v_slc", "d_k_win", "d_v_win", "d_gate"];
const LAYOUTS: [&str; 8] = [
    "[T, H, D]",
    "[N, K, D]",
    "[N, K, V]",
    "[T, K, D]",
    "[T, K, V]",
    "[T, K, D]",
    "[T, K, V]",
    "[T, H, 3]",
];

/// Checked inputs.
struct Call<'py> {
    spec: NsaSpec,
    scale: f32,
    dims: Dims,
    tokens: usize,
    cu_seqlens: Vec<i32>,
    inputs: [Tensor<'py>; 8],
}

/// Reads a list of tensors under their names.
fn read<'py, const N: usize>(
    names: [&'static str; N],
    objects: &[Bound<'py, PyAny>; N],
) -> PyResult<[Tensor<'py>; N]> {
    let mut read = Vec::with_capacity(N);
    for (name, object) in names.into_iter().zip(objects) {
        read.push(Tensor::read(name, object)?);
    }
    read.try_into().map_err(|_| refuse("inputs", "not as many tensors as names"))
}

impl<'py> Call<'py> {
    fn read(
        spec: SpecNumbers,
        scale: f64,
        cu_seqlens: Option<&Bound<'py, PyAny>>,
        batch: usize,
        inputs: &[Bound<'py, PyAny>; 8],
    ) -> PyResult<Self> {
        let spec = call::spec(spec)?;
        let scale = call::scale(scale)?;
        let inputs = read(NAMES, inputs)?;
        let [q, _, _, _, v_slc, ..] = &inputs;
        let (tokens, dims) = call::dims(q, v_slc)?;
        let cu_seqlens = call::offsets(cu_seqlens, batch, tokens, "q")?;
        let call = Self { spec, scale, dims, tokens, cu_seqlens, inputs };
        for ((tensor, shape), layout) in call.inputs.iter().zip(call.shapes()?).zip(LAYOUTS) {
            tensor.expect_like(&call.inputs[0])?;
            tensor.expect_shape(&shape, layout)?;
        }
        Ok(call)
    }

    /// The shapes of the inputs.
    fn shapes(&self) -> PyResult<[[usize; 3]; 8]> {
        let Dims { heads, kv_heads, key_dim, value_dim } = self.dims;
        let sequences = sequences(&self.cu_seqlens, self.tokens).map_err(value_error)?;
        let blocks = cu_compressed(&self.spec, &sequences)[sequences.len()];
        let (t, n) = (self.tokens, blocks);
        let (k, v) = ([t, kv_heads, key_dim], [t, kv_heads, value_dim]);
        let (k_cmp, v_cmp) = ([n, kv_heads, key_dim], [n, kv_heads, value_dim]);
        Ok([[t, heads, key_dim], k_cmp, v_cmp, k, v, k, v, [t, heads, 3]])
    }

    fn cpu<E: Element + Number>(&self) -> PyResult<NsaInput<'_, E>> {
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &self.inputs;
        Ok(NsaInput {
            spec: &self.spec,
            dims: self.dims,
            cu_seqlens: &self.cu_seqlens,
            scale: self.scale,
            q: q.slice()?,
            k_cmp: k_cmp.slice()?,
            v_cmp: v_cmp.slice()?,
            k_slc: k_slc.slice()?,
            v_slc: v_slc.slice()?,
            k_win: k_win.slice()?,
            v_win: v_win.slice()?,
            gate: gate.slice()?,
        })
    }

    /// Runs `f` with the call's device memory.
    fn on_device(
        &self,
        ordinal: usize,
        stream: u64,
        f: impl FnOnce(&cuda::NsaInput) -> tercet_attention::Result<()>,
    ) -> PyResult<()> {
        let stream = Stream::get(ordinal, stream)?;
        let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &self.inputs;
        let plan = stream.plan(self.dims, q)?;
        let batch = stream.nsa_batch(&self.spec, &self.cu_seqlens)?;
        let input = cuda::NsaInput {
            plan: &plan,
            batch: &batch,
            scale: self.scale,
            q: slice(q),
            k_cmp: slice(k_cmp),
            v_cmp: slice(v_cmp),
            k_slc: slice(k_slc),
            v_slc: slice(v_slc),
            k_win: slice(k_win),
            v_win: slice(v_win),
            gate: slice(gate),
        };
        f(&input).map_err(value_error)
    }

    /// Reads a choice of blocks, `[T, K, S]`.
    fn choice(&self, object: &Bound<'py, PyAny>) -> PyResult<Tensor<'py>> {
        let choice = Tensor::read("indices", object)?;
        choice.expect(self.inputs[0].device(), DType::I32, "every choice of blocks")?;
        let shape = [self.tokens, self.dims.kv_heads, self.spec.select_count];
        choice.expect_shape(&shape, "[T, K, S]")?;
        Ok(choice)
    }

    /// Refuses an output or gradient of another shape, type or place than this call's.
    fn expect_out(&self, out: &Tensor) -> PyResult<()> {
        out.expect_like(&self.inputs[0])?;
        out.expect_shape(&[self.tokens, self.dims.heads, self.dims.value_dim], "[T, H, V]")
    }
}

/// What the forward pass leaves for the backward beside the choice of blocks, as tensors.
struct Saved<'py> {
    /// `[T, H, V]` each.
    out: [Tensor<'py>; 3],
    /// `[T, H]` each.
    lse: [Tensor<'py>; 3],
}

impl<'py> Saved<'py> {
    fn read(objects: &[Bound<'py, PyAny>; 6], call: &Call<'py>) -> PyResult<Self> {
        let names = ["out_cmp", "out_slc", "out_win", "lse_cmp", "lse_slc", "lse_win"];
        let [out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win] = read(names, objects)?;
        let saved = Self { out: [out_cmp, out_slc, out_win], lse: [lse_cmp, lse_slc, lse_win] };
        let Dims { heads, value_dim, .. } = call.dims;
        let device = call.inputs[0].device();
        for out in &saved.out {
            let dtype = match device {
                Device::Cpu => DType::F32,
                Device::Cuda(_) => call.inputs[0].dtype(),
            };
            out.expect(device, dtype, "what the forward saved")?;
            out.expect_shape(&[call.tokens, heads, value_dim], "[T, H, V]")?;
        }
        for lse in &saved.lse {
            lse.expect(device, call::sums(device), "what the forward saved")?;
            lse.expect_shape(&[call.tokens, heads], "[T, H]")?;
        }
        Ok(saved)
    }

    fn state(&self, indices: &Tensor) -> cuda::NsaState {
        cuda::NsaState {
            outs: self.out.each_ref().map(slice),
            lses: self.lse.each_ref().map(slice),
            indices: slice(indices),
        }
    }

    fn write(&mut self, from: &NsaSaved) -> PyResult<()> {
        let outs = [&from.out_cmp, &from.out_slc, &from.out_win];
        for (to, from) in self.out.iter_mut().zip(outs) {
            to.slice_mut::<f32>()?.copy_from_slice(from);
        }
        let sums = [&from.lse_cmp, &from.lse_slc, &from.lse_win];
        for (to, from) in self.lse.iter_mut().zip(sums) {
            to.slice_mut::<f64>()?.copy_from_slice(from);
        }
        Ok(())
    }

    fn to_cpu(&self, indices: &Tensor) -> PyResult<NsaSaved> {
        let [out_cmp, out_slc, out_win] = &self.out;
        let [lse_cmp, lse_slc, lse_win] = &self.lse;
        Ok(NsaSaved {
            out_cmp: out_cmp.slice()?.to_vec(),
            out_slc: out_slc.slice()?.to_vec(),
            out_win: out_win.slice()?.to_vec(),
            lse_cmp: lse_cmp.slice()?.to_vec(),
            lse_slc: lse_slc.slice()?.to_vec(),
            lse_win: lse_win.slice()?.to_vec(),
            indices: indices.slice()?.to_vec(),
        })
    }
}

/// Refuses a choice of blocks that is not canonical: per token and KV head, min(S, blocks so far)
/// ascending blocks up to the token's own, then −1.
fn check_choice(choice: &[i32], call: &Call) -> PyResult<()> {
    let (kv_heads, count) = (call.dims.kv_heads, call.spec.select_count);
    let sequences = sequences(&call.cu_seqlens, call.tokens).map_err(value_error)?;
    for sequence in sequences {
        for token in sequence.clone() {
            let own = (token - sequence.start) / call.spec.select_block;
            for head in 0..kv_heads {
                let row = &choice[(token * kv_heads + head) * count..][..count];
                let (blocks, padding) = row.split_at(count.min(own + 1));
                let ascending = blocks.windows(2).all(|pair| pair[0] < pair[1]);
                let inside = blocks.iter().all(|&b| usize::try_from(b).is_ok_and(|b| b <= own));
                if !ascending || !inside || padding.iter().any(|&b| b != -1) {
                    let message = format!(
                        "token {token}, KV head {head}: {row:?}, expected {} ascending blocks of \
                         0..={own} and then -1",
                        blocks.len()
                    );
                    return Err(refuse("indices", message));
                }
            }
        }
    }
    Ok(())
}

/// The forward pass with a choice of blocks made elsewhere.
fn forward_chosen<E: Element>(
    input: &NsaInput<E>,
    choice: Vec<i32>,
    out: &mut [E],
) -> tercet_attention::Result<NsaSaved> {
    let mut saved = pieces::cmp_forward(input)?;
    saved.indices = choice;
    pieces::slc_forward(input, &mut saved)?;
    pieces::win_forward(input, &mut saved)?;
    pieces::gate_forward(input, &saved, out);
    Ok(saved)
}

/// The same on a device; the state's indices are the choice.
fn forward_chosen_cuda(
    input: &cuda::NsaInput,
    out: cuda::Slice,
    state: &cuda::NsaState,
) -> tercet_attention::Result<()> {
    cuda::pieces::compressed(input, state.outs[0], state.lses[0])?;
    cuda::pieces::selected(input, state.indices, state.outs[1], state.lses[1])?;
    cuda::pieces::window(input, state.outs[2], state.lses[2])?;
    cuda::pieces::gate(input, state.outs, out)
}

/// Writes `out` and, where given, the choice of blocks `chosen` and `saved`. With `choice`, that is
/// the choice; on CUDA `chosen` is then left as it is. There `saved` needs `chosen`, and each of
/// `chosen` and `choice` needs `saved`.
#[pyfunction]
#[pyo3(name = "nsa_forward")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn forward<'py>(
    py: Python<'py>,
    stream: u64,
    spec: SpecNumbers,
    scale: f64,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    inputs: [Bound<'py, PyAny>; 8],
    choice: Option<Bound<'py, PyAny>>,
    out: Bound<'py, PyAny>,
    chosen: Option<Bound<'py, PyAny>>,
    saved: Option<[Bound<'py, PyAny>; 6]>,
) -> PyResult<()> {
    let call = Call::read(spec, scale, cu_seqlens.as_ref(), batch, &inputs)?;
    let mut out = Tensor::read("out", &out)?;
    call.expect_out(&out)?;
    let choice = choice.map(|choice| call.choice(&choice)).transpose()?;
    let mut chosen = chosen.map(|chosen| call.choice(&chosen)).transpose()?;
    let q = &call.inputs[0];
    let mut saved = saved.map(|saved| Saved::read(&saved, &call)).transpose()?;
    match q.device() {
        Device::Cpu => with_cpu_type!(q, E => {
            let input = call.cpu::<E>()?;
            let out = out.slice_mut::<E>()?;
            let choice = choice.map(|choice| choice.slice().map(<[i32]>::to_vec)).transpose()?;
            if let Some(choice) = &choice {
                check_choice(choice, &call)?;
            }
            let done = py
                .detach(|| match choice {
                    None => nsa_forward(&input, out),
                    Some(choice) => forward_chosen(&input, choice, out),
                })
                .map_err(value_error)?;
            if let Some(chosen) = &mut chosen {
                chosen.slice_mut::<i32>()?.copy_from_slice(&done.indices);
            }
            saved.as_mut().map_or(Ok(()), |saved| saved.write(&done))
        }),
        Device::Cuda(ordinal) => call.on_device(ordinal, stream, |input| {
            let out = slice(&out);
            match (&saved, choice.as_ref().or(chosen.as_ref())) {
                (Some(saved), Some(indices)) => {
                    let state = saved.state(indices);
                    if choice.is_some() {
                        return forward_chosen_cuda(input, out, &state);
                    }
                    cuda::nsa_forward_into(input, out, &state)
                }
                _ => cuda::nsa_forward(input, out, false).map(drop),
            }
        }),
    }
}

/// Writes the eight gradients, in the order of the inputs.
#[pyfunction]
#[pyo3(name = "nsa_backward")]
#[expect(clippy::too_many_arguments, reason = "a Python function's arguments")]
pub fn backward<'py>(
    py: Python<'py>,
    stream: u64,
    spec: SpecNumbers,
    scale: f64,
    cu_seqlens: Option<Bound<'py, PyAny>>,
    batch: usize,
    inputs: [Bound<'py, PyAny>; 8],
    choice: Bound<'py, PyAny>,
    saved: [Bound<'py, PyAny>; 6],
    d_out: Bound<'py, PyAny>,
    grads: [Bound<'py, PyAny>; 8],
) -> PyResult<()> {
    let call = Call::read(spec, scale, cu_seqlens.as_ref(), batch, &inputs)?;
    let choice = call.choice(&choice)?;
    let saved = Saved::read(&saved, &call)?;
    let d_out = Tensor::read("d_out", &d_out)?;
    call.expect_out(&d_out)?;
    let mut grads = read(GRADS, &grads)?;
    for ((grad, shape), layout) in grads.iter().zip(call.shapes()?).zip(LAYOUTS) {
        grad.expect_like(&call.inputs[0])?;
        grad.expect_shape(&shape, layout)?;
    }
    let q = &call.inputs[0];
    match q.device() {
        Device::Cpu => with_cpu_type!(q, E => {
            let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = &mut grads;
            let input = call.cpu::<E>()?;
            let saved = saved.to_cpu(&choice)?;
            let d_out = d_out.slice::<E>()?;
            let grads = NsaGrads {
                q: q.slice_mut()?,
                k_cmp: k_cmp.slice_mut()?,
                v_cmp: v_cmp.slice_mut()?,
                k_slc: k_slc.slice_mut()?,
                v_slc: v_slc.slice_mut()?,
                k_win: k_win.slice_mut()?,
                v_win: v_win.slice_mut()?,
                gate: gate.slice_mut()?,
            };
            py.detach(|| nsa_backward(&input, &saved, d_out, grads)).map_err(value_error)
        }),
        Device::Cuda(ordinal) => call.on_device(ordinal, stream, |input| {
            let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] = grads.each_ref().map(slice);
            let grads = cuda::NsaGrads { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
            cuda::nsa_backward(input, &saved.state(&choice), slice(&d_out), grads)
        }),
    }
}
