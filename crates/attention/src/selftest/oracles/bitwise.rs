//! The same bits, whatever comes after, beside or again.

use super::{COMPRESSORS, same_row, small};
use crate::Compressor;
use crate::cpu::Mask;
use crate::selftest::{Case, Check, Fault, Tally, Way, check_same_bits, dims, ensure, same_bits};

/// The same call four times.
pub fn the_same_bits_on_every_run(way: &Way, _: &mut Tally) -> Check<()> {
    for compressor in COMPRESSORS {
        let case = Case::random(&small(compressor), dims(6, 2, 24, 12), &[1, 200, 70], 12);
        let first = (way.run)(&case)?;
        for _ in 0..3 {
            check_same_bits(&format!("{compressor:?}"), &first, &(way.run)(&case)?)?;
        }
    }
    Ok(())
}

fn pool(threads: usize) -> Check<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Fault(format!("no pool of {threads} threads: {e}")))
}

/// One thread, two, five.
pub fn the_same_bits_for_any_number_of_threads(way: &Way, _: &mut Tally) -> Check<()> {
    for (compressor, heads) in [(Compressor::Linear, 6), (Compressor::Mlp, 2)] {
        let case = Case::random(&small(compressor), dims(heads, 2, 24, 12), &[1, 300, 70], 13);
        let one = pool(1)?.install(|| (way.run)(&case))?;
        for n in [2, 5] {
            let many = pool(n)?.install(|| (way.run)(&case))?;
            check_same_bits(&format!("{compressor:?} {n} threads"), &one, &many)?;
        }
    }
    Ok(())
}

/// A prefix of a sequence computes what the whole computes there.
pub fn later_tokens_change_no_earlier_bit(way: &Way, _: &mut Tally) -> Check<()> {
    for compressor in COMPRESSORS {
        let case = Case::random(&small(compressor), dims(6, 2, 8, 12), &[150], 4).forward_only();
        let whole = (way.run)(&case)?;
        for n in [1, 7, 8, 15, 16, 17, 63, 64, 65, 97, 149] {
            let prefix = (way.run)(&case.rows(0, n))?;
            for t in 0..n {
                let what = format!("{compressor:?} prefix of {n}");
                same_row(&what, (&whole, t, 150), (&prefix, t, n))?;
            }
        }
    }
    Ok(())
}

/// Packed sequences know nothing of each other, forward and backward.
pub fn sequences_together_equal_each_alone(way: &Way, _: &mut Tally) -> Check<()> {
    let lengths = [0, 1, 7, 8, 9, 0, 33, 64, 130, 0];
    let tokens: usize = lengths.iter().sum();
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 8, 12), &lengths, 5);
    let together = (way.run)(&case)?;
    let mut start = 0;
    for (b, &n) in lengths.iter().enumerate() {
        let alone = (way.run)(&case.sequence(b))?;
        for t in 0..n {
            let what = format!("sequence {b} of {n} tokens");
            same_row(&what, (&together, start + t, tokens), (&alone, t, n))?;
            for (name, x) in alone.tensors.iter().filter(|(name, _)| name.starts_with("d_")) {
                let width = x.len() / n;
                let x = &x[t * width..(t + 1) * width];
                let y = together.row(name, start + t, tokens);
                ensure(same_bits(x, y), || format!("{what}: {name} of token {t}: {x:?} {y:?}"))?;
            }
        }
        start += n;
    }
    Ok(())
}

/// The same of dense and window attention.
pub fn dense_and_window_attention_keep_to_their_past_and_their_sequence(
    way: &Way,
    _: &mut Tally,
) -> Check<()> {
    let lengths = [0, 1, 90, 64, 0, 7];
    let case = Case::random(&small(Compressor::Mean), dims(6, 2, 24, 12), &lengths, 14);
    for mask in [Mask::Causal, Mask::Window(20)] {
        let what = format!("{mask:?}");
        let together = (way.attend)(&case, "win", mask)?;
        let again = pool(5)?.install(|| (way.attend)(&case, "win", mask))?;
        check_same_bits(&format!("{what}: five threads"), &together, &again)?;
        let mut start = 0;
        for (b, &n) in lengths.iter().enumerate() {
            let alone = (way.attend)(&case.sequence(b), "win", mask)?;
            let prefix = (way.attend)(&case.sequence(b).rows(0, n / 2), "win", mask)?;
            for t in 0..n {
                for (name, x) in &alone.tensors {
                    let width = x.len() / n;
                    let x = &x[t * width..(t + 1) * width];
                    let same = same_bits(x, together.row(name, start + t, case.tokens()));
                    ensure(same, || format!("{what}: {name} of token {t} of sequence {b}"))?;
                    // Later tokens do reach the gradients of earlier keys and values.
                    if t < n / 2 && !matches!(&name[..], "d_k" | "d_v") {
                        let same = same_bits(x, prefix.row(name, t, n / 2));
                        ensure(same, || {
                            format!("{what}: {name} of token {t} of half of sequence {b}")
                        })?;
                    }
                }
            }
            start += n;
        }
    }
    Ok(())
}
