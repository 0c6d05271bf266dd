//! How fast a run goes, and when it will be done.

use std::time::Instant;

use crate::event::Progress;
use crate::metrics::StepRecord;

/// Weight of the newest step in the running average.
const NEWEST: f64 = 0.1;

/// Turns the time of steps into rates.
pub struct Pace {
    flops_per_token: f64,
    gemm_flops: Option<f64>,
    steps: u64,
    begin: Instant,
    /// Running averages of a step's seconds and tokens.
    average: Option<[f64; 2]>,
    /// Steps, their seconds and tokens since the process began.
    done: u64,
    seconds: f64,
    tokens: f64,
}

impl Pace {
    /// Begins now, with `steps` steps in the whole run.
    pub fn new(steps: u64, flops_per_token: f64, gemm_flops: Option<f64>) -> Self {
        Self {
            flops_per_token,
            gemm_flops,
            steps,
            begin: Instant::now(),
            average: None,
            done: 0,
            seconds: 0.0,
            tokens: 0.0,
        }
    }

    /// Where the run stands after a step of `tokens` tokens.
    pub fn after(&mut self, record: StepRecord, tokens: u64) -> Progress {
        let newest = [record.seconds, tokens as f64];
        self.done += 1;
        self.seconds += newest[0];
        self.tokens += newest[1];
        let average = self.average.map_or(newest, |average| {
            std::array::from_fn(|i| average[i] + NEWEST * (newest[i] - average[i]))
        });
        self.average = Some(average);
        // Wall time: evaluations, samples and checkpoints are part of the way that is left.
        let wall = self.begin.elapsed().as_secs_f64() / self.done as f64;
        let (tokens_per_second, flops_per_second, gemm_share) = self.rates(average);
        Progress {
            steps: self.steps,
            tokens_per_second,
            flops_per_second,
            gemm_share,
            seconds_left: wall * self.steps.saturating_sub(record.step) as f64,
            record,
        }
    }

    /// Tokens per second, FLOP/s and share of the matrix-product rate over all steps.
    pub fn overall(&self) -> (f64, f64, Option<f64>) {
        if self.done == 0 {
            return (0.0, 0.0, None);
        }
        self.rates([self.seconds, self.tokens])
    }

    fn rates(&self, [seconds, tokens]: [f64; 2]) -> (f64, f64, Option<f64>) {
        let tokens = if seconds > 0.0 { tokens / seconds } else { 0.0 };
        let flops = tokens * self.flops_per_token;
        (tokens, flops, self.gemm_flops.map(|peak| flops / peak))
    }
}
