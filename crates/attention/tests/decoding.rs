//! Decoding over a cache gives what prefill gives: the same choice of blocks, bit for bit, and the
//! same output to rounding, however the tokens are cut into chunks.

mod common;

use common::{
    Case, Narrow, UNIT16, UNIT32, Wide, dims, distance, fast, fast_decode, largest_logit,
    output_bound, reference, spec,
};
use half::bf16;
use tercet_attention::cpu::{self, Mask};
use tercet_attention::{Compressor, Dims, Element, NsaSpec};

fn small(compressor: Compressor) -> NsaSpec {
    spec([8, 4, 16, 4, 12], compressor)
}

/// Ways to cut `tokens`: all at once, ever larger chunks, single tokens, a prompt then tokens.
fn cuts(tokens: usize) -> Vec<Vec<usize>> {
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
fn bound(case: &Case, compressed_k: &[f64], storage_unit: f64) -> f64 {
    let value = ["v_cmp", "v_slc", "v_win"].iter().flat_map(|name| case.get(name));
    let phi = if case.spec.compressor == Compressor::Mean { 1.0 } else { 4.0 };
    let value = phi * f64::from(value.fold(0.0f32, |m, x| m.max(x.abs())));
    let logit = largest_logit(case, compressed_k);
    6.0 * value * (output_bound(case, logit, case.tokens(), UNIT32) + storage_unit)
}

fn decode_equals_prefill<E: Element>(what: &str, case: &Case, storage_unit: f64) {
    let case = case.rounded::<E>();
    let whole = fast::<E>(&case);
    let allowed = bound(&case, whole.get("compressed_k"), storage_unit);
    for cut in cuts(case.tokens()) {
        let (out, indices) = fast_decode::<E>(&case, &cut);
        let what = format!("{what} in {} chunks", cut.len());
        let at = indices.iter().zip(&whole.indices).position(|(a, b)| a != b);
        assert_eq!(at, None, "{what}: first index that differs");
        assert_eq!(indices.len(), whole.indices.len(), "{what}");
        let error = distance(&out, whole.get("out"));
        assert!(error <= allowed, "{what}: {error:e} > {allowed:e}");
    }
}

#[test]
fn decode_equals_prefill_for_every_phi() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        let case = Case::random(&small(compressor), dims(6, 2, 24, 12), &[150], 20).forward_only();
        decode_equals_prefill::<f32>(&format!("{compressor:?} f32"), &case, UNIT32);
        decode_equals_prefill::<bf16>(&format!("{compressor:?} bf16"), &case, UNIT16);
    }
}

#[test]
fn decode_equals_prefill_for_odd_groups_and_dims() {
    for (spec, d) in [
        (spec([32, 16, 64, 5, 40], Compressor::Mean), dims(15, 1, 19, 33)),
        (spec([16, 16, 16, 3, 1], Compressor::Mean), dims(3, 3, 8, 1)),
        (spec([4, 1, 7, 3, 5], Compressor::Mean), dims(64, 1, 5, 7)),
        (spec([6, 2, 6, 4, 400], Compressor::Linear), dims(8, 4, 16, 16)),
    ] {
        let case = Case::random(&spec, d, &[230], 21).forward_only();
        decode_equals_prefill::<f32>(&format!("{spec:?} {d:?}"), &case, UNIT32);
    }
}

#[test]
fn short_sequences_decode() {
    for n in [0, 1, 7, 8, 9] {
        let case = Case::random(&small(Compressor::Linear), dims(4, 2, 8, 8), &[n], 22);
        decode_equals_prefill::<f32>(&format!("{n} tokens"), &case.forward_only(), UNIT32);
    }
}

#[test]
fn the_reference_decodes_what_it_prefills() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        let case = Case::random(&small(compressor), dims(6, 2, 8, 12), &[130], 23).forward_only();
        let whole = reference(&case);
        for t in [0, 6, 7, 8, 15, 16, 63, 64, 100, 129] {
            let prefix = case.rows(0, t + 1);
            let wide = Wide::of(&prefix);
            let last = tercet_attention::reference::decode(&wide.input()).unwrap();
            assert_eq!(last.out, whole.row("out", t, 130), "token {t}");
            assert_eq!(last.indices, whole.indices[t * 8..(t + 1) * 8], "token {t}");
        }
    }
}

