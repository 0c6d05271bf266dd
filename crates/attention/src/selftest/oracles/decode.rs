//! Decoding over a cache gives what prefill gives.

use super::{COMPRESSORS, small};
use crate::Compressor;
use crate::selftest::{
    Case, Check, Tally, Way, dims, distance, ensure, largest_logit, output_bound, spec,
};

/// Ways to cut `tokens`: all at once, ever larger chunks, single tokens, a prompt then tokens.
pub fn cuts(tokens: usize) -> Vec<Vec<usize>> {
    let mut growing = Vec::new();
    while growing.iter().sum::<usize>() < tokens {
        let left = tokens - growing.iter().sum::<usize>();
        growing.push((growing.len() * 5 + 1).min(left));
    }
    let mut prompt = vec![tokens / 2, 0];
    prompt.extend(std::iter::repeat_n(1, tokens - tokens / 2));
    vec![vec![tokens], growing, vec![1; tokens], prompt]
}

/// Twice the bound on one computation's error, for the largest |value| of the case.
pub fn decode_bound(way: &Way, case: &Case, compressed_k: &[f64]) -> f64 {
    let value = ["v_cmp", "v_slc", "v_win"].iter().flat_map(|name| case.get(name));
    let phi = if case.spec.compressor == Compressor::Mean { 1.0 } else { 4.0 };
    let value = phi * f64::from(value.fold(0.0f32, |m, x| m.max(x.abs())));
    let logit = largest_logit(case, compressed_k);
    6.0 * value * (output_bound(case, logit, case.tokens(), way.unit) + way.storage.unit())
}

/// The same choice of blocks, bit for bit, and the same output to rounding, however the tokens are
/// cut into chunks. Holds where a way cannot decode.
pub fn decode_equals_prefill(way: &Way, tally: &mut Tally) -> Check<()> {
    let mut cases: Vec<Case> = COMPRESSORS
        .iter()
        .map(|&phi| Case::random(&small(phi), dims(6, 2, 24, 12), &[150], 20))
        .collect();
    for n in [0, 1, 7, 8, 9] {
        cases.push(Case::random(&small(Compressor::Linear), dims(4, 2, 8, 8), &[n], 22));
    }
    for (spec, d) in [
        (spec([32, 16, 64, 5, 40], Compressor::Mean), dims(15, 1, 19, 33)),
        (spec([16, 16, 16, 3, 1], Compressor::Mean), dims(3, 3, 8, 1)),
        (spec([4, 1, 7, 3, 5], Compressor::Mean), dims(64, 1, 5, 7)),
        (spec([6, 2, 6, 4, 400], Compressor::Linear), dims(8, 4, 16, 16)),
    ] {
        cases.push(Case::random(&spec, d, &[230], 21));
    }
    for case in cases {
        decodes(way, tally, &way.stored(&case.forward_only()))?;
    }
    Ok(())
}

fn decodes(way: &Way, tally: &mut Tally, case: &Case) -> Check<()> {
    let Some(decode) = &way.decode else { return Ok(()) };
    let whole = (way.run)(case)?;
    let allowed = decode_bound(way, case, whole.get("compressed_k"));
    for cut in cuts(case.tokens()) {
        let (out, indices) = decode(case, &cut)?;
        let what = format!("{:?} {:?} in {} chunks", case.spec, case.dims, cut.len());
        let at = indices.iter().zip(&whole.indices).position(|(a, b)| a != b);
        let same = at.is_none() && indices.len() == whole.indices.len();
        ensure(same, || format!("{what}: first index that differs is {at:?}"))?;
        tally.hold(&what, distance(&out, whole.get("out")), allowed);
    }
    Ok(())
}
