//! Fresh weights: a pure function of the seed and the parameter's name.
//!
//! A parameter starts the same whatever else the model has, so NSA and its dense twin share
//! their common weights; and the same for any number of threads, because every chunk of 64k
//! numbers has its own ChaCha stream.

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use tercet_tensor::{DType, Tensor};

use crate::layout::{Init, ParamSpec};
use crate::{Error, Result};

/// Numbers drawn from one ChaCha stream; even, since normals come in pairs.
const CHUNK: usize = 1 << 16;

/// The fresh value of one parameter, f32 or rounded to bf16.
pub(crate) fn fresh(spec: &ParamSpec, seed: u64, dtype: DType) -> Result<Tensor> {
    let mut values = Vec::new();
    values.try_reserve_exact(spec.len()).map_err(|_| {
        Error::Config(format!(
            "this machine cannot hold the {} numbers of {}; choose smaller sizes",
            spec.len(),
            spec.name
        ))
    })?;
    values.resize(spec.len(), 0f32);
    match spec.init {
        Init::Zeros => {}
        Init::Ones => values.fill(1.0),
        Init::Normal(std) => normal(&mut values, std, seed, &spec.name),
        Init::Uniform(bound) => uniform(&mut values, bound, seed, &spec.name),
        Init::Averaging { block, noise } => {
            normal(&mut values, noise, seed, &spec.name);
            let dim = spec.shape[2];
            for (row, out) in values.chunks_mut(dim).enumerate() {
                out[row % dim] += 1.0 / block as f32;
            }
        }
    }
    Ok(match dtype {
        DType::BF16 => {
            Tensor::from_bf16(values.into_iter().map(bf16::from_f32).collect(), &spec.shape)?
        }
        _ => Tensor::from_f32(values, &spec.shape)?,
    })
}

fn normal(values: &mut [f32], std: f64, seed: u64, name: &str) {
    each_chunk(values, seed, name, |rng, chunk| {
        for pair in chunk.chunks_mut(2) {
            // Box–Muller with libm, whose bits do not depend on the platform.
            let u = 1.0 - unit(rng);
            let radius = std * libm::sqrt(-2.0 * libm::log(u));
            let (sin, cos) = libm::sincos(std::f64::consts::TAU * unit(rng));
            pair[0] = (radius * cos) as f32;
            if let Some(second) = pair.get_mut(1) {
                *second = (radius * sin) as f32;
            }
        }
    });
}

fn uniform(values: &mut [f32], bound: f64, seed: u64, name: &str) {
    each_chunk(values, seed, name, |rng, chunk| {
        chunk.iter_mut().for_each(|value| *value = (bound * (2.0 * unit(rng) - 1.0)) as f32);
    });
}

/// `fill(rng, chunk)` over chunks that each have a stream of their own.
fn each_chunk(
    values: &mut [f32],
    seed: u64,
    name: &str,
    fill: impl Fn(&mut ChaCha8Rng, &mut [f32]) + Sync + Send,
) {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(name).to_le_bytes());
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(stream, chunk)| {
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(stream as u64);
        fill(&mut rng, chunk);
    });
}

/// Uniform in [0, 1) with 53 bits.
pub(crate) fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// 64-bit FNV-1a: a stable hash, so that a name means the same weights in every release.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, shape: &[usize], init: Init) -> ParamSpec {
        ParamSpec { name: name.into(), shape: shape.to_vec(), init }
    }

    fn values(spec: &ParamSpec, seed: u64) -> Vec<f32> {
        fresh(spec, seed, DType::F32).unwrap().to_vec_f32().unwrap()
    }

    #[test]
    fn a_weight_depends_on_seed_and_name_only() {
        let a = spec("a", &[3, 5], Init::Normal(0.02));
        let b = spec("b", &[3, 5], Init::Normal(0.02));
        assert_eq!(values(&a, 1), values(&a, 1));
        assert_ne!(values(&a, 1), values(&a, 2));
        assert_ne!(values(&a, 1), values(&b, 1));
        // Pinned: a change of these bits breaks "same seed, same model" across releases.
        assert_eq!(values(&a, 1)[0].to_bits(), 0x3d24503c);
    }

    #[test]
    fn normal_weights_have_the_asked_deviation() {
        let n = 300_000;
        let x = values(&spec("w", &[n], Init::Normal(0.02)), 7);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64;
        let var = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n as f64;
        // Five standard errors of the mean (σ/√n) and of the variance (σ²·√(2/n)).
        assert!(mean.abs() < 5.0 * 0.02 / (n as f64).sqrt(), "{mean}");
        assert!((var / 4e-4 - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt(), "{var}");
    }

    #[test]
    fn a_tensor_that_no_memory_holds_is_an_error() {
        let huge = spec("w", &[1 << 30, 1 << 30], Init::Ones);
        let text = fresh(&huge, 0, DType::F32).unwrap_err().to_string();
        assert!(text.contains("cannot hold the 1152921504606846976 numbers of w"), "{text}");
    }

    #[test]
    fn a_fresh_linear_compressor_averages() {
        let x = values(&spec("phi", &[1, 6, 2], Init::Averaging { block: 3, noise: 1e-9 }), 0);
        for (i, v) in x.iter().enumerate() {
            let expected = if (i / 2) % 2 == i % 2 { 1.0 / 3.0 } else { 0.0 };
            assert!((v - expected).abs() < 1e-6, "{i}: {v}");
        }
    }
}