#[test]
fn compression_of_a_stream_has_the_bits_of_the_whole() {
    fn check<E: Element + std::fmt::Debug>(compressor: Compressor) {
        let case = Case::random(&small(compressor), dims(4, 2, 24, 24), &[75], 24);
        let narrow = Narrow::<E>::of(&case);
        let mut whole = vec![E::default(); case.spec.compressed_blocks(75) * 48];
        cpu::compress_forward(&narrow.compress("k"), &mut whole).unwrap();
        for cut in cuts(75) {
            let mut tail = cpu::CompressTail::new(&case.spec, 2, 24).unwrap();
            let mut rows = narrow.get("k_cmp").chunks(48);
            let mut blocks = Vec::new();
            for c in cut {
                let x: Vec<E> = rows.by_ref().take(c).flatten().copied().collect();
                blocks.extend(tail.push(&x, narrow.phi("k")).unwrap());
                assert_eq!(tail.blocks() * 48, blocks.len());
            }
            assert!(blocks == whole, "{compressor:?}");
        }
    }
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        check::<f32>(compressor);
        check::<bf16>(compressor);
    }
}

#[test]
fn dense_and_window_caches_equal_attention_of_the_whole() {
    fn check<E: Element>(mask: Mask, d: Dims, storage_unit: f64) {
        let spec = small(Compressor::Mean);
        let case = Case::random(&spec, d, &[90], 25).rounded::<E>();
        let narrow = Narrow::<E>::of(&case);
        let Dims { heads, kv_heads, key_dim, value_dim } = d;
        let mut whole = vec![E::default(); 90 * heads * value_dim];
        let mut lse = vec![0.0; 90 * heads];
        cpu::attend_forward(&narrow.attend("slc"), mask, &mut whole, &mut lse).unwrap();
        let wide = |x: &[E]| x.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>();
        let allowed = bound(&case, &[], storage_unit);
        for cut in cuts(90) {
            let mut cache = cpu::DenseCache::new(d, mask).unwrap();
            let (mut got, mut at) = (Vec::new(), 0);
            for c in cut {
                let rows = |name: &str, n: usize| &narrow.get(name)[at * n..(at + c) * n];
                let mut out = vec![E::from_f32(f32::NAN); c * heads * value_dim];
                let (q, k) = (rows("q", heads * key_dim), rows("k_slc", kv_heads * key_dim));
                let v = rows("v_slc", kv_heads * value_dim);
                cache.extend(d.scale(), q, k, v, &mut out).unwrap();
                got.extend(wide(&out));
                at += c;
                assert_eq!(cache.len(), at);
            }
            let error = distance(&got, &wide(&whole));
            assert!(error <= allowed, "{mask:?} {d:?}: {error:e} > {allowed:e}");
        }
    }
    for mask in [Mask::Causal, Mask::Window(1), Mask::Window(13), Mask::Window(1000)] {
        check::<f32>(mask, dims(6, 2, 24, 12), UNIT32);
        check::<bf16>(mask, dims(3, 3, 16, 16), UNIT16);
    }
}

#[test]
fn a_window_cache_stops_growing() {
    let d = dims(2, 1, 16, 16);
    let mut cache = cpu::DenseCache::new(d, Mask::Window(8)).unwrap();
    let mut bytes = Vec::new();
    for _ in 0..2000 {
        let (q, k) = ([0.5f32; 32], [0.25f32; 16]);
        cache.extend(1.0, &q, &k, &k, &mut [0.0; 32]).unwrap();
        bytes.push(cache.bytes());
    }
    assert_eq!(bytes[500], bytes[1999]);
    assert!(bytes[1999] >= 8 * 32 * 4, "eight keys and values are {} bytes?", bytes[1999]);
}
