//! The ops' own test: does a device compute what the CPU computes?
//!
//! Every case runs its op forward and backward on the CPU in f32 (the reference), on the CPU in
//! the case's storage type, and on the device in that type, from the same stored inputs. In bf16
//! the device may be twice as far from the reference as the CPU is; in f32 both round, and the
//! bound follows from the number of terms of the longest sum. Inputs feed the op twice, so that
//! gradients are added to what is there, and the device repeats everything for the same bits.

mod attention;
mod cases;
mod draws;
mod groups;
mod optimizer;
mod rules;

use tercet_attention::selftest::{Check, Fault, Row, Tally, ensure};

use crate::{DType, Device, Grads, Result, Tape, Tensor, Var, ops};

/// Half the distance between 1 and the next f32.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// Roundings in a row of one element of an op; sums come on top.
const CHAIN: f64 = 16.0;

/// An op on variables; constants it makes live where the variables live.
type Run = Box<dyn Fn(&mut Tape, &[Var], &Device) -> Result<Vec<Var>>>;

/// One op with inputs of its own.
pub(crate) struct Case {
    name: String,
    inputs: Vec<Tensor>,
    /// How many of the inputs, from the first, are activations: their gradients have their type.
    activations: usize,
    run: Run,
    /// Terms of the longest sum that makes one number.
    terms: usize,
    /// What else a device may round in bf16, relative to the length of a result: an intermediate
    /// that the CPU keeps in f32.
    stored: f64,
}

impl Case {
    fn new(
        name: impl Into<String>,
        inputs: Vec<Tensor>,
        activations: usize,
        terms: usize,
        run: impl Fn(&mut Tape, &[Var], &Device) -> Result<Vec<Var>> + 'static,
    ) -> Self {
        Case { name: name.into(), inputs, activations, run: Box::new(run), terms, stored: 0.0 }
    }

    fn stored(self, stored: f64) -> Self {
        Case { stored, ..self }
    }
}

/// Runs all cases on `device` and reports each; on the CPU it compares the CPU with itself.
pub fn selftest(device: &Device, each: &mut dyn FnMut(Row)) {
    for case in cases::all().into_iter().chain(attention::all()) {
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("{} · {device} {dtype}", case.name);
            each(Row::of("ops", name, |tally| compare(&case, device, dtype, tally)));
        }
    }
    optimizer::run(device, each);
    rules::run(device, each);
    groups::run(device, each);
    draws::run(device, each);
}

/// Numbers in `-1..1`, the same for the same seed.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A tensor of [`numbers`].
fn tensor(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::from_f32(numbers(shape.iter().product(), seed), shape)
}

/// Outputs, then gradients of the inputs.
type Results = Vec<(String, Vec<f32>)>;

/// Runs the op twice on the same inputs, with different weights for its outputs.
fn results(case: &Case, inputs: &[Tensor], device: &Device) -> Result<Results> {
    let mut tape = Tape::recording();
    let mut vars = Vec::new();
    for (i, x) in inputs.iter().enumerate() {
        let var = tape.param(x.to_device(device)?, i);
        // A value of the tape, rather than a parameter, takes its gradient in its own type.
        vars.push(if i < case.activations { ops::scale(&mut tape, &var, 1.0)? } else { var });
    }
    let first = (case.run)(&mut tape, &vars, device)?;
    let second = (case.run)(&mut tape, &vars, device)?;
    let mut found = Vec::new();
    for (i, y) in first.iter().enumerate() {
        found.push((format!("output {i}"), y.value().to_vec_f32()?));
    }
    let outputs: Vec<Var> = first.into_iter().chain(second).collect();
    let loss = weigh(&mut tape, &outputs, device)?;
    drop(outputs);
    drop(vars);
    let mut grads = Grads::new(inputs.len());
    tape.backward(&loss, &mut grads)?;
    for i in 0..inputs.len() {
        if let Some(gradient) = grads.get(i) {
            found.push((format!("gradient {i}"), gradient.to_vec_f32()?));
        }
    }
    Ok(found)
}

