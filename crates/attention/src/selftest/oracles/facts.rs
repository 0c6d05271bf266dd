//! What the branches must equal, and which blocks must be chosen.

use super::{COMPRESSORS, bound, small};
use crate::cpu::Mask;
use crate::selftest::{Case, Check, Tally, Way, dims, distance, ensure, largest, spec};
use crate::{Compressor, NsaSpec};

/// While p < n·l', everything is selected: there the selected branch is causal attention.
pub fn selected_branch_equals_dense_while_every_block_fits(
    way: &Way,
    tally: &mut Tally,
) -> Check<()> {
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 12), &[100], 1);
    let case = way.stored(&case.forward_only());
    let got = (way.run)(&case)?;
    let dense = (way.attend)(&case, "slc", Mask::Causal)?;
    let allowed = 2.0 * bound(way, &case, &got);
    for t in 0..64 {
        for (slc, whole) in [("out_slc", "out"), ("lse_slc", "lse")] {
            let error = distance(got.row(slc, t, 100), dense.row(whole, t, 100));
            tally.hold(slc, error, allowed);
        }
    }
    let error = distance(got.row("out_slc", 99, 100), dense.row("out", 99, 100));
    ensure(error > allowed, || "token 99 should not see everything".into())
}

/// A window that reaches back to the start is no window.
pub fn a_window_as_long_as_the_sequence_equals_dense(way: &Way, tally: &mut Tally) -> Check<()> {
    let spec = NsaSpec { window: 50, ..small(Compressor::Mean) };
    let case = Case::random(&spec, dims(4, 2, 16, 8), &[50], 2).forward_only();
    let case = way.stored(&case);
    let got = (way.run)(&case)?;
    let allowed = 2.0 * bound(way, &case, &got);
    for mask in [Mask::Causal, Mask::Window(50), Mask::Window(usize::MAX)] {
        let other = (way.attend)(&case, "win", mask)?;
        tally.hold("out_win", distance(got.get("out_win"), other.get("out")), allowed);
        tally.hold("lse_win", distance(got.get("lse_win"), other.get("lse")), allowed);
    }
    Ok(())
}

/// A token whose window is itself reads its own value.
pub fn a_window_of_one_reads_its_own_value(way: &Way, tally: &mut Tally) -> Check<()> {
    let spec = NsaSpec { window: 1, ..small(Compressor::Mean) };
    let case = Case::random(&spec, dims(4, 2, 16, 8), &[20, 3], 3).forward_only();
    let case = way.stored(&case);
    let got = (way.run)(&case)?;
    for (i, out) in got.get("out_win").chunks(8).enumerate() {
        let (t, h) = (i / 4, i % 4);
        let own = &case.get("v_win")[(t * 2 + h / 2) * 8..][..8];
        let own: Vec<f64> = own.iter().map(|&x| f64::from(x)).collect();
        // Its probability is exp(0) / exp(0), each a few roundings from 1.
        tally.hold("out_win", distance(out, &own), 8.0 * way.unit * largest(&own));
    }
    Ok(())
}

/// Lengths 0, 1, l − 1, l, l + 1: tokens without a compressed block give 0 and −∞, no gradient.
pub fn sequences_around_a_block_in_length(way: &Way, _: &mut Tally) -> Check<()> {
    for compressor in COMPRESSORS {
        for n in [0, 1, 7, 8, 9] {
            let case = Case::random(&small(compressor), dims(4, 2, 8, 5), &[n], 6);
            let got = (way.run)(&case)?;
            let sized = got.get("out").len() == n * 20 && got.get("d_q").len() == n * 32;
            ensure(sized, || format!("outputs of {n} tokens"))?;
            for t in 0..n.min(7) {
                let none = got.row("lse_cmp", t, n).iter().all(|&x| x == f64::NEG_INFINITY)
                    && got.row("out_cmp", t, n).iter().all(|&x| x == 0.0);
                ensure(none, || format!("token {t} of {n} sees no compressed block"))?;
            }
            let zero = |name: &str| got.get(name).iter().all(|&x| x == 0.0);
            let silent = n >= 8 || (zero("d_k_cmp") && zero("d_v_cmp"));
            ensure(silent, || format!("gradients of {n} tokens"))?;
            for (name, x) in got.tensors.iter().filter(|(name, _)| !name.starts_with("lse")) {
                ensure(x.iter().all(|x| x.is_finite()), || format!("{name} of {n} tokens"))?;
            }
        }
    }
    Ok(())
}

/// All compressed keys alike: every free block scores the same and the lowest indices win.
pub fn equal_keys_choose_the_lower_blocks(way: &Way, _: &mut Tally) -> Check<()> {
    let spec = NsaSpec { select_count: 6, ..small(Compressor::Mean) };
    let mut case = Case::random(&spec, dims(6, 2, 8, 8), &[300], 7).forward_only();
    for t in 1..300 {
        let keys = case.get_mut("k_cmp");
        let (first, rest) = keys.split_at_mut(16);
        rest[(t - 1) * 16..t * 16].copy_from_slice(first);
    }
    let got = (way.run)(&case)?;
    for (i, row) in got.indices.chunks(6).enumerate() {
        let c = (i / 2 / 16) as i32;
        let mut want: Vec<i32> = (0..=c).filter(|&j| j < 4 || j >= c - 1).collect();
        want.resize(6, -1);
        ensure(row == want, || format!("token {}: {row:?}, not {want:?}", i / 2))?;
    }
    Ok(())
}

/// Among equals the highest gives way.
pub fn a_better_block_that_comes_later_displaces_the_highest_of_equals(
    way: &Way,
    _: &mut Tally,
) -> Check<()> {
    let spec = spec([4, 4, 16, 6, 12], Compressor::Mean);
    let mut case = Case::random(&spec, dims(2, 1, 8, 8), &[300], 15).forward_only();
    case.get_mut("q").fill(1.0);
    case.get_mut("k_cmp").fill(0.25);
    case.get_mut("k_cmp")[160 * 8..176 * 8].fill(0.5);
    let got = (way.run)(&case)?;
    for (t, row) in got.indices.chunks(6).enumerate().skip(12 * 16) {
        let c = (t / 16) as i32;
        let want = [0, 1, 2, 10, c - 1, c];
        ensure(row == want, || format!("token {t}: {row:?}, not {want:?}"))?;
    }
    Ok(())
}

/// Tokens 83..=88 answer the query with a logit of about 30: their block must be chosen.
pub fn one_heavy_block_is_found(way: &Way, _: &mut Tally) -> Check<()> {
    let spec = spec([4, 4, 16, 4, 12], Compressor::Mean);
    let mut case = Case::random(&spec, dims(2, 1, 8, 8), &[200], 8).forward_only();
    case.get_mut("q").iter_mut().for_each(|x| *x = 1.0);
    case.get_mut("k_cmp")[80 * 8..96 * 8].iter_mut().for_each(|x| *x = 10.0);
    let got = (way.run)(&case)?;
    for (t, row) in got.indices.chunks(4).enumerate().skip(112) {
        ensure(row.contains(&5), || format!("token {t}: {row:?}"))?;
    }
    Ok(())
}
