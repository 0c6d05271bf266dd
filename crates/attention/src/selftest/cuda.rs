//! The CUDA kernels on cases, between margins of NaN and into poisoned outputs. Compression runs
//! on the CPU.

use std::collections::BTreeMap;

use half::{bf16, f16};
use tercet_cuda::{Buffer, Gpu, Number};

use super::case::{Case, INPUTS};
use super::fast::{Narrow, fast_compress_backward};
use super::ways::{Outcome, Storage, UNIT32, Way, widen};
use super::{Check, ensure};
use crate::cpu::{self, Mask};
use crate::cuda::decode::{NsaCache, NsaStep};
use crate::cuda::{
    AttendGrads, AttendInput, Batch, NsaBatch, NsaGrads, NsaInput, NsaState, Plan, Slice,
    attend_backward, attend_forward, nsa_backward, nsa_forward, nsa_forward_into,
};
use crate::{Dims, Element};

/// Numbers on either side of every slice that a kernel sees; a multiple of 8 keeps 16-byte loads.
const MARGIN: usize = 40;

/// A storage type that the device has too.
pub trait Stored: Element {
    /// Its name on the device.
    const NUMBER: Number;
    /// Its bits, as the device takes them.
    fn bytes(values: &[Self]) -> Vec<u8>;
    /// From such bits.
    fn from_bytes(bytes: &[u8]) -> Vec<Self>;
}

