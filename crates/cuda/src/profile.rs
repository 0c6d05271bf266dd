//! Where the time goes: every launch between two events, added up by kernel.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::gpu::lock;
use crate::timing::{Event, between};
use crate::{Error, Gpu, Result};

/// Launches that are being timed.
#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    launches: Mutex<Vec<(String, Event, Event)>>,
}

/// All launches of one kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// `source::entry`, or the sizes and types of a product.
    pub name: String,
    /// How often it ran.
    pub count: usize,
    /// Milliseconds of all of them.
    pub milliseconds: f64,
}

impl Gpu {
    /// Runs `work` and says how long its kernels and products took, the longest first. The
    /// events cost a microsecond or two a launch, so the sum is more than the work takes
    /// otherwise; fills and copies are not counted.
    pub fn profile<R, E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<(R, Vec<KernelTime>), E> {
        let profile = &self.0.profile;
        lock(&profile.launches).clear();
        profile.on.store(true, Ordering::Relaxed);
        let outcome = work();
        profile.on.store(false, Ordering::Relaxed);
        let value = outcome?;
        self.synchronize()?;
        let mut sums: HashMap<String, (usize, f64)> = HashMap::new();
        for (name, start, end) in lock(&profile.launches).drain(..) {
            let sum = sums.entry(name).or_default();
            sum.0 += 1;
            sum.1 += f64::from(between(&start, &end)?);
        }
        let of = |(name, (count, milliseconds))| KernelTime { name, count, milliseconds };
        let mut times: Vec<KernelTime> = sums.into_iter().map(of).collect();
        times.sort_by(|a, b| {
            b.milliseconds.total_cmp(&a.milliseconds).then_with(|| a.name.cmp(&b.name))
        });
        Ok((value, times))
    }

    /// Runs `launch` between two events when somebody wants to know.
    pub(crate) fn timed(
        &self,
        name: impl FnOnce() -> String,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let profile = &self.0.profile;
        if !profile.on.load(Ordering::Relaxed) {
            return launch();
        }
        let start = Event::record(self)?;
        launch()?;
        let end = Event::record(self)?;
        lock(&profile.launches).push((name(), start, end));
        Ok(())
    }
}
