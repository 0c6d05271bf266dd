//! Decoding over a cache gives what prefill gives: the same choice of blocks, bit for bit, and the
//! same output to rounding, however the tokens are cut into chunks.

mod common;

use common::oracles::{cuts, decode_bound};
use common::{Case, Narrow, Way, Wide, dims, distance, reference, spec};
use half::bf16;
use tercet_attention::cpu::{self, Mask};
use tercet_attention::{Compressor, Dims, Element, NsaSpec};

fn small(compressor: Compressor) -> NsaSpec {
    spec([8, 4, 16, 4, 12], compressor)
}

#[test]
fn the_reference_decodes_what_it_prefills() {
    for compressor in [Compressor::Mean, Compressor::Linear, Compressor::Mlp] {
        let case = Case::random(&small(compressor), dims(6, 2, 8, 12), &[130], 23).forward_only();
        let whole = reference(&case).unwrap();
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
    fn check<E: Element>(mask: Mask, d: Dims, way: &Way) {
        let spec = small(Compressor::Mean);
        let case = Case::random(&spec, d, &[90], 25).rounded::<E>();
        let narrow = Narrow::<E>::of(&case);
        let Dims { heads, kv_heads, key_dim, value_dim } = d;
        let mut whole = vec![E::default(); 90 * heads * value_dim];
        let mut lse = vec![0.0; 90 * heads];
        cpu::attend_forward(&narrow.attend("slc"), mask, &mut whole, &mut lse).unwrap();
        let wide = |x: &[E]| x.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>();
        let allowed = decode_bound(way, &case, &[]);
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
        check::<f32>(mask, dims(6, 2, 24, 12), &Way::cpu_f32());
        check::<bf16>(mask, dims(3, 3, 16, 16), &Way::cpu_bf16());
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
