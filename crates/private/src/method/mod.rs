//! What decides thresholds, coordinates and noise from step to step: one method, one file.
//!
//! | room | method | looks at |
//! |---|---|---|
//! | [`dp_sgd`] | `dp-sgd`: one threshold | nothing |
//! | [`auto_s`] | `auto-s`: everybody to nearly the threshold | nothing |
//! | [`per_layer`] | `per-layer`: a threshold for each adapter | nothing |
//! | [`schedule`] | `schedule`: σ and thresholds declared beforehand | the step |
//! | [`quantile`] | `quantile`: thresholds follow a quantile of the norms | noisy counts |
//! | [`adaclip`] | `adaclip`: coordinates scaled one by one | released gradients |
//! | [`geoclip`] | `geoclip`: a basis of its own for each adapter | released gradients |
//! | [`random_action`] | `random-action`: the control of every learnt controller | nothing |
//! | [`controller`] | whichever decides: chance, or [`crate::rldp`] | what was released |
//!
//! [`Steering`] holds all of it. It is on the public side: [`Steering::learn`] is given what a step
//! released and nothing else, so that whatever it does afterwards is post-processing. The private
//! side asks it how to cut a person's gradient, and never tells it what became of that.

pub mod adaclip;
pub mod auto_s;
mod balance;
pub mod controller;
pub mod dp_sgd;
pub mod geoclip;
pub mod per_layer;
pub mod quantile;
pub mod random_action;
pub mod schedule;
mod state;
mod steering;
mod tangent;
mod watch;

use serde::{Deserialize, Serialize};

pub use balance::Balance;
pub use state::{Reader, State};
pub use steering::{Cost, Recipe, Steering};

/// What steers clipping and noise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// One threshold for the whole gradient (Abadi et al. 2016).
    #[default]
    DpSgd,
    /// `C/(n + 0.01)` (Bu et al., arXiv 2206.07136).
    AutoS,
    /// Thresholds that follow a quantile of the norms (Andrew et al., arXiv 1905.03871).
    Quantile,
    /// Coordinates scaled by what was released (Pichapati et al., arXiv 1908.07643).
    Adaclip,
    /// A basis chosen from what was released (after GeoClip, arXiv 2506.06549).
    Geoclip,
    /// A threshold for each adapter.
    PerLayer,
    /// σ and thresholds as declared functions of the step.
    Schedule,
    /// Random moves of the thresholds: the control of every learnt controller.
    RandomAction,
    /// The controller of RLDP (arXiv 2507.22565).
    Rldp,
}

impl Method {
    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::DpSgd => "dp-sgd",
            Self::AutoS => "auto-s",
            Self::Quantile => "quantile",
            Self::Adaclip => "adaclip",
            Self::Geoclip => "geoclip",
            Self::PerLayer => "per-layer",
            Self::Schedule => "schedule",
            Self::RandomAction => "random-action",
            Self::Rldp => "rldp",
        }
    }

    /// Whether a controller decides.
    pub fn is_controlled(self) -> bool {
        matches!(self, Self::RandomAction | Self::Rldp)
    }
}

/// The trained tensors, as a private step sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Elements of each slot.
    pub sizes: Vec<usize>,
    /// The slots of each adapter: all slots, each once.
    pub pairs: Vec<Vec<usize>>,
    /// Whether a slot is the A of its pair.
    pub is_a: Vec<bool>,
    /// Rank of the adapters: rows of an A, columns of a B.
    pub rank: usize,
}
