//! Rotary angles.

use std::sync::Arc;

use crate::Result;

/// Inverse frequencies of a rotary embedding and its attention factor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RopeTable(Arc<Inner>);

#[derive(Debug)]
struct Inner {}

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

impl RopeTable {
    /// `θ^(−2i/D)` for a head of `dim` D.
    pub fn plain(dim: usize, theta: f64) -> Result<Self> {
        let _ = (dim, theta);
        todo!()
    }

    /// See [`Llama3Scaling`].
    pub fn llama3(dim: usize, theta: f64, scaling: &Llama3Scaling) -> Result<Self> {
        let _ = (dim, theta, scaling);
        todo!()
    }

    /// See [`YarnScaling`].
    pub fn yarn(dim: usize, theta: f64, scaling: &YarnScaling) -> Result<Self> {
        let _ = (dim, theta, scaling);
        todo!()
    }

    /// Head dimension D.
    pub fn dim(&self) -> usize {
        let _ = &self.0;
        todo!()
    }

    /// The D/2 inverse frequencies.
    pub fn inv_freq(&self) -> &[f32] {
        todo!()
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        todo!()
    }
}
