//! Facts that hold whatever the numbers: each is asked of the reference and of the fast code, in
//! f32 and bf16.

mod common;

use common::{
    Case, Outcome, UNIT32, WAYS, Way, assert_same_bits, assert_same_choice, dims, distance,
    largest, largest_logit, output_bound, reference_chosen, same_bits, spec,
};
use tercet_attention::cpu::Mask;
use tercet_attention::{Compressor, NsaSpec};

const NUMBERS: [usize; 5] = [8, 4, 16, 4, 12];

fn small(compressor: Compressor) -> NsaSpec {
    spec(NUMBERS, compressor)
}

/// Outputs with one row a token.
const ROWS: [&str; 7] = ["out", "out_cmp", "out_slc", "out_win", "lse_cmp", "lse_slc", "lse_win"];

/// Asserts that row `t` of `a` and row `u` of `b` hold the same bits, outputs and choice.
fn assert_same_row(what: &str, a: (&Outcome, usize, usize), b: (&Outcome, usize, usize)) {
    for name in ROWS {
        let (x, y) = (a.0.row(name, a.1, a.2), b.0.row(name, b.1, b.2));
        assert!(same_bits(x, y), "{what}: {name} of rows {} and {}: {x:?} {y:?}", a.1, b.1);
    }
    let width = a.0.indices.len() / a.2;
    let row = |o: &Outcome, t: usize| o.indices[t * width..(t + 1) * width].to_vec();
    assert_eq!(row(a.0, a.1), row(b.0, b.1), "{what}: indices of rows {} and {}", a.1, b.1);
}

/// A bound on the error of an output of `way` for `case`, absolute; see `output_bound`.
fn bound(way: &Way, case: &Case, got: &Outcome) -> f64 {
    let logit = largest_logit(case, got.get("compressed_k"));
    let value = |name: &str| case.get(name).iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let value = f64::from(value("v_slc").max(value("v_win")))
        .max(got.get("compressed_v").iter().fold(0.0, |m: f64, x| m.max(x.abs())));
    // Up to three branches of gate at most 1; the storage rounds once.
    3.0 * value * (output_bound(case, logit, case.tokens(), way.unit) + way.storage_unit)
}

#[test]
fn selected_branch_equals_dense_while_every_block_fits() {
    // p < n·l' = 64 selects everything: there the selected branch is causal attention.
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 12), &[100], 1);
    let case = case.forward_only();
    for way in &WAYS {
        let case = way.stored(&case);
        let got = (way.run)(&case);
        let dense = (way.attend)(&case, "slc", Mask::Causal);
        let allowed = 2.0 * bound(way, &case, &got);
        for t in 0..64 {
            let (out, lse) = (got.row("out_slc", t, 100), got.row("lse_slc", t, 100));
            let error = distance(out, dense.row("out", t, 100));
            assert!(error <= allowed, "{} token {t}: {error:e} > {allowed:e}", way.name);
            let error = distance(lse, dense.row("lse", t, 100));
            assert!(error <= allowed, "{} token {t} lse: {error:e} > {allowed:e}", way.name);
        }
        let sparse = got.row("out_slc", 99, 100);
        let error = distance(sparse, dense.row("out", 99, 100));
        assert!(error > allowed, "{}: token 99 should not see everything", way.name);
    }
}

#[test]
fn a_window_as_long_as_the_sequence_equals_dense() {
    let spec = NsaSpec { window: 50, ..small(Compressor::Mean) };
    let case = Case::random(&spec, dims(4, 2, 16, 8), &[50], 2).forward_only();
    for way in &WAYS {
        let case = way.stored(&case);
        let got = (way.run)(&case);
        let dense = (way.attend)(&case, "win", Mask::Causal);
        let window = (way.attend)(&case, "win", Mask::Window(50));
        let wider = (way.attend)(&case, "win", Mask::Window(usize::MAX));
        let allowed = 2.0 * bound(way, &case, &got);
        for other in [&dense, &window, &wider] {
            assert!(distance(got.get("out_win"), other.get("out")) <= allowed, "{}", way.name);
            assert!(distance(got.get("lse_win"), other.get("lse")) <= allowed, "{}", way.name);
        }
    }
}

