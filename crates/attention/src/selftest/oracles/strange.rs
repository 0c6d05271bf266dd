//! Numbers that are no numbers, too large or too small, and inputs that do not fit.

use super::{bound, same_row, small};
use crate::Compressor;
use crate::selftest::{
    Case, Check, Fault, INPUTS, Storage, Tally, Way, check_same_choice, choice, dims, distance,
    ensure, largest_logit, output_bound, reference_chosen, same_bits,
};

/// Magnitudes from 1e-30 to 1e30, or what f16 holds, lose nothing but what their range does not
/// hold.
pub fn huge_and_tiny_magnitudes_stay_finite_and_right(way: &Way, tally: &mut Tally) -> Check<()> {
    let base = Case::random(&small(Compressor::Mean), dims(4, 2, 8, 8), &[150], 9);
    let magnitudes = match way.storage {
        Storage::F16 => [
            (1e3, 1e3, 1.0),
            (1.0, 1.0, 1e3),
            (1e-3, 1e-3, 1.0),
            (1e-3, 1.0, 1e-3),
            (30.0, 1.0, 1e3),
        ],
        _ => [
            (1e15, 1e15, 1.0),
            (1e3, 1e3, 1e30),
            (1e-20, 1e-20, 1.0),
            (1e-30, 1.0, 1e-30),
            (30.0, 1.0, 1e15),
        ],
    };
    for (q, k, v) in magnitudes {
        let mut case = base.clone().scaled("q", q);
        for branch in ["cmp", "slc", "win"] {
            case = case.scaled(&format!("k_{branch}"), k).scaled(&format!("v_{branch}"), v);
        }
        let case = way.stored(&case);
        let got = (way.run)(&case)?;
        let what = format!("q × {q:e}, k × {k:e}, v × {v:e}");
        for (name, x) in &got.tensors {
            let lost = x.iter().find(|x| x.is_nan() || (!name.contains("cmp") && x.is_infinite()));
            // Gradients of 1e15-sized keys and queries may leave the range of f32.
            let gradients = if way.storage == Storage::F16 { 1e3 } else { 1e10 };
            if let Some(lost) = lost.filter(|_| !name.starts_with("d_") || q * k < gradients) {
                return Err(Fault(format!("{what}: {name} holds {lost:?}")));
            }
        }
        let keys = got.get("compressed_k");
        let logit = largest_logit(&case, keys);
        let relative = output_bound(&case, logit, 150, way.unit.max(super::super::UNIT32));
        let exact = choice(&case, keys)?;
        // Scores as far off as exponentials of logits of that size may be; past 1 anything is.
        check_same_choice(&what, &case, keys, &exact, &got.indices, relative.min(1.0))?;
        if relative < 0.5 {
            let exact = reference_chosen(&case, &got.indices)?;
            let allowed = bound(way, &case, &got);
            tally.hold(&what, distance(got.get("out"), exact.get("out")), allowed);
        }
    }
    Ok(())
}

/// A NaN in a query reaches the outputs of its own group only.
pub fn a_nan_query_spoils_its_own_row_only(way: &Way, _: &mut Tally) -> Check<()> {
    let tokens = 120;
    let clean = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 8), &[50, 70], 10);
    let unspoilt = (way.run)(&clean)?;
    for t in [0, 20, 49, 50, 100] {
        let mut case = clean.clone();
        // Head 1, of KV head 0.
        case.get_mut("q")[(t * 6 + 1) * 8 + 3] = f32::NAN;
        let got = (way.run)(&case)?;
        let what = format!("NaN in q of token {t}");
        for u in (0..tokens).filter(|&u| u != t) {
            same_row(&what, (&unspoilt, u, tokens), (&got, u, tokens))?;
            for name in ["d_q", "d_gate"] {
                let same = same_bits(unspoilt.row(name, u, tokens), got.row(name, u, tokens));
                ensure(same, || format!("{what}: {name} of token {u}"))?;
            }
        }
        let out = got.row("out", t, tokens);
        let own = out[8..16].iter().all(|x| x.is_nan());
        ensure(own, || format!("{what}: its own output is {out:?}"))?;
        let other = &unspoilt.row("out", t, tokens)[24..];
        ensure(same_bits(&out[24..], other), || format!("{what}: the other KV head's output"))?;
        // Scores of NaN rank last and equal: the lowest blocks, still a valid choice.
        let c = (if t < 50 { t } else { t - 50 }) as i32 / 16;
        let mut want: Vec<i32> = (0..=c).filter(|&j| j < 2 || j >= c - 1).collect();
        want.resize(4, -1);
        let chosen = &got.indices[t * 8..t * 8 + 4];
        ensure(chosen == want, || format!("{what}: chose {chosen:?}, not {want:?}"))?;
    }
    Ok(())
}

