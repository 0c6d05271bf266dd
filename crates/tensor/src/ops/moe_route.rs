//! Router of a mixture of experts: each token picks its experts.
//!
//! `p = softmax(logits)`; the k most probable experts are taken, lower index on ties; their
//! weights are p, or p over their sum. The load-balance loss `Σ_e f_e·P_e` has
//! `f_e = E/(k·T) · (times e was chosen)` and `P_e` the mean of p over tokens (DeepSeekMoE,
//! arXiv 2401.06066, Eq. 12–14): 1 when all is even, and f counts as a constant.
//!
//! Backward: gradients of weights and balance go to the p they came from, then
//! `dz = p∘(dp − Σ p·dp)`. Keeps p `[T, E]` and the choice.

use std::sync::Arc;

use rayon::prelude::*;

use super::check;
use crate::cuda::expert_plan::PlanOnCuda;
use crate::dtype::{Float, float_dispatch};
use crate::pool::Buffer;
use crate::simd::multiversion;
use crate::{Device, Error, Result, Tape, Tensor, Var, cuda, math, parallel};

const OP: &str = "moe_route";

/// Which rows go to which expert. A row is a (token, choice) pair; rows are sorted by expert,
/// then token. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExpertPlan(Arc<Plan>);

#[derive(Debug)]
struct Plan {
    top_k: usize,
    rows: usize,
    offsets: Vec<usize>,
    places: Places,
}

#[derive(Debug)]
enum Places {
    Cpu(PlanOnCpu),
    Cuda(PlanOnCuda),
}

/// The lists of a plan in main memory.
#[derive(Debug)]
pub(super) struct PlanOnCpu {
    top_k: usize,
    experts: Vec<i32>,
    /// Pair t·k + j of each row.
    pair_of_row: Vec<u32>,
    /// Row of each pair.
    row_of_pair: Vec<u32>,
}

impl PlanOnCpu {
    pub(super) fn pair_of_row(&self, row: usize) -> usize {
        self.pair_of_row[row] as usize
    }

    pub(super) fn token_of_row(&self, row: usize) -> usize {
        self.pair_of_row(row) / self.top_k
    }

    /// Rows of one token, in the order of its choices.
    pub(super) fn rows_of_token(&self, token: usize) -> impl Iterator<Item = usize> {
        let pairs = &self.row_of_pair[token * self.top_k..][..self.top_k];
        pairs.iter().map(|&row| row as usize)
    }
}

impl ExpertPlan {
    /// Sorts the chosen experts `[T, k]`, each in `0..count`.
    fn new(experts: Vec<i32>, top_k: usize, count: usize) -> Self {
        let mut offsets = vec![0; count + 1];
        for &e in &experts {
            offsets[e as usize + 1] += 1;
        }
        for e in 0..count {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let rows = experts.len();
        let mut pair_of_row = vec![0; rows];
        let mut row_of_pair = vec![0; rows];
        for (pair, &e) in experts.iter().enumerate() {
            let row = next[e as usize];
            next[e as usize] += 1;
            pair_of_row[row] = pair as u32;
            row_of_pair[pair] = row as u32;
        }
        let places = Places::Cpu(PlanOnCpu { top_k, experts, pair_of_row, row_of_pair });
        ExpertPlan(Arc::new(Plan { top_k, rows, offsets, places }))
    }

    /// Of experts that were chosen and sorted on a device; waits for the offsets.
    pub(crate) fn on_device(places: PlanOnCuda, top_k: usize) -> Result<Self> {
        let (rows, offsets) = (places.experts().len(), places.offsets()?);
        Ok(ExpertPlan(Arc::new(Plan { top_k, rows, offsets, places: Places::Cuda(places) })))
    }

    /// Chosen experts `[T, k]`, most probable first; read back from a device.
    pub fn experts(&self) -> Result<Vec<i32>> {
        match &self.0.places {
            Places::Cpu(places) => Ok(places.experts.clone()),
            Places::Cuda(places) => {
                Ok(places.experts().to_device(&Device::Cpu)?.as_i32()?.to_vec())
            }
        }
    }

    /// E+1 offsets: the rows of expert e are `offsets()[e]..offsets()[e + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.0.offsets
    }

    /// Experts of one token.
    pub fn top_k(&self) -> usize {
        self.0.top_k
    }