#[test]
fn a_window_of_one_reads_its_own_value() {
    let spec = NsaSpec { window: 1, ..small(Compressor::Mean) };
    let case = Case::random(&spec, dims(4, 2, 16, 8), &[20, 3], 3).forward_only();
    for way in &WAYS {
        let case = way.stored(&case);
        let got = (way.run)(&case);
        for (i, out) in got.get("out_win").chunks(8).enumerate() {
            let (t, h) = (i / 4, i % 4);
            let own = &case.get("v_win")[(t * 2 + h / 2) * 8..][..8];
            let own: Vec<f64> = own.iter().map(|&x| f64::from(x)).collect();
            // Its probability is exp(0) / exp(0), each a few roundings from 1.
            let allowed = 8.0 * way.unit * largest(&own);
            assert!(distance(out, &own) <= allowed, "{} token {t} head {h}", way.name);
        }
    }
}

#[test]
fn later_tokens_change_no_earlier_bit() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        let case = Case::random(&small(compressor), dims(6, 2, 8, 12), &[150], 4).forward_only();
        for way in &WAYS {
            let whole = (way.run)(&case);
            for n in [1, 7, 8, 15, 16, 17, 63, 64, 65, 97, 149] {
                let prefix = (way.run)(&case.rows(0, n));
                for t in 0..n {
                    let what = format!("{} prefix of {n}", way.name);
                    assert_same_row(&what, (&whole, t, 150), (&prefix, t, n));
                }
            }
        }
    }
}

#[test]
fn sequences_together_equal_each_alone() {
    let lengths = [0, 1, 7, 8, 9, 0, 33, 64, 130, 0];
    let tokens: usize = lengths.iter().sum();
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 12), &lengths, 5);
    for way in &WAYS {
        let together = (way.run)(&case);
        let mut start = 0;
        for (b, &n) in lengths.iter().enumerate() {
            let alone = (way.run)(&case.sequence(b));
            for t in 0..n {
                let what = format!("{} sequence {b} of {n} tokens", way.name);
                assert_same_row(&what, (&together, start + t, tokens), (&alone, t, n));
                for (name, x) in alone.tensors.iter().filter(|(name, _)| name.starts_with("d_")) {
                    let width = x.len() / n;
                    let x = &x[t * width..(t + 1) * width];
                    let y = together.row(name, start + t, tokens);
                    assert!(same_bits(x, y), "{what}: {name} of token {t}: {x:?} {y:?}");
                }
            }
            start += n;
        }
    }
}

#[test]
fn sequences_around_a_block_in_length() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        // l = 8: lengths 0, 1, l − 1, l, l + 1.
        for n in [0, 1, 7, 8, 9] {
            let case = Case::random(&small(compressor), dims(4, 2, 8, 5), &[n], 6);
            for way in &WAYS {
                let got = (way.run)(&case);
                assert_eq!(got.get("out").len(), n * 20);
                assert_eq!(got.get("d_q").len(), n * 32);
                for t in 0..n.min(7) {
                    let what = format!("{}: token {t} of {n} sees no compressed block", way.name);
                    let lse = got.row("lse_cmp", t, n);
                    assert!(lse.iter().all(|&x| x == f64::NEG_INFINITY), "{what}");
                    assert!(got.row("out_cmp", t, n).iter().all(|&x| x == 0.0), "{what}");
                }
                if n < 8 {
                    let zero = |name: &str| got.get(name).iter().all(|&x| x == 0.0);
                    assert!(zero("d_k_cmp") && zero("d_v_cmp"), "{}: gradients of {n}", way.name);
                }
                for (name, x) in got.tensors.iter().filter(|(name, _)| !name.starts_with("lse")) {
                    assert!(x.iter().all(|x| x.is_finite()), "{} {name} of {n}", way.name);
                }
            }
        }
    }
}

#[test]
fn equal_keys_choose_the_lower_blocks() {
    // All compressed keys alike: every free block scores the same and the lowest indices win.
    let spec = NsaSpec { select_count: 6, ..small(Compressor::Mean) };
    let mut case = Case::random(&spec, dims(6, 2, 8, 8), &[300], 7).forward_only();
    for t in 1..300 {
        let keys = case.get_mut("k_cmp");
        let (first, rest) = keys.split_at_mut(16);
        rest[(t - 1) * 16..t * 16].copy_from_slice(first);
    }
    for way in &WAYS {
        let got = (way.run)(&case);
        for (i, row) in got.indices.chunks(6).enumerate() {
            let c = (i / 2 / 16) as i32;
            let mut want: Vec<i32> = (0..=c).filter(|&j| j < 4 || j >= c - 1).collect();
            want.resize(6, -1);
            assert_eq!(row, want, "{} token {}", way.name, i / 2);
        }
    }
}