/// A scalar in which every element of every output has a weight of its own, which becomes its
/// gradient.
fn weigh(tape: &mut Tape, outputs: &[Var], device: &Device) -> Result<Var> {
    let mut weights = Vec::new();
    for (i, y) in outputs.iter().enumerate() {
        let weight = tensor(y.shape(), 900 + i as u64)?.to_dtype(y.dtype())?;
        weights.push((y.source(), weight.to_device(device)?));
    }
    let references: Vec<&Var> = outputs.iter().collect();
    tape.record(Tensor::scalar_on(device, 0.0)?, &references, move |_, walk| {
        weights.into_iter().try_for_each(|(to, weight)| walk.give(to, weight))
    })
}

/// Leaves NaN in memory that the next tensors will probably get.
fn poison(device: &Device) -> Result<()> {
    if let Device::Cuda(gpu) = device {
        for bytes in [64 << 20, 1 << 20, 64 << 10, 4096] {
            gpu.alloc(bytes)?.fill(0xff)?;
        }
    }
    Ok(())
}

fn compare(case: &Case, device: &Device, dtype: DType, tally: &mut Tally) -> Check<()> {
    let cast = |dtype| case.inputs.iter().map(|x| x.to_dtype(dtype)).collect::<Result<Vec<_>>>();
    let stored = cast(dtype).map_err(fault)?;
    let wide: Vec<Tensor> =
        stored.iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<_>>().map_err(fault)?;
    let exact = results(case, &wide, &Device::Cpu).map_err(fault)?;
    let plain = results(case, &stored, &Device::Cpu).map_err(fault)?;
    poison(device).map_err(fault)?;
    let got = results(case, &stored, device).map_err(fault)?;
    let again = results(case, &stored, device).map_err(fault)?;
    ensure(got.len() == exact.len(), || {
        format!("{} results, the CPU has {}", got.len(), exact.len())
    })?;
    let sums = (case.terms.max(1) as f64).sqrt();
    for (((name, got), (_, again)), ((_, exact), (_, plain))) in
        got.iter().zip(&again).zip(exact.iter().zip(&plain))
    {
        let size = length(exact.iter().map(|x| f64::from(*x)));
        let rounding = CHAIN * ROUNDING * sums * size;
        let allowed = match dtype {
            DType::BF16 => 2.0 * distance(plain, exact) + case.stored * size + rounding,
            _ => rounding,
        };
        tally.hold(name, distance(got, exact), allowed);
        let same = got.iter().zip(again).all(|(a, b)| a.to_bits() == b.to_bits());
        ensure(same, || format!("{name} has other bits when repeated"))?;
    }
    Ok(())
}

fn length(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// Euclidean; NaN when the lengths differ or either has one.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    length(a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)))
}

fn fault(error: crate::Error) -> Fault {
    Fault(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself() {
        let mut rows = Vec::new();
        selftest(&Device::Cpu, &mut |row| rows.push(row));
        assert!(rows.len() > 50, "{}", rows.len());
        let failed: Vec<String> = rows.iter().filter(|r| !r.pass).map(Row::to_string).collect();
        assert!(failed.is_empty(), "{failed:#?}");
    }

    #[test]
    fn a_wrong_result_fails() {
        let mut calls = 0;
        let inputs = vec![tensor(&[4, 8], 1).unwrap()];
        let case = Case::new("off", inputs, 1, 1, move |tape, x, _| {
            Ok(vec![ops::scale(tape, &x[0], 2.0)?])
        });
        let wrong = Case::new("off", case.inputs.clone(), 1, 1, |tape, x, _| {
            Ok(vec![ops::scale(tape, &x[0], 2.0001)?])
        });
        let good = results(&case, &case.inputs, &Device::Cpu).unwrap();
        let bad = results(&wrong, &case.inputs, &Device::Cpu).unwrap();
        for ((_, good), (_, bad)) in good.iter().zip(&bad) {
            let size = length(good.iter().map(|x| f64::from(*x)));
            assert!(distance(good, bad) > CHAIN * ROUNDING * size);
            calls += 1;
        }
        assert_eq!(calls, 2);
        assert!(distance(&[1.0], &[f32::NAN]).is_nan() && distance(&[1.0], &[]).is_nan());
    }
}