macro_rules! stored {
    ($($t:ty: $number:ident, $n:literal);+) => { $(
        impl Stored for $t {
            const NUMBER: Number = Number::$number;
            fn bytes(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
            fn from_bytes(bytes: &[u8]) -> Vec<Self> {
                bytes.as_chunks::<$n>().0.iter().map(|x| Self::from_le_bytes(*x)).collect()
            }
        }
    )+ };
}
stored!(f32: F32, 4; bf16: BF16, 2; f16: F16, 2);

/// Device memory between two margins of bytes 0xff, which are NaN in every type.
pub struct Guarded {
    buffer: Buffer,
    margin: usize,
    len: usize,
}

impl Guarded {
    /// `len` numbers of `bytes` bytes, poisoned, with so many numbers before and after.
    pub fn poison(gpu: &Gpu, len: usize, bytes: usize, margin: usize) -> Check<Self> {
        let buffer = gpu.alloc((len + 2 * margin) * bytes)?;
        buffer.fill(0xff)?;
        Ok(Guarded { buffer, margin: margin * bytes, len })
    }

    /// These bytes, of numbers of `bytes` bytes.
    pub fn holding(gpu: &Gpu, values: &[u8], bytes: usize, margin: usize) -> Check<Self> {
        let guarded = Self::poison(gpu, values.len() / bytes, bytes, margin)?;
        guarded.buffer.write(guarded.margin, values)?;
        Ok(guarded)
    }

    /// The numbers, for a call.
    pub fn slice(&self) -> Slice {
        // SAFETY: inside the buffer, which the callers keep until they have read the results.
        unsafe { Slice::new(self.buffer.ptr() + self.margin as u64, self.len) }
    }

    /// The bytes of the numbers; the margins must be as they were.
    pub fn read(&self) -> Check<Vec<u8>> {
        let mut all = vec![0u8; self.buffer.bytes()];
        self.buffer.download(&mut all)?;
        let (before, rest) = all.split_at(self.margin);
        let (inner, after) = rest.split_at(rest.len() - self.margin);
        let whole = before.iter().chain(after).all(|&byte| byte == 0xff);
        ensure(whole, || "a kernel wrote outside a slice".into())?;
        Ok(inner.to_vec())
    }

    /// The first and the last of so many equal parts, without margins.
    pub fn ends(&self, parts: usize) -> Check<(Vec<u8>, Vec<u8>)> {
        let size = self.buffer.bytes() / parts;
        let (mut first, mut last) = (vec![0u8; size], vec![0u8; size]);
        self.buffer.read(0, &mut first)?;
        self.buffer.read(self.buffer.bytes() - size, &mut last)?;
        Ok((first, last))
    }

    /// As numbers.
    pub fn values<E: Stored>(&self) -> Check<Vec<E>> {
        Ok(E::from_bytes(&self.read()?))
    }

    /// As float64.
    pub fn widen<E: Stored>(&self) -> Check<Vec<f64>> {
        Ok(widen(&self.values::<E>()?))
    }

    /// As i32.
    pub fn integers(&self) -> Check<Vec<i32>> {
        Ok(self.read()?.as_chunks().0.iter().map(|x| i32::from_le_bytes(*x)).collect())
    }
}

/// Where and how cases are computed.
#[derive(Clone)]
pub struct Device {
    /// The device.
    pub gpu: Gpu,
    /// Plain kernels only.
    pub plain: bool,
    /// Numbers before and after every slice.
    pub margin: usize,
    /// Small head dims are computed as larger ones, those that special kernels are for.
    pub wide: bool,
}

/// Head dims padded with zeros.
#[derive(Clone, Copy)]
struct Padded {
    /// What the case has.
    from: Dims,
    /// What the device computes.
    to: Dims,
    /// What queries are multiplied by so that scores stay: a power of two.
    factor: f32,
}

/// Head dims that special kernels are for.
const USUAL: [usize; 5] = [64, 96, 128, 192, 256];

impl Padded {
    /// To dims of [`USUAL`] where that changes no bit, else as they are.
    fn new(from: Dims, wide: bool) -> Self {
        let mut padded = Padded { from, to: from, factor: 1.0 };
        let ratio = |dim: usize| USUAL.iter().find(|to| [dim, 4 * dim, 16 * dim].contains(to));
        let room = |dim: usize| USUAL.iter().find(|to| **to >= dim);
        if let (true, Some(&key), Some(&value)) = (wide, ratio(from.key_dim), room(from.value_dim))
        {
            padded.to = Dims { key_dim: key, value_dim: value, ..from };
            padded.factor = ((key / from.key_dim) as f32).sqrt();
        }
        padded
    }

    /// Queries.
    fn q<E: Element>(self, x: &[E]) -> Vec<E> {
        let scaled: Vec<E> = x.iter().map(|x| E::from_f32(x.to_f32() * self.factor)).collect();
        self.k(&scaled)
    }

    /// Keys.
    fn k<E: Element>(self, x: &[E]) -> Vec<E> {
        pad(x, self.from.key_dim, self.to.key_dim)
    }

    /// Values and gradients of outputs.
    fn v<E: Element>(self, x: &[E]) -> Vec<E> {
        pad(x, self.from.value_dim, self.to.value_dim)
    }

    /// An input by its name.
    fn input<E: Element>(self, name: &str, x: &[E]) -> Vec<E> {
        match &name[..1] {
            "q" => self.q(x),
            "k" => self.k(x),
            "v" | "d" => self.v(x),
            _ => x.to_vec(),
        }
    }

    /// The gradient of an input by its name.
    fn grad<E: Element>(self, name: &str, x: &[E]) -> Vec<E> {
        let key = || cut(x, self.to.key_dim, self.from.key_dim);
        match &name[..1] {
            "q" => key().into_iter().map(|x| E::from_f32(x.to_f32() * self.factor)).collect(),
            "k" => key(),
            "v" => self.out(x),
            _ => x.to_vec(),
        }
    }

    /// Outputs.
    fn out<E: Element>(self, x: &[E]) -> Vec<E> {
        cut(x, self.to.value_dim, self.from.value_dim)
    }
}

/// Rows of `from` numbers, each followed by zeros up to `to`; what is no whole row stays.
fn pad<E: Element>(x: &[E], from: usize, to: usize) -> Vec<E> {
    let rows = x.chunks_exact(from);
    let rest = rows.remainder();
    let zeros = || std::iter::repeat_n(E::default(), to - from);
    rows.flat_map(|row| row.iter().copied().chain(zeros())).chain(rest.iter().copied()).collect()
}

/// The first `to` of every `from` numbers.
fn cut<E: Element>(x: &[E], from: usize, to: usize) -> Vec<E> {
    x.chunks_exact(from).flat_map(|row| row[..to].iter().copied()).collect()
}

impl Device {
    /// The kernels that the device would choose.
    pub fn new(gpu: &Gpu) -> Self {
        Device { gpu: gpu.clone(), plain: false, margin: MARGIN, wide: false }
    }

    /// Plain kernels only.
    pub fn plain(self) -> Self {
        Device { plain: true, ..self }
    }

    /// Addresses that are aligned to one number and no more.
    pub fn misaligned(self) -> Self {
        Device { margin: MARGIN + 1, ..self }
    }

    /// Small head dims padded to those that special kernels are for.
    pub fn wide(self) -> Self {
        Device { wide: true, ..self }
    }

    /// This device as a way, with `E` for storage.
    pub fn way<E: Stored>(&self, name: &str, storage: Storage) -> Way<'static> {
        let (run, attend, decode) = (self.clone(), self.clone(), self.clone());
        Way {
            name: name.into(),
            unit: UNIT32,
            storage,
            run: Box::new(move |case| run.run::<E>(case)),
            attend: Box::new(move |case, branch, mask| attend.attend::<E>(case, branch, mask)),
            decode: Some(Box::new(move |case, cut| decode.decode::<E>(case, cut))),
        }
    }

    /// A plan for a case.
    pub fn plan<E: Stored>(&self, dims: Dims) -> Check<Plan> {
        let plan = Plan::new(&self.gpu, dims, E::NUMBER)?;
        Ok(if self.plain { plan.plain() } else { plan })
    }

    /// These numbers on the device.
    pub fn hold<E: Stored>(&self, values: &[E]) -> Check<Guarded> {
        Guarded::holding(&self.gpu, &E::bytes(values), E::NUMBER.bytes(), self.margin)
    }

    /// Room for numbers on the device.
    pub fn poison<E: Stored>(&self, len: usize) -> Check<Guarded> {
        Guarded::poison(&self.gpu, len, E::NUMBER.bytes(), self.margin)
    }

    /// Room for the state of a call.
    pub fn state<E: Stored>(&self, case: &Case) -> Check<State> {
        let Dims { heads, kv_heads, value_dim, .. } = case.dims;
        let tokens = case.tokens();
        let out = || self.poison::<E>(tokens * heads * value_dim);
        let lse = || self.poison::<f32>(tokens * heads);
        let integers = tokens * kv_heads * case.spec.select_count;
        Ok(State {
            outs: [out()?, out()?, out()?],
            lses: [lse()?, lse()?, lse()?],
            indices: Guarded::poison(&self.gpu, integers, 4, self.margin)?,
        })
    }

    /// The operator, forward and, for cases with a `d_out`, backward.
    fn run<E: Stored>(&self, case: &Case) -> Check<Outcome> {
        let padded = Padded::new(case.dims, self.wide);
        let plan = self.plan::<E>(padded.to)?;
        let batch = NsaBatch::new(&self.gpu, &case.spec, &case.cu_seqlens)?;
        let narrow = Narrow::<E>::of(case);
        let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
        let (tokens, rows) = (case.tokens(), case.compressed_rows());
        let nan = E::from_f32(f32::NAN);
        let mut k_cmp = vec![nan; rows * kv_heads * key_dim];
        let mut v_cmp = vec![nan; rows * kv_heads * value_dim];
        cpu::compress_forward(&narrow.compress("k"), &mut k_cmp)?;
        cpu::compress_forward(&narrow.compress("v"), &mut v_cmp)?;
        let mut inputs = Vec::new();
        for name in INPUTS {
            let x = match name {
                "k_cmp" => &k_cmp,
                "v_cmp" => &v_cmp,
                name => narrow.get(name),
            };
            inputs.push(self.hold(&padded.input(name, x))?);
        }
        let input = nsa_input(&plan, &batch, &inputs);
        let out_len = tokens * heads * padded.to.value_dim;
        let out = self.poison::<E>(out_len)?;
        let state = self.state::<E>(&Case { dims: padded.to, ..case.clone() })?;
        nsa_forward_into(&input, out.slice(), &state.slices())?;

        // Without saving, the same output.
        let other = self.poison::<E>(out_len)?;
        nsa_forward(&input, other.slice(), false)?;
        ensure(out.read()? == other.read()?, || "saving changes the output".into())?;

        let mut tensors = BTreeMap::new();
        let mut put = |name: &str, x: Vec<f64>| tensors.insert(name.to_string(), x);
        if case.tensors.contains_key("d_out") {
            let mut grads = Vec::new();
            for input in &inputs {
                grads.push(self.poison::<E>(input.len)?);
            }
            let d_out = self.hold(&padded.v(narrow.get("d_out")))?;
            nsa_backward(&input, &state.slices(), d_out.slice(), nsa_grads(&grads))?;
            for (name, x) in INPUTS.iter().zip(&grads) {
                put(&format!("d_{name}"), widen(&padded.grad(name, &x.values::<E>()?)));
            }
            for (letter, i) in [("k", 1), ("v", 2)] {
                let d_rows = padded.grad(letter, &grads[i].values::<E>()?);
                for (name, x) in fast_compress_backward(&narrow, letter, &d_rows)? {
                    put(&name, x);
                }
            }
        }
        put("out", widen(&padded.out(&out.values::<E>()?)));
        for (i, name) in ["cmp", "slc", "win"].into_iter().enumerate() {
            put(&format!("out_{name}"), widen(&padded.out(&state.outs[i].values::<E>()?)));
            put(&format!("lse_{name}"), state.lses[i].widen::<f32>()?);
        }
        put("compressed_k", widen(&k_cmp));
        put("compressed_v", widen(&v_cmp));
        for held in &inputs {
            held.read()?;
        }
        Ok(Outcome { indices: state.indices.integers()?, tensors })
    }

    /// Decodes a case of one sequence, `chunks` tokens at a time: outputs `[T, H, V]`, indices.
    fn decode<E: Stored>(&self, case: &Case, chunks: &[usize]) -> Check<(Vec<f64>, Vec<i32>)> {
        let padded = Padded::new(case.dims, self.wide);
        let plan = self.plan::<E>(padded.to)?;
        let narrow = Narrow::<E>::of(case);
        let Dims { heads, kv_heads, key_dim, value_dim } = case.dims;
        let spec = &case.spec;
        let mut tails = [
            cpu::CompressTail::<E>::new(spec, kv_heads, key_dim)?,
            cpu::CompressTail::<E>::new(spec, kv_heads, value_dim)?,
        ];
        let mut cache = NsaCache::new(&plan, spec, 1, 1)?;
        let (mut outs, mut indices, mut at) = (Vec::new(), Vec::new(), 0);
        for &c in chunks {
            let rows = |name: &str, width: usize| &narrow.get(name)[at * width..(at + c) * width];
            let (keys, values) = (kv_heads * key_dim, kv_heads * value_dim);
            let hold = |name: &str, x: &[E]| self.hold(&padded.input(name, x));
            let held = [
                hold("q", rows("q", heads * key_dim))?,
                hold("k", &tails[0].push(rows("k_cmp", keys), narrow.phi("k"))?)?,
                hold("v", &tails[1].push(rows("v_cmp", values), narrow.phi("v"))?)?,
                hold("k", rows("k_slc", keys))?,
                hold("v", rows("v_slc", values))?,
                hold("k", rows("k_win", keys))?,
                hold("v", rows("v_win", values))?,
                hold("gate", rows("gate", heads * 3))?,
            ];
            let [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate] =
                held.each_ref().map(Guarded::slice);
            let scale = padded.to.scale();
            let step = NsaStep { scale, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
            let out = self.poison::<E>(c * heads * padded.to.value_dim)?;
            let chosen =
                Guarded::poison(&self.gpu, c * kv_heads * spec.select_count, 4, self.margin)?;
            cache.extend(0, &step, out.slice(), Some(chosen.slice()))?;
            outs.extend(widen(&padded.out(&out.values::<E>()?)));
            indices.extend(chosen.integers()?);
            at += c;
        }
        Ok((outs, indices))
    }

    /// Dense or window attention over one branch's keys and values.
    fn attend<E: Stored>(&self, case: &Case, branch: &str, mask: Mask) -> Check<Outcome> {
        let padded = Padded::new(case.dims, self.wide);
        let plan = self.plan::<E>(padded.to)?;
        let batch = Batch::new(&self.gpu, &case.cu_seqlens)?;
        let narrow = Narrow::<E>::of(case);
        let Dims { heads, value_dim, .. } = padded.to;
        let q = self.hold(&padded.q(narrow.get("q")))?;
        let k = self.hold(&padded.k(narrow.get(&format!("k_{branch}"))))?;
        let v = self.hold(&padded.v(narrow.get(&format!("v_{branch}"))))?;
        let input = AttendInput {
            plan: &plan,
            batch: &batch,
            scale: plan.dims().scale(),
            q: q.slice(),
            k: k.slice(),
            v: v.slice(),
        };
        let out = self.poison::<E>(case.tokens() * heads * value_dim)?;
        let lse = self.poison::<f32>(case.tokens() * heads)?;
        attend_forward(&input, mask, out.slice(), lse.slice())?;
        let mut tensors = BTreeMap::new();
        if case.tensors.contains_key("d_out") {
            let d_out = self.hold(&padded.v(narrow.get("d_out")))?;
            let [d_q, d_k, d_v] =
                [self.poison::<E>(q.len)?, self.poison::<E>(k.len)?, self.poison::<E>(v.len)?];
            let grads = AttendGrads { q: d_q.slice(), k: d_k.slice(), v: d_v.slice() };
            attend_backward(&input, mask, out.slice(), lse.slice(), d_out.slice(), grads)?;
            for (name, x) in [("q", d_q), ("k", d_k), ("v", d_v)] {
                let x = padded.grad(name, &x.values::<E>()?);
                tensors.insert(format!("d_{name}"), widen(&x));
            }
        }
        tensors.insert("out".into(), widen(&padded.out(&out.values::<E>()?)));
        tensors.insert("lse".into(), lse.widen::<f32>()?);
        Ok(Outcome { indices: Vec::new(), tensors })
    }
}

/// A call's state on the device.
pub struct State {
    /// Outputs of cmp, slc, win.
    pub outs: [Guarded; 3],
    /// Their log-sum-exps.
    pub lses: [Guarded; 3],
    /// Selected blocks.
    pub indices: Guarded,
}

impl State {
    /// For a call.
    pub fn slices(&self) -> NsaState {
        NsaState {
            outs: self.outs.each_ref().map(Guarded::slice),
            lses: self.lses.each_ref().map(Guarded::slice),
            indices: self.indices.slice(),
        }
    }
}

/// The operator's input from tensors in the order of [`INPUTS`].
pub fn nsa_input<'a>(plan: &'a Plan, batch: &'a NsaBatch, inputs: &[Guarded]) -> NsaInput<'a> {
    let at = |i: usize| inputs[i].slice();
    NsaInput {
        plan,
        batch,
        scale: plan.dims().scale(),
        q: at(0),
        k_cmp: at(1),
        v_cmp: at(2),
        k_slc: at(3),
        v_slc: at(4),
        k_win: at(5),
        v_win: at(6),
        gate: at(7),
    }
}

/// Where gradients go, in the order of [`INPUTS`].
pub fn nsa_grads(grads: &[Guarded]) -> NsaGrads {
    let at = |i: usize| grads[i].slice();
    NsaGrads {
        q: at(0),
        k_cmp: at(1),
        v_cmp: at(2),
        k_slc: at(3),
        v_slc: at(4),
        k_win: at(5),
        v_win: at(6),
        gate: at(7),
    }
}