/// A NaN in a key or value stays in its KV head, its sequence, and the tokens that may see it.
pub fn a_nan_key_or_value_reaches_no_earlier_token_and_no_other_sequence(
    way: &Way,
    _: &mut Tally,
) -> Check<()> {
    let tokens = 150;
    let clean = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 8), &[30, 100, 20], 11);
    let clean = clean.forward_only();
    for name in ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"] {
        // Compared with a NaN that only the last token sees: a way may compute otherwise, and round
        // otherwise, where some number is none.
        let mut late = clean.clone();
        late.get_mut(name)[((tokens - 1) * 2 + 1) * 8] = f32::NAN;
        let unspoilt = (way.run)(&late)?;
        for t in [30, 37, 45, 62, 129] {
            let mut case = clean.clone();
            case.get_mut(name)[(t * 2 + 1) * 8] = f32::NAN;
            let got = (way.run)(&case)?;
            let what = format!("NaN in {name} of token {t}");
            for u in (0..t).chain(130..tokens - 1) {
                same_row(&what, (&unspoilt, u, tokens), (&got, u, tokens))?;
            }
            let own = got.row("out", t, tokens);
            let reached = name.ends_with("cmp") || own[24..].iter().any(|x| x.is_nan());
            ensure(reached, || format!("{what}: its own row"))?;
            // The first KV head never sees it.
            for u in 0..tokens {
                let (a, b) = (unspoilt.row("out", u, tokens), got.row("out", u, tokens));
                let same = same_bits(&a[..24], &b[..24]);
                ensure(same, || format!("{what}: KV head 0 of token {u}"))?;
            }
        }
    }
    Ok(())
}

/// Tensors of a wrong length, offsets and specs that break a rule: an error, not an answer.
pub fn inputs_that_lie_are_refused(way: &Way, _: &mut Tally) -> Check<()> {
    let good =
        Case::random(&small(Compressor::Linear), dims(4, 2, 8, 6), &[20, 30], 70).forward_only();
    (way.run)(&good)?;
    let refuse = |what: String, case: &Case| match (way.run)(case) {
        Ok(_) => Err(Fault(format!("{what} was not refused"))),
        Err(_) => Ok(()),
    };
    for name in INPUTS.into_iter().chain(["phi_k_weight", "phi_k_pe", "phi_v_weight"]) {
        let mut short = good.clone();
        short.get_mut(name).pop();
        refuse(format!("{name} one number short"), &short)?;
        let mut long = good.clone();
        long.get_mut(name).push(0.0);
        refuse(format!("{name} one number long"), &long)?;
    }
    for cu_seqlens in [vec![0, 30, 20, 50], vec![1, 50], vec![0, 49], vec![0, 51]] {
        let lying = Case { cu_seqlens, ..good.clone() };
        refuse(format!("cu_seqlens {:?}", lying.cu_seqlens), &lying)?;
    }
    for numbers in [[8, 3, 16, 4, 12], [8, 4, 16, 2, 12], [8, 4, 16, 4, 0], [32, 4, 16, 4, 12]] {
        let broken = Case { spec: super::spec(numbers, Compressor::Linear), ..good.clone() };
        refuse(format!("a spec of {numbers:?}"), &broken)?;
    }
    Ok(())
}
