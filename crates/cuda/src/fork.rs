//! Work of a graph that does not wait for one another: small launches, a few blocks each, then
//! share the device instead of queueing for it.

use std::sync::MutexGuard;

use cudarc::driver::sys;

use crate::error::check;
use crate::gpu::lock;
use crate::{Gpu, Result};

/// Most branches that run at once; more take turns.
pub(crate) const BRANCHES: usize = 8;

/// Where launches go.
#[derive(Default)]
pub(crate) struct Streams {
    /// Whether a fork is open.
    forked: bool,
    /// The branch at work, from 0 on, which is the stream itself.
    at: usize,
    /// The branches from 1 on, made when a graph first forks.
    sides: Vec<Side>,
    start: Option<Mark>,
}

/// A stream beside the main one, and the end of what it was asked.
struct Side {
    stream: sys::CUstream,
    end: Mark,
    /// Whether the open fork has used it.
    used: bool,
}

/// An event that orders streams and is never timed.
struct Mark(sys::CUevent);

// SAFETY: the driver's handles may be used from any thread once the context is current there.
unsafe impl Send for Side {}
// SAFETY: as above.
unsafe impl Send for Mark {}

impl Mark {
    fn new() -> Result<Self> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is current; the handle is written before use.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, flags) })?;
        Ok(Mark(event))
    }

    /// `after` goes on when `before` has done what it was asked so far.
    fn order(&self, before: sys::CUstream, after: &[sys::CUstream]) -> Result<()> {
        // SAFETY: the event and the streams are alive.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, before) })?;
        after.iter().try_for_each(|&stream| {
            // SAFETY: as above.
            check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, self.0, 0) })
        })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made by `new` and destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Side {
    fn new() -> Result<Self> {
        let end = Mark::new()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the handle is written before use.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(Side { stream, end, used: false })
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: made by `new` and destroyed once.
        unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}

/// An open fork, ended by [`Fork::join`]. One inside another changes nothing.
pub struct Fork {
    gpu: Gpu,
    /// Whether this one opened it.
    own: bool,
}

impl Gpu {
    /// From here on until [`Fork::join`], what is asked between two calls of [`Fork::branch`] is a
    /// branch: it waits for what came before the fork and may run beside the other branches, whose
    /// results it must not read. Outside of a capture branches run one after another; their
    /// products choose the same algorithms, so the bits are the same.
    pub fn fork(&self) -> Result<Fork> {
        let mut streams = self.streams();
        let own = !std::mem::replace(&mut streams.forked, true);
        let fork = Fork { gpu: self.clone(), own };
        if own && self.is_capturing() {
            self.bind()?;
            if streams.start.is_none() {
                streams.start = Some(Mark::new()?);
            }
            if let Some(start) = &streams.start {
                // Branches wait for it when they begin.
                start.order(self.0.stream, &[])?;
            }
        }
        drop(streams);
        Ok(fork)
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        lock(&self.0.streams)
    }

    fn is_capturing(&self) -> bool {
        lock(&self.0.arena).is_some()
    }

    /// Where the next launch goes.
    pub(crate) fn stream(&self) -> sys::CUstream {
        let streams = self.streams();
        match streams.at.checked_sub(1) {
            Some(side) if self.is_capturing() => streams.sides[side].stream,
            _ => self.0.stream,
        }
    }

    /// The branch at work, when a fork is open.
    pub(crate) fn branch(&self) -> Option<usize> {
        let streams = self.streams();
        streams.forked.then_some(streams.at)
    }
}

impl Fork {
    /// Begins the next branch; what follows the fork itself is the first one.
    pub fn branch(&self) -> Result<()> {
        if !self.own {
            return Ok(());
        }
        let mut streams = self.gpu.streams();
        let at = (streams.at + 1) % BRANCHES;
        if at > 0 && self.gpu.is_capturing() {
            self.gpu.bind()?;
            if streams.sides.len() < at {
                streams.sides.push(Side::new()?);
            }
            let Streams { sides, start: Some(start), .. } = &mut *streams else {
                return Err(crate::Error::Value("a fork that began before its graph".into()));
            };
            if !std::mem::replace(&mut sides[at - 1].used, true) {
                // SAFETY: both are alive.
                let result = unsafe { sys::cuStreamWaitEvent(sides[at - 1].stream, start.0, 0) };
                check("cuStreamWaitEvent", result)?;
            }
        }
        streams.at = at;
        Ok(())
    }

    /// What is asked from here on waits for all branches.
    pub fn join(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.own) {
            return Ok(());
        }
        let mut streams = self.gpu.streams();
        (streams.forked, streams.at) = (false, 0);
        let mut outcome = Ok(());
        for side in &mut streams.sides {
            if std::mem::take(&mut side.used) {
                let joined = side.end.order(side.stream, &[self.gpu.0.stream]);
                outcome = outcome.and(joined);
            }
        }
        drop(streams);
        if let Some(arena) = &*lock(&self.gpu.0.arena) {
            arena.joined();
        }
        outcome
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // After an error: the work is given up, and with it the graph.
        let _ = self.end();
    }
}