#[test]
fn a_better_block_that_comes_later_displaces_the_highest_of_equals() {
    let mut case =
        Case::random(&spec([4, 4, 16, 6, 12], Compressor::Mean), dims(2, 1, 8, 8), &[300], 15);
    case = case.forward_only();
    case.get_mut("q").fill(1.0);
    case.get_mut("k_cmp").fill(0.25);
    case.get_mut("k_cmp")[160 * 8..176 * 8].fill(0.5);
    for way in &WAYS {
        let got = (way.run)(&case);
        for (t, row) in got.indices.chunks(6).enumerate().skip(12 * 16) {
            let c = (t / 16) as i32;
            assert_eq!(row, [0, 1, 2, 10, c - 1, c], "{} token {t}", way.name);
        }
    }
}

#[test]
fn one_heavy_block_is_found() {
    // Tokens 83..=88 answer the query with a logit of about 30: their block must be chosen.
    let spec = spec([4, 4, 16, 4, 12], Compressor::Mean);
    let mut case = Case::random(&spec, dims(2, 1, 8, 8), &[200], 8).forward_only();
    case.get_mut("q").iter_mut().for_each(|x| *x = 1.0);
    case.get_mut("k_cmp")[80 * 8..96 * 8].iter_mut().for_each(|x| *x = 10.0);
    for way in &WAYS {
        let got = (way.run)(&case);
        for (t, row) in got.indices.chunks(4).enumerate().skip(112) {
            assert!(row.contains(&5), "{} token {t}: {row:?}", way.name);
        }
    }
}

#[test]
fn huge_and_tiny_magnitudes_stay_finite_and_right() {
    let base = Case::random(&small(Compressor::Mean), dims(4, 2, 8, 8), &[150], 9);
    for (q, k, v) in [
        (1e15, 1e15, 1.0),
        (1e3, 1e3, 1e30),
        (1e-20, 1e-20, 1.0),
        (1e-30, 1.0, 1e-30),
        (30.0, 1.0, 1e15),
    ] {
        let mut case = base.clone().scaled("q", q);
        for branch in ["cmp", "slc", "win"] {
            case = case.scaled(&format!("k_{branch}"), k).scaled(&format!("v_{branch}"), v);
        }
        for way in &WAYS {
            let case = way.stored(&case);
            let got = (way.run)(&case);
            let what = format!("{} q × {q:e}, k × {k:e}, v × {v:e}", way.name);
            for (name, x) in &got.tensors {
                let lost =
                    x.iter().find(|x| x.is_nan() || (!name.contains("cmp") && x.is_infinite()));
                // Gradients of 1e15-sized keys and queries may leave the range of f32.
                if !name.starts_with("d_") || q * k < 1e10 {
                    assert!(lost.is_none(), "{what}: {name} holds {lost:?}");
                }
            }
            let keys = got.get("compressed_k");
            let logit = largest_logit(&case, keys);
            let relative = output_bound(&case, logit, 150, UNIT32);
            let exact = common::choice(&case, keys);
            // Scores as far off as exponentials of logits of that size may be; past 1 anything is.
            assert_same_choice(&what, &case, keys, &exact, &got.indices, relative.min(1.0));
            if relative < 0.5 {
                let exact = reference_chosen(&case, &got.indices);
                let (error, allowed) =
                    (distance(got.get("out"), exact.get("out")), bound(way, &case, &got));
                assert!(error <= allowed, "{what}: {error:e} > {allowed:e}");
            }
        }
    }
}

