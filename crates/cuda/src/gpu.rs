//! One device with one stream.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys;

use crate::arena::Arena;
use crate::compile::Modules;
use crate::error::check;
use crate::fork::Streams;
use crate::matmul::Blas;
use crate::memory::Books;
use crate::profile::Profile;
use crate::{DeviceInfo, Error, Result, device};

/// A device, its context and one stream, on which everything happens in order. Clones are the
/// same stream; it can be used from any thread, but for the time in which another one captures a graph.
#[derive(Clone)]
pub struct Gpu(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(crate) stream: sys::CUstream,
    /// For allocations while `stream` is being captured.
    pub(crate) side: sys::CUstream,
    owns_stream: bool,
    pub(crate) streams: Mutex<Streams>,
    pub(crate) pool: sys::CUmemoryPool,
    pub(crate) modules: Arc<Modules>,
    pub(crate) blas: Mutex<Option<Blas>>,
    pub(crate) books: Mutex<Books>,
    pub(crate) arena: Mutex<Option<Arc<Arena>>>,
    /// Which thread captures a graph, see [`this_thread`]; 0 for none.
    pub(crate) capturing: AtomicUsize,
    pub(crate) profile: Profile,
}

// SAFETY: the driver's handles may be used from any thread once the context is made current
// there, which `Gpu::bind` does before every call; what is mutable is behind locks.
unsafe impl Send for Inner {}
// SAFETY: see above.
unsafe impl Sync for Inner {}

/// A number that no other living thread has, never 0.
pub(crate) fn this_thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

/// A lock whose data is consistent between statements, so that a panic elsewhere spoils nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Takes device `ordinal` with a stream of its own. Errors as [`crate::probe`], and for a
    /// device that does not exist or is too old.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        Self::build(ordinal, None, Arc::default())
    }

    /// The same device and compiled kernels on a stream that somebody else made in the device's
    /// primary context (such as PyTorch's current stream) and that outlives the result; memory is
    /// apart. 0 is the legacy default stream, which cannot be captured into a graph.
    ///
    /// # Safety
    /// `stream` is a valid `CUstream` of that device's primary context.
    pub unsafe fn with_stream(&self, stream: u64) -> Result<Gpu> {
        Self::build(self.info().ordinal, Some(stream), self.0.modules.clone())
    }

    fn build(ordinal: usize, foreign: Option<u64>, modules: Arc<Modules>) -> Result<Gpu> {
        let info = device::select(ordinal)?;
        let device = device::handle(ordinal)?;
        let mut inner = Inner {
            info,
            device,
            context: std::ptr::null_mut(),
            stream: std::ptr::null_mut(),
            side: std::ptr::null_mut(),
            owns_stream: foreign.is_none(),
            streams: Mutex::default(),
            pool: std::ptr::null_mut(),
            modules,
            blas: Mutex::new(None),
            books: Mutex::default(),
            arena: Mutex::new(None),
            capturing: AtomicUsize::new(0),
            profile: Profile::default(),
        };
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the device is valid; each call writes to the handle given. On an error `inner`
        // gives back what was made so far.
        unsafe {
            check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&mut inner.context, device),
            )?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(inner.context))?;
            check("cuStreamCreate", sys::cuStreamCreate(&mut inner.side, non_blocking))?;
            inner.pool = crate::memory::create_pool(ordinal)?;
            match foreign {
                Some(stream) => inner.stream = stream as sys::CUstream,
                None => {
                    check("cuStreamCreate", sys::cuStreamCreate(&mut inner.stream, non_blocking))?;
                }
            }
        }
        Ok(Gpu(Arc::new(inner)))
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Compute capability, such as (9, 0).
    pub fn arch(&self) -> (u32, u32) {
        self.0.info.arch
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.0.info.multiprocessors
    }

    /// Whether two handles are the same device and stream.
    pub fn same(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits until everything asked for so far has happened; errors of kernels show up here.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is alive as long as `self`.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.0.stream) })
    }

    /// Keeps compiled kernels in `folder` from now on, `None` for not at all (the state after
    /// opening). The folder is made when the first kernel is written.
    pub fn use_cache(&self, folder: Option<PathBuf>) {
        self.0.modules.use_cache(folder);
    }

    /// Why the cache folder could not be used, once; kernels were compiled all the same.
    pub fn cache_warning(&self) -> Option<String> {
        self.0.modules.take_warning()
    }

    /// How many kernels' modules were compiled, and how many read from the cache folder.
    pub fn compiled_and_cached(&self) -> (usize, usize) {
        self.0.modules.counts()
    }

    /// Makes the context current on this thread; cheap. An error while another thread captures a
    /// graph: what this one asks would become part of it.
    pub(crate) fn bind(&self) -> Result<()> {
        let owner = self.0.capturing.load(Ordering::Acquire);
        if owner != 0 && owner != this_thread() {
            return Err(Error::Value(
                "another thread is capturing a graph on this device; wait for it".into(),
            ));
        }
        self.make_current()
    }

    /// As [`Gpu::bind`] for what is given back, which any thread may do at any time.
    pub(crate) fn make_current(&self) -> Result<()> {
        // SAFETY: the context is alive as long as `self`.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.0.context) })
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "cuda:{} ({})", self.info().ordinal, self.info().name)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The compiled modules outlive this stream when another handle shares them; they are
        // unloaded with the context. Errors cannot be reported from here.
        // SAFETY: nothing uses the handles any more; those never made are null.
        unsafe {
            if self.context.is_null() {
                return;
            }
            sys::cuCtxSetCurrent(self.context);
            if let Some(blas) = lock(&self.blas).take() {
                blas.destroy();
            }
            *lock(&self.streams) = Streams::default();
            if self.owns_stream && !self.stream.is_null() {
                sys::cuStreamSynchronize(self.stream);
                sys::cuStreamDestroy_v2(self.stream);
            }
            if !self.side.is_null() {
                sys::cuStreamDestroy_v2(self.side);
            }
            if !self.pool.is_null() {
                sys::cuMemPoolDestroy(self.pool);
            }
            // The primary context is kept: loaded modules live in it and it is shared with
            // whoever else uses the device in this process.
            let _ = self.device;
        }
    }
}