    /// Number of rows, T·k.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.rows() / self.0.top_k
    }

    fn device(&self) -> Device {
        match &self.0.places {
            Places::Cpu(_) => Device::Cpu,
            Places::Cuda(places) => places.device(),
        }
    }

    /// Refuses a plan that was made elsewhere than where `op` runs.
    pub(super) fn check(&self, op: &'static str, device: &Device) -> Result<()> {
        if self.device() != *device {
            return Err(Error::device(op, "the plan", device, &self.device()));
        }
        Ok(())
    }

    pub(super) fn on_cpu(&self) -> Result<&PlanOnCpu> {
        match &self.0.places {
            Places::Cpu(places) => Ok(places),
            Places::Cuda(_) => Err(Error::device(OP, "the plan", &Device::Cpu, &self.device())),
        }
    }

    pub(crate) fn on_cuda(&self) -> Result<&PlanOnCuda> {
        match &self.0.places {
            Places::Cuda(places) => Ok(places),
            Places::Cpu(_) => Err(Error::Device {
                op: OP,
                what: "the plan",
                expected: "a CUDA device".into(),
                got: Device::Cpu.to_string(),
            }),
        }
    }
}

/// What the router decides.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Weights of the chosen experts `[T, k]`.
    pub weights: Var,
    /// Load-balance loss, an f32 of shape `[]`, 1 when all is even; the model scales it.
    pub balance: Var,
    /// Where each row goes.
    pub plan: ExpertPlan,
}

/// Routes logits `[T, E]` to the `top_k` (`1..=E`) most probable experts of each token. Weights
/// are probabilities, divided by their sum over the chosen when `normalise`.
pub fn moe_route(tape: &mut Tape, logits: &Var, top_k: usize, normalise: bool) -> Result<Routing> {
    let [tokens, count] = check::dims(OP, "the logits", logits.value(), "[T, E]")?;
    if top_k == 0 || top_k > count {
        return Err(Error::value(OP, format!("top_k {top_k} is outside 1..={count}, the experts")));
    }
    if tokens.checked_mul(top_k).is_none_or(|rows| u32::try_from(rows).is_err()) {
        return Err(Error::value(OP, format!("{tokens} tokens times {top_k} are too many rows")));
    }
    let (dtype, to_logits) = (logits.dtype(), logits.source());
    if let Device::Cuda(gpu) = logits.value().device() {
        let sizes = [tokens, count, top_k];
        let (weights, balance, plan, routed) =
            cuda::moe_route::forward(&gpu, logits.value(), sizes, normalise)?;
        let outputs = tape.record_many(vec![weights, balance], &[logits], move |grads, walk| {
            let grad = cuda::moe_route::backward(&gpu, &routed, dtype, two(grads)?)?;
            walk.give(to_logits, grad)
        })?;
        let [weights, balance] = two(outputs)?;
        return Ok(Routing { weights, balance, plan });
    }
    let p = float_dispatch!(OP, dtype, probabilities(logits.value()))?;
    let experts = choose(&p, count, top_k);

    let mut weights = Buffer::<f32>::stale(tokens * top_k);
    let pairs = experts.chunks(top_k).zip(p.chunks(count));
    for (weights, (experts, p)) in weights.chunks_mut(top_k).zip(pairs) {
        for (weight, &e) in weights.iter_mut().zip(experts) {
            *weight = p[e as usize];
        }
        if normalise {
            let total: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= total);
        }
    }
    let plan = ExpertPlan::new(experts, top_k, count);
    let load = load(&plan, count);
    let mut mean = Buffer::<f32>::stale(count);
    parallel::column_sums(tokens, count, &mut mean, false, |range, part| {
        for row in p[range.start * count..range.end * count].chunks(count) {
            parallel::add_into(part, row);
        }
    });
    let total: f64 = mean.iter().zip(&load).map(|(p, f)| f64::from(*p) * f64::from(*f)).sum();
    let balance = Tensor::scalar((total / tokens.max(1) as f64) as f32);

    let weights = Tensor::from_buffer(weights, &[tokens, top_k]).to_dtype(dtype)?;
    let kept = plan.clone();
    let outputs = tape.record_many(vec![weights, balance], &[logits], move |grads, walk| {
        let call = Call { p, load, plan: kept, normalise };
        let grad = call.backward(grads)?;
        walk.give(to_logits, Tensor::from_buffer(grad, &[tokens, count]).to_dtype(dtype)?)
    })?;
    let [weights, balance] = two(outputs)?;
    Ok(Routing { weights, balance, plan })
}