#[test]
fn a_nan_query_spoils_its_own_row_only() {
    let tokens = 120;
    let clean = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 8), &[50, 70], 10);
    for t in [0, 20, 49, 50, 100] {
        let mut case = clean.clone();
        // Head 1, of KV head 0.
        case.get_mut("q")[(t * 6 + 1) * 8 + 3] = f32::NAN;
        for way in &WAYS {
            let (clean, got) = ((way.run)(&clean), (way.run)(&case));
            let what = format!("{} NaN in q of token {t}", way.name);
            for u in (0..tokens).filter(|&u| u != t) {
                assert_same_row(&what, (&clean, u, tokens), (&got, u, tokens));
                for name in ["d_q", "d_gate"] {
                    let same = same_bits(clean.row(name, u, tokens), got.row(name, u, tokens));
                    assert!(same, "{what}: {name} of token {u}");
                }
            }
            let out = got.row("out", t, tokens);
            assert!(out[8..16].iter().all(|x| x.is_nan()), "{what}: its own output is {out:?}");
            let other = &clean.row("out", t, tokens)[24..];
            assert!(same_bits(&out[24..], other), "{what}: the other KV head's output");
            // Scores of NaN rank last and equal: the lowest blocks, still a valid choice.
            let c = (if t < 50 { t } else { t - 50 }) as i32 / 16;
            let mut want: Vec<i32> = (0..=c).filter(|&j| j < 2 || j >= c - 1).collect();
            want.resize(4, -1);
            assert_eq!(&got.indices[t * 8..t * 8 + 4], want, "{what}: choice");
        }
    }
}

#[test]
fn a_nan_key_or_value_reaches_no_earlier_token_and_no_other_sequence() {
    let tokens = 150;
    let clean = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 8), &[30, 100, 20], 11);
    let clean = clean.forward_only();
    for name in ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"] {
        for t in [30, 37, 45, 62, 129] {
            let mut case = clean.clone();
            case.get_mut(name)[(t * 2 + 1) * 8] = f32::NAN;
            for way in &WAYS {
                let (clean, got) = ((way.run)(&clean), (way.run)(&case));
                let what = format!("{} NaN in {name} of token {t}", way.name);
                for u in (0..t).chain(130..tokens) {
                    assert_same_row(&what, (&clean, u, tokens), (&got, u, tokens));
                }
                if !name.ends_with("cmp") {
                    let own = got.row("out", t, tokens);
                    assert!(own[24..].iter().any(|x| x.is_nan()), "{what}: its own row");
                }
                // The first KV head never sees it.
                for u in 0..tokens {
                    let (a, b) = (clean.row("out", u, tokens), got.row("out", u, tokens));
                    assert!(same_bits(&a[..24], &b[..24]), "{what}: KV head 0 of token {u}");
                }
            }
        }
    }
}

#[test]
fn the_same_bits_on_every_run() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        let case = Case::random(&small(compressor), dims(6, 2, 24, 12), &[1, 200, 70], 12);
        for way in &WAYS {
            let first = (way.run)(&case);
            for _ in 0..3 {
                assert_same_bits(way.name, &first, &(way.run)(&case));
            }
        }
    }
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    for (compressor, heads) in [(Compressor::Linear, 6), (Compressor::Mlp, 2)] {
        let case = Case::random(&small(compressor), dims(heads, 2, 24, 12), &[1, 300, 70], 13);
        for way in &WAYS {
            let one = pool(1).install(|| (way.run)(&case));
            for n in [2, 5] {
                let many = pool(n).install(|| (way.run)(&case));
                assert_same_bits(&format!("{} {n} threads", way.name), &one, &many);
            }
        }
    }
}

#[test]
fn dense_and_window_attention_keep_to_their_past_and_their_sequence() {
    let lengths = [0, 1, 90, 64, 0, 7];
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 24, 12), &lengths, 14);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    for way in &WAYS {
        for mask in [Mask::Causal, Mask::Window(20)] {
            let what = format!("{} {mask:?}", way.name);
            let together = (way.attend)(&case, "win", mask);
            let again = pool.install(|| (way.attend)(&case, "win", mask));
            assert_same_bits(&format!("{what}: five threads"), &together, &again);
            let mut start = 0;
            for (b, &n) in lengths.iter().enumerate() {
                let alone = (way.attend)(&case.sequence(b), "win", mask);
                let prefix = (way.attend)(&case.sequence(b).rows(0, n / 2), "win", mask);
                for t in 0..n {
                    for (name, x) in &alone.tensors {
                        let width = x.len() / n;
                        let x = &x[t * width..(t + 1) * width];
                        let same = same_bits(x, together.row(name, start + t, case.tokens()));
                        assert!(same, "{what}: {name} of token {t} of sequence {b}");
                        // Later tokens do reach the gradients of earlier keys and values.
                        if t < n / 2 && !matches!(&name[..], "d_k" | "d_v") {
                            let same = same_bits(x, prefix.row(name, t, n / 2));
                            assert!(same, "{what}: {name} of token {t} of half of sequence {b}");
                        }
                    }
                }
                start += n;
            }
        }
    }
}
