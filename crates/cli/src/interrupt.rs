//! Ctrl-C and SIGTERM become a flag that long verbs look at between steps.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The flag that Ctrl-C and SIGTERM raise. The handlers are installed on the first call, so a
/// verb that never asks is ended by the signal as usual. A second signal ends the process at
/// once, with exit code 1.
pub fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    if let Some(stop) = STOP.get() {
        return Ok(stop.clone());
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The order matters: the shutdown looks at the flag before the second handler raises it.
        flag::register_conditional_shutdown(signal, 1, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    Ok(STOP.get_or_init(|| stop).clone())
}

/// Lets `tercet … | head` end quietly, as other commands do, instead of failing on a closed
/// pipe. Verbs with something to save do not call this.
#[cfg(unix)]
pub fn end_on_closed_pipe() -> anyhow::Result<()> {
    let always = Arc::new(AtomicBool::new(true));
    flag::register_conditional_default(signal_hook::consts::SIGPIPE, always)?;
    Ok(())
}

/// Pipes end differently elsewhere; nothing to do.
#[cfg(not(unix))]
pub fn end_on_closed_pipe() -> anyhow::Result<()> {
    Ok(())
}
