//! Tokens drawn on a device are those that the CPU finds.

use tercet_attention::selftest::{Check, Row, ensure};

use super::{fault, numbers};
use crate::{Device, Draw, Drawn, Draws, Result, Tensor, exp_quantile, log_sum_exp};

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Row)) {
    let Device::Cuda(_) = device else { return };
    for vocab in [1, 33, 1024, 5000, 65_536, 151_937] {
        let name = format!("draws from {vocab} · {device}");
        each(Row::of("ops", name, |_| draws(device, vocab).map_err(fault)?));
    }
}

/// The highest logit and the first place of it.
fn highest(logits: &[f32]) -> (f32, usize) {
    let first =
        |best: (f32, usize), (at, &x): (usize, &f32)| if x > best.0 { (x, at) } else { best };
    logits.iter().enumerate().fold((f32::NEG_INFINITY, 0), first)
}

/// Places in the middle of what a token takes of the distribution, so that no rounding decides; rows
/// that are not numbers; a row among others and by itself.
fn draws(device: &Device, vocab: usize) -> Result<Check<()>> {
    let Device::Cuda(gpu) = device else { return Ok(Ok(())) };
    let temperatures = [1.0, 0.0, 0.3, 2.5, 1.0, 0.7];
    let rows = temperatures.len() + 3;
    let mut host = numbers(rows * vocab, 5);
    let (mut asks, mut wanted) = (Vec::new(), Vec::new());
    for (row, logits) in host.chunks_exact_mut(vocab).enumerate() {
        logits.iter_mut().for_each(|x| *x *= 6.0);
        logits[..vocab / 3].fill(f32::NEG_INFINITY);
        // Equals of which the first counts.
        let (most, _) = highest(logits);
        logits[vocab - 1] = most;
        let Some(&temperature) = temperatures.get(row) else {
            match row - temperatures.len() {
                0 => logits[vocab / 2] = f32::NAN,
                1 => logits[vocab / 2] = f32::INFINITY,
                _ => logits.fill(f32::NEG_INFINITY),
            }
            asks.push(Some(Draw { temperature: 1.0, at: 0.5 }));
            wanted.push(None);
            continue;
        };
        let weigh = |x: f32| (f64::from(x - most) / f64::from(temperature)).exp();
        let total: f64 = logits.iter().map(|&x| weigh(x)).sum();
        // The heaviest token after one that differs from row to row.
        let from = vocab * row / rows;
        let (_, place) = highest(&logits[from..]);
        let token = from + place;
        let before: f64 = logits[..token].iter().map(|&x| weigh(x)).sum();
        let at =
            if temperature == 0.0 { 0.9 } else { (before + weigh(logits[token]) / 2.0) / total };
        let token = match temperature {
            0.0 => highest(logits).1,
            _ => exp_quantile(logits, most, 1.0 / temperature, at).unwrap_or(usize::MAX),
        };
        asks.push(Some(Draw { temperature, at }));
        wanted.push(Some((token, f64::from(logits[token]) - log_sum_exp(logits))));
    }
    asks[4] = None;
    wanted[4] = None;
    let put = |host: &[f32]| {
        Tensor::from_f32(host.to_vec(), &[host.len() / vocab, vocab])?.to_device(device)
    };
    let mut many = Draws::new(gpu, rows, vocab)?;
    let got = many.run(&put(&host)?, &asks)?;
    let mut one = Draws::new(gpu, 1, vocab)?;
    for (row, (got, want)) in got.iter().zip(&wanted).enumerate() {
        let fine = match (got, want) {
            (None, None) => asks[row].is_none(),
            (Some(Drawn { token: None, .. }), None) => row >= temperatures.len(),
            // Both sums are within 1e-6 of theirs, and the result is rounded to f32.
            (Some(Drawn { token: Some(token), log_prob }), Some((want, exact))) => {
                *token as usize == *want
                    && (f64::from(*log_prob) - exact).abs() <= 2e-6 + 1e-6 * exact.abs()
            }
            _ => false,
        };
        if !fine {
            let text = format!("row {row}: {got:?}, expected {want:?} for {:?}", asks[row]);
            return Ok(ensure(false, || text));
        }
        let alone = one.run(&put(&host[row * vocab..][..vocab])?, &asks[row..=row])?;
        let bits = |drawn: &Option<Drawn>| drawn.map(|own| (own.token, own.log_prob.to_bits()));
        if bits(&alone[0]) != bits(got) {
            return Ok(ensure(false, || format!("row {row}: other bits alone")));
        }
    }
    // Nearly 1, as a uniform number may be: the last token that weighs anything.
    let logits = put(&host[..vocab])?;
    let last = one.run(&logits, &[Some(Draw { temperature: 1.0, at: 1.0 - 1e-16 })])?;
    let end = last[0].and_then(|drawn| drawn.token);
    Ok(ensure(end == Some(vocab as u32 - 1), || format!("at the end: {end:?}")))
}
