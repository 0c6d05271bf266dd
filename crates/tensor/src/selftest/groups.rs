//! Gradients kept apart by groups of rows, and their sums where they are.

use std::ops::Range;

use tercet_attention::selftest::{Check, Row, ensure};

use super::{ROUNDING, fault, numbers, tensor};
use crate::{DType, Device, Grads, GroupSum, Result, Tape, Tensor, ops};

/// Groups of one row, of more than one run of a kernel's sum, and of none that is a round number.
const ENDS: [usize; 6] = [1, 2, 131, 400, 401, 700];

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Row)) {
    let mut row = |name: &str, check: fn(&Device) -> Result<Check<()>>| {
        let name = format!("{name} · {device}");
        each(Row::of("ops", name, |_| check(device).map_err(fault)?));
    };
    row("gradients by group of rows", by_group);
    row("losses of tokens and their sum", losses);
    row("sums of groups are exact", sums);
}

fn groups() -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(ENDS);
    starts.zip(ENDS).map(|(start, end)| start..end).collect()
}

/// Narrow weights either way round, one that is neither, in one launch or many.
fn by_group(device: &Device) -> Result<Check<()>> {
    let rows = ENDS[5];
    for [outer, inner] in [[8, 300], [200, 8], [9, 33], [72, 80]] {
        for dtype in [DType::F32, DType::BF16] {
            let run = |device: &Device| -> Result<Vec<f32>> {
                let put = |shape: &[usize], seed| tensor(shape, seed)?.to_dtype(dtype);
                let (x, w) = (put(&[rows, inner], 1)?, put(&[outer, inner], 2)?);
                let seed = put(&[rows, outer], 3)?;
                let mut grads = Grads::by_group(1, groups())?;
                // Twice: the second is added to the first.
                for _ in 0..2 {
                    let mut tape = Tape::recording();
                    let x = tape.leaf(x.to_device(device)?);
                    let w = tape.param(w.to_device(device)?, 0);
                    let y = ops::linear(&mut tape, &x, &w, None)?;
                    tape.backward_from(&[(&y, seed.clone())], &mut grads)?;
                }
                grads.get(0).map_or(Ok(Vec::new()), Tensor::to_vec_f32)
            };
            let (here, there) = (run(&Device::Cpu)?, run(device)?);
            // Products below 1, at most 299 of them, added twice, in two orders.
            let most = 2.0 * 2.0 * 299.0 * 299.0 * ROUNDING;
            let off = here.iter().zip(&there).map(|(a, b)| f64::from((a - b).abs()));
            let off = off.fold(0.0, f64::max);
            let whole = here.len() == ENDS.len() * outer * inner && there.len() == here.len();
            if !(whole && off <= most) {
                let text = format!("[{outer}, {inner}] {dtype}: off by {off:e}, at most {most:e}");
                return Ok(ensure(false, || text));
            }
            if run(device)?.iter().map(|x| x.to_bits()).ne(there.iter().map(|x| x.to_bits())) {
                return Ok(ensure(false, || format!("[{outer}, {inner}] {dtype}: other bits")));
            }
        }
    }
    Ok(Ok(()))
}

fn losses(device: &Device) -> Result<Check<()>> {
    let run = |device: &Device| -> Result<(f32, Vec<f32>, Vec<f32>)> {
        let targets = (0..300).map(|t| if t % 7 == 0 { -100 } else { t * 3 % 90 }).collect();
        let targets = Tensor::from_i32(targets, &[300])?.to_device(device)?;
        let mut tape = Tape::recording();
        let x = tape.param(tensor(&[300, 16], 1)?.to_device(device)?, 0);
        let w = tape.leaf(tensor(&[90, 16], 2)?.to_device(device)?);
        let (sum, each) = ops::linear_cross_entropy_sum(&mut tape, &x, &w, &targets)?;
        let mut grads = Grads::new(1);
        tape.backward(&sum, &mut grads)?;
        let gradient = grads.get(0).map_or(Ok(Vec::new()), Tensor::to_vec_f32)?;
        Ok((sum.value().item()?, each.to_vec_f32()?, gradient))
    };
    let ((sum, each, d_x), (there, each_there, d_x_there)) = (run(&Device::Cpu)?, run(device)?);
    let close = |a: &[f32], b: &[f32]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-4)
    };
    let total: f64 = each_there.iter().map(|&loss| f64::from(loss)).sum();
    let fine = close(&each, &each_there) && close(&d_x, &d_x_there) && close(&[sum], &[there]);
    Ok(ensure(fine && (total - f64::from(there)).abs() < 1e-3, || "other than on the CPU".into()))
}

fn sums(device: &Device) -> Result<Check<()>> {
    if *device == Device::Cpu {
        return Ok(Ok(()));
    }
    let (sizes, groups) = ([5000, 3, 4096, 9000], 6);
    let mut host: Vec<Vec<f32>> = Vec::new();
    for (slot, &size) in sizes.iter().enumerate() {
        // One more group than is asked for, and one of no numbers that weighs nothing.
        let mut values = numbers((groups + 1) * size, slot as u64);
        values.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi((i % 17) as i32 - 8));
        values[2 * size..3 * size].fill(f32::NAN);
        host.push(values);
    }
    let put = |(values, &size): (&Vec<f32>, &usize)| {
        Tensor::from_f32(values.clone(), &[groups + 1, size])?.to_device(device)
    };
    let tensors = host.iter().zip(&sizes).map(put).collect::<Result<Vec<_>>>()?;
    let gradients: Vec<&Tensor> = tensors.iter().collect();
    let mut sum = GroupSum::new(device, &sizes)?;
    let squares = sum.squares(&gradients, groups)?;
    let mut weights = Vec::new();
    for group in 0..groups {
        for (slot, &size) in sizes.iter().enumerate() {
            let own = &host[slot][group * size..(group + 1) * size];
            let want: f64 = own.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let got = squares[group * sizes.len() + slot];
            // At most 9000 additions in f64 either way.
            if group != 2 && (got / want - 1.0).abs() > 9000.0 * f64::EPSILON {
                return Ok(ensure(false, || format!("squares {got:e}, expected {want:e}")));
            }
            weights.push(if group == 2 { 0.0 } else { 2f64.powi(80) / want.sqrt() });
        }
    }
    sum.add(&gradients, &weights)?;
    sum.add(&gradients, &weights)?;
    let found = sum.take()?;
    for (slot, &size) in sizes.iter().enumerate() {
        for at in 0..size {
            let part = |group: usize| {
                let weight = weights[group * sizes.len() + slot];
                let x = f64::from(host[slot][group * size + at]);
                if weight == 0.0 { 0 } else { (x * weight).round_ties_even() as i128 }
            };
            let want = 2 * (0..groups).map(part).sum::<i128>();
            if found[slot][at] != want {
                let got = found[slot][at];
                return Ok(ensure(false, || format!("slot {slot}, {at}: {got} for {want}")));
            }
        }
    }
    let empty = sum.take()?.iter().flatten().all(|&x| x == 0);
    Ok(ensure(empty, || "a sum that was taken is not empty".into()))
}
