//! The learning rate as a pure function of the step.

use crate::config::{ScheduleKind, TrainConfig};

/// Warm-up, then half a cosine or a plateau with a final decay.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    kind: ScheduleKind,
    peak: f64,
    /// Final rate as a share of the peak.
    last: f64,
    warmup: u64,
    /// First step of the decay.
    decay_start: u64,
    steps: u64,
}

impl Schedule {
    /// The schedule of a run of `steps` steps. A warm-up longer than the run is cut to its length.
    pub fn new(train: &TrainConfig, steps: u64) -> Self {
        let warmup = train.warmup.min(steps);
        let decay_start = match train.schedule {
            ScheduleKind::Cosine => warmup,
            ScheduleKind::Wsd => {
                // In whole steps; a run is far shorter than 2⁵³ of them.
                let decay = (train.decay * steps as f64).round() as u64;
                (steps - decay.min(steps)).max(warmup)
            }
        };
        let (kind, peak, last) = (train.schedule, train.lr, train.final_lr);
        Self { kind, peak, last, warmup, decay_start, steps }
    }

    /// Learning rate of a step, counted from 0. The warm-up reaches the peak with its last step;
    /// the last step of the run has the final rate.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        if step < self.decay_start {
            return self.peak;
        }
        let span = (self.steps - self.decay_start).max(1) as f64;
        let done = ((step + 1 - self.decay_start) as f64 / span).min(1.0);
        let share = match self.kind {
            // From `libm`, whose cosine has the same bits on every system.
            ScheduleKind::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * done)),
            ScheduleKind::Wsd => 1.0 - done,
        };
        self.peak * (self.last + (1.0 - self.last) * share)
    }
}
