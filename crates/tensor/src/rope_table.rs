//! Rotary frequencies and angles, computed as Hugging Face transformers does
//! (`modeling_rope_utils.py`): in f32 where it is f32 there.

use std::f64::consts::PI;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tercet_cuda::{Buffer, Gpu};

use crate::{Error, Result, Tensor};

const OP: &str = "rope table";

/// Positions whose cosines and sines are kept between calls; beyond, they are computed anew.
const KEPT_POSITIONS: usize = 1 << 17;

/// Inverse frequencies of a rotary embedding, its attention factor, and the angles computed so
/// far. Cheap to clone; clones share the angles.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    inv_freq: Vec<f32>,
    attention_factor: f32,
    kept: RwLock<Arc<Angles>>,
    on_devices: Mutex<OnDevices>,
}

/// The inverse frequencies on the devices that asked for them.
#[derive(Default)]
struct OnDevices(Vec<Buffer>);

impl std::fmt::Debug for OnDevices {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} devices", self.0.len())
    }
}

/// Cosines and sines, `D/2` a row, already times the attention factor.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// Whether row i belongs to position i (otherwise to token i of the call).
    pub(crate) by_position: bool,
}

/// Hugging Face's `rope_type: llama3`.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// `factor`.
    pub factor: f64,
    /// `low_freq_factor`.
    pub low_freq_factor: f64,
    /// `high_freq_factor`.
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`.
    pub original_max_position_embeddings: usize,
}

/// Hugging Face's `rope_type: yarn`.
#[derive(Clone, Debug, PartialEq)]
pub struct YarnScaling {
    /// `factor`.
    pub factor: f64,
    /// `original_max_position_embeddings`.
    pub original_max_position_embeddings: usize,
    /// `beta_fast`, 32 when absent.
    pub beta_fast: f64,
    /// `beta_slow`, 1 when absent.
    pub beta_slow: f64,
    /// `attention_factor`; computed from the factor when absent.
    pub attention_factor: Option<f64>,
    /// `mscale`.
    pub mscale: Option<f64>,
    /// `mscale_all_dim`.
    pub mscale_all_dim: Option<f64>,
    /// `truncate`, true when absent.
    pub truncate: bool,
}

impl YarnScaling {
    /// A factor and the length it extends; all else as when absent from a config.
    pub fn new(factor: f64, original_max_position_embeddings: usize) -> Self {
        YarnScaling {
            factor,
            original_max_position_embeddings,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        }
    }
}

impl RopeTable {
    /// `θ^(−2i/D)` for a head of `dim` D, which must be even.
    pub fn plain(dim: usize, theta: f64) -> Result<Self> {
        Ok(Self::build(inverse(&wavelengths(dim, theta)?), 1.0))
    }

    /// See [`Llama3Scaling`]: long waves are slowed by the factor, short ones kept, those
    /// between blended.
    pub fn llama3(dim: usize, theta: f64, scaling: &Llama3Scaling) -> Result<Self> {
        let Llama3Scaling { factor, low_freq_factor: low, high_freq_factor: high, .. } = *scaling;
        let context = scaling.original_max_position_embeddings as f64;
        positive("factor", factor)?;
        positive("low_freq_factor", low)?;
        positive("original_max_position_embeddings", context)?;
        if high <= low || !high.is_finite() {
            let text = format!("high_freq_factor {high} must be above low_freq_factor {low}");
            return Err(Error::value(OP, text));
        }
        let mut inv_freq = inverse(&wavelengths(dim, theta)?);
        for f in &mut inv_freq {
            let wavelength = (2.0 * PI) as f32 / *f;
            let kept = *f;
            if wavelength > (context / low) as f32 {
                *f = kept / factor as f32;
            } else if wavelength >= (context / high) as f32 {
                let smooth = (context as f32 / wavelength - low as f32) / (high - low) as f32;
                *f = (1.0 - smooth) * kept / factor as f32 + smooth * kept;
            }
        }
        Ok(Self::build(inv_freq, 1.0))
    }

    /// See [`YarnScaling`] (arXiv 2309.00071): fast dimensions kept, slow ones interpolated, a
    /// linear ramp between, and all logits sharpened by the attention factor.
    pub fn yarn(dim: usize, theta: f64, scaling: &YarnScaling) -> Result<Self> {
        let YarnScaling { factor, beta_fast, beta_slow, .. } = *scaling;
        let context = scaling.original_max_position_embeddings as f64;
        for (name, value) in [
            ("factor", factor),
            ("original_max_position_embeddings", context),
            ("beta_fast", beta_fast),
            ("beta_slow", beta_slow),
            ("attention_factor", scaling.attention_factor.unwrap_or(1.0)),
        ] {
            positive(name, value)?;
        }
        if theta <= 1.0 {
            return Err(Error::value(OP, format!("theta {theta} must be above 1 for YaRN")));
        }
        let sharpen = |mscale: f64| {
            if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 }
        };
        // Python treats 0 as absent here.
        let given = |x: Option<f64>| x.filter(|&x| x != 0.0);
        let attention_factor = match (given(scaling.mscale), given(scaling.mscale_all_dim)) {
            _ if scaling.attention_factor.is_some() => scaling.attention_factor.unwrap_or(1.0),
            (Some(one), Some(all)) => sharpen(one) / sharpen(all),
            _ => sharpen(1.0),
        };
        // The dimension that turns `rotations` times over the original context.
        let turning = |rotations: f64| {
            dim as f64 * libm::log(context / (rotations * 2.0 * PI)) / (2.0 * libm::log(theta))
        };
        let (mut low, mut high) = (turning(beta_fast), turning(beta_slow));
        if scaling.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        low = low.max(0.0);
        high = high.min(dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        let wavelengths = wavelengths(dim, theta)?;
        let inv_freq = wavelengths.iter().enumerate().map(|(i, &wave)| {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let keep = 1.0 - ramp;
            1.0 / (factor as f32 * wave) * (1.0 - keep) + 1.0 / wave * keep
        });
        Ok(Self::build(inv_freq.collect(), attention_factor as f32))
    }

    fn build(inv_freq: Vec<f32>, attention_factor: f32) -> Self {
        let (kept, on_devices) = (RwLock::default(), Mutex::default());
        RopeTable(Arc::new(Inner { inv_freq, attention_factor, kept, on_devices }))
    }

    /// Head dimension D.
    pub fn dim(&self) -> usize {
        2 * self.0.inv_freq.len()
    }

    /// The D/2 inverse frequencies.
    pub fn inv_freq(&self) -> &[f32] {
        &self.0.inv_freq
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        self.0.attention_factor
    }

    /// Cosines and sines of the first positions, f32 `[positions, 2, D/2]`: a position's cosines,
    /// then its sines, both times the attention factor.
    pub fn turns(&self, positions: usize) -> Result<Tensor> {
        let half = self.0.inv_freq.len();
        let angles = self.compute((0..positions).map(|p| p as f32), true);
        let rows = angles.cos.chunks(half).zip(angles.sin.chunks(half));
        let all = rows.flat_map(|(cos, sin)| cos.iter().chain(sin)).copied().collect();
        Tensor::from_f32(all, &[positions, 2, half])
    }

    /// Address of the inverse frequencies on a device; valid as long as the table lives.
    pub(crate) fn inv_freq_on(&self, gpu: &Gpu) -> Result<u64> {
        let mut held = self.0.on_devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = held.0.iter().find(|buffer| buffer.gpu().same(gpu)) {
            return Ok(buffer.ptr());
        }
        let buffer = gpu.upload(&self.0.inv_freq)?;
        let address = buffer.ptr();
        held.0.push(buffer);
        Ok(address)
    }

    /// Angles for `positions`, none of them negative.
    pub(crate) fn angles(&self, positions: &[i32]) -> Arc<Angles> {
        let needed = positions.iter().map(|&p| p as usize + 1).max().unwrap_or(0);
        if needed > KEPT_POSITIONS {
            return Arc::new(self.compute(positions.iter().map(|&p| p as f32), false));
        }
        let length = needed * self.0.inv_freq.len();
        let kept = self.0.kept.read().unwrap_or_else(PoisonError::into_inner).clone();
        if kept.cos.len() >= length {
            return kept;
        }
        let mut slot = self.0.kept.write().unwrap_or_else(PoisonError::into_inner);
        if slot.cos.len() < length {
            let rows = needed.next_power_of_two();
            *slot = Arc::new(self.compute((0..rows).map(|p| p as f32), true));
        }
        slot.clone()
    }

    fn compute(&self, positions: impl Iterator<Item = f32>, by_position: bool) -> Angles {
        let mut angles = Angles { by_position, ..Angles::default() };
        for position in positions {
            for &f in &self.0.inv_freq {
                let (sin, cos) = libm::sincos(f64::from(position * f));
                angles.cos.push(cos as f32 * self.0.attention_factor);
                angles.sin.push(sin as f32 * self.0.attention_factor);
            }
        }
        angles
    }
}

/// `θ^(2i/D)` in f32.
fn wavelengths(dim: usize, theta: f64) -> Result<Vec<f32>> {
    positive("theta", theta)?;
    if dim == 0 || !dim.is_multiple_of(2) {
        let text = format!("the head dimension must be even and positive, got {dim}");
        return Err(Error::value(OP, text));
    }
    let exponents = (0..dim / 2).map(|i| (2 * i) as f32 / dim as f32);
    Ok(exponents.map(|e| libm::pow(theta, f64::from(e)) as f32).collect())
}

fn inverse(wavelengths: &[f32]) -> Vec<f32> {
    wavelengths.iter().map(|w| 1.0 / w).collect()
}

fn positive(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::value(OP, format!("{name} must be positive and finite, got {value}")))
}