/// What belongs to the router's two outputs.
fn two<T>(of_each: Vec<T>) -> Result<[T; 2]> {
    <[T; 2]>::try_from(of_each).map_err(|_| Error::Tape("the router has two outputs"))
}

/// Softmax of every row, in f32.
fn probabilities<E: Float>(logits: &Tensor) -> Result<Buffer<f32>> {
    let count = logits.shape()[1];
    let logits: &[E] = logits.view(OP, "the logits")?;
    let mut p = Buffer::<f32>::stale(logits.len());
    parallel::rows(&mut p, count, |first, rows| {
        softmax_rows(rows, &logits[first * count..][..rows.len()], count);
    });
    Ok(p)
}

multiversion! {
    fn softmax_rows<E: Float>(p: &mut [f32], logits: &[E], count: usize) {
        crate::tensor::convert_slice(p, logits);
        for p in p.chunks_exact_mut(count) {
            let highest = math::max(p);
            for p in p.iter_mut() {
                *p = math::exp(*p - highest);
            }
            let sum = math::sum(p, |e| e);
            for p in p.iter_mut() {
                *p /= sum;
            }
        }
    }
}

/// The `top_k` largest of every row, first the largest, lower index on ties.
fn choose(p: &[f32], count: usize, top_k: usize) -> Vec<i32> {
    let mut experts = vec![0; p.len() / count * top_k];
    experts.par_chunks_mut(top_k).zip(p.par_chunks(count)).for_each(|(chosen, p)| {
        for j in 0..top_k {
            let free = (0..count as i32).filter(|e| !chosen[..j].contains(e));
            // Written so that a row of NaN still picks k different experts.
            let best = free.reduce(|a, b| if p[b as usize] > p[a as usize] { b } else { a });
            chosen[j] = best.unwrap_or(0);
        }
    });
    experts
}

/// `f_e`: how often each expert was chosen, over the even share.
fn load(plan: &ExpertPlan, count: usize) -> Vec<f32> {
    let even = plan.rows().max(1) as f64 / count as f64;
    plan.offsets().windows(2).map(|w| ((w[1] - w[0]) as f64 / even) as f32).collect()
}

struct Call {
    p: Buffer<f32>,
    load: Vec<f32>,
    plan: ExpertPlan,
    normalise: bool,
}

impl Call {
    /// Gradient of the logits from those of the weights and of the balance loss.
    fn backward(&self, grads: Vec<Option<Tensor>>) -> Result<Buffer<f32>> {
        let [d_weights, d_balance] = two(grads)?;
        let experts = &self.plan.on_cpu()?.experts;
        let d_weights = d_weights.map(|g| g.to_vec_f32()).transpose()?;
        let balance = d_balance.map(|g| g.item()).transpose()?.unwrap_or(0.0);
        let (count, top_k) = (self.load.len(), self.plan.top_k());
        let share = balance / self.plan.tokens().max(1) as f32;
        let mut out = Buffer::<f32>::stale(self.p.len());
        parallel::rows(&mut out, count, |first, rows| {
            for (i, dz) in rows.chunks_exact_mut(count).enumerate() {
                let token = first + i;
                let p = &self.p[token * count..][..count];
                for (dz, load) in dz.iter_mut().zip(&self.load) {
                    *dz = share * load;
                }
                if let Some(d) = &d_weights {
                    let experts = &experts[token * top_k..][..top_k];
                    let d = &d[token * top_k..][..top_k];
                    let chosen = || experts.iter().zip(d).map(|(&e, &d)| (e as usize, d));
                    let total: f32 = chosen().map(|(e, _)| p[e]).sum();
                    let along: f32 = chosen().map(|(e, d)| p[e] * d).sum::<f32>() / total;
                    for (e, d) in chosen() {
                        dz[e] += if self.normalise { (d - along) / total } else { d };
                    }
                }
                let mean = math::dot(p, dz);
                for (dz, p) in dz.iter_mut().zip(p) {
                    *dz = p * (*dz - mean);
                }
            }
        });
        Ok(out)
    }
}
