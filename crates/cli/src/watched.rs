//! What every verb that trains does around its training: the device, Ctrl-C, the bar.

use std::time::Duration;

use tercet_train::config::Precision;
use tercet_train::{Control, Event, Result};

use crate::device::DeviceArg;
use crate::progress::Watcher;
use crate::{interrupt, yardstick};

/// A run that can be watched and stopped.
pub struct Watched<'a> {
    /// What is said with the device, such as `training`.
    pub doing: &'a str,
    /// Where to compute.
    pub device: &'a DeviceArg,
    /// Go on with what is there.
    pub resume: bool,
    /// Storage type whose matrix products the pace is compared with; `None` for no comparison.
    pub yardstick: Option<Precision>,
    /// What must stand on every line of the run; empty for nothing.
    pub stamp: &'a str,
}

impl Watched<'_> {
    /// Runs `train`, shows its events, and gives back what it came to.
    pub fn run<T>(
        &self,
        train: impl FnOnce(&Control, &mut dyn FnMut(Event)) -> Result<T>,
    ) -> anyhow::Result<T> {
        let stop = interrupt::stop_flag()?;
        let device = self.device.choose()?;
        let tensors = device.tensors();
        eprintln!("{} on {device}", self.doing);
        let gemm_flops = match self.yardstick {
            None => None,
            Some(precision) => {
                let bf16 = precision == Precision::Bf16;
                Some(1e9 * yardstick::matmul_gflops(&device, bf16, 5)?)
            }
        };
        let control = Control { stop: &stop, resume: self.resume, gemm_flops, device: &tensors };
        let mut watcher = Watcher::new(Duration::ZERO, self.stamp);
        let outcome = train(&control, &mut |event| watcher.show(&event));
        watcher.finish();
        Ok(outcome?)
    }
}
