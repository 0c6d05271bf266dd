//! Time on the device.

use cudarc::driver::sys;

use crate::error::check;
use crate::{Error, Gpu, Result};

type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// The call that every driver has; the bindings only know the one of CUDA 12.8 and newer.
fn elapsed() -> Result<Elapsed> {
    // SAFETY: the driver is loaded, and the call has had this type since CUDA 2.
    let found = unsafe { sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0") };
    found
        .map(|call| *call)
        .map_err(|e| Error::Call { call: "cuEventElapsedTime", reason: e.to_string() })
}

/// A moment of the stream.
pub(crate) struct Event(sys::CUevent);

// SAFETY: the handle may be used from any thread once the context is current there.
unsafe impl Send for Event {}

impl Event {
    pub(crate) fn record(gpu: &Gpu) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: the context is current and the stream alive; the handle is written before use.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&mut event, flags))?;
            let event = Event(event);
            check("cuEventRecord", sys::cuEventRecord(event.0, gpu.0.stream))?;
            Ok(event)
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record` and destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Gpu {
    /// Milliseconds that the device spends on what `work` asks of it, between two events of the
    /// stream; waits for the end.
    pub fn time<E: From<Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<f32, E> {
        self.bind()?;
        let start = Event::record(self)?;
        work()?;
        self.bind()?;
        let end = Event::record(self)?;
        // SAFETY: the event is alive and recorded.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(end.0) })?;
        Ok(between(&start, &end)?)
    }
}

/// Milliseconds between two events that have both happened.
pub(crate) fn between(start: &Event, end: &Event) -> Result<f32> {
    let mut milliseconds = 0.0;
    // SAFETY: both events are alive and recorded.
    let result = unsafe { elapsed()?(&mut milliseconds, start.0, end.0) };
    check("cuEventElapsedTime", result)?;
    Ok(milliseconds)
}
