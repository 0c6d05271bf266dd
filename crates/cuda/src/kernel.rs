//! Kernels and their launches.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};

use crate::error::check;
use crate::{Error, Gpu, Result, TensorMap};

/// An entry of a loaded module.
pub(crate) struct Function {
    pub(crate) raw: sys::CUfunction,
    pub(crate) name: String,
    /// The dynamic shared memory it was allowed. What needs no asking, 48 KiB, counts static memory
    /// too, so everything is asked for.
    shared: AtomicU32,
}

// SAFETY: the handle may be used from any thread once the context is current there.
unsafe impl Send for Function {}
// SAFETY: see above.
unsafe impl Sync for Function {}

impl Function {
    pub(crate) fn new(raw: sys::CUfunction, name: String) -> Self {
        Function { raw, name, shared: AtomicU32::new(0) }
    }
}

/// A compiled kernel, ready to launch; cheap to clone.
#[derive(Clone)]
pub struct Kernel {
    pub(crate) gpu: Gpu,
    pub(crate) function: Arc<Function>,
}

/// Arguments of a launch, in the kernel's order; the types must be the kernel's.
#[derive(Default)]
pub struct Args(Vec<Arg>);

enum Arg {
    Word(u32),
    Long(u64),
    Map(Box<TensorMap>),
    /// Words of eight bytes, as every alignment here divides eight.
    Struct(Vec<u64>),
}

impl Args {
    /// No arguments yet.
    pub fn new() -> Self {
        Args(Vec::with_capacity(16))
    }

    /// A device address.
    pub fn ptr(mut self, ptr: u64) -> Self {
        self.0.push(Arg::Long(ptr));
        self
    }

    /// An `int`.
    pub fn i32(mut self, value: i32) -> Self {
        self.0.push(Arg::Word(value as u32));
        self
    }

    /// An `unsigned`.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.push(Arg::Word(value));
        self
    }

    /// A `long long`.
    pub fn i64(mut self, value: i64) -> Self {
        self.0.push(Arg::Long(value as u64));
        self
    }

    /// A `long long` from a size; sizes on a device are far below 2⁶³.
    pub fn len(self, value: usize) -> Self {
        self.i64(value as i64)
    }

    /// A `float`.
    pub fn f32(mut self, value: f32) -> Self {
        self.0.push(Arg::Word(value.to_bits()));
        self
    }

    /// A `double`.
    pub fn f64(mut self, value: f64) -> Self {
        self.0.push(Arg::Long(value.to_bits()));
        self
    }

    /// A TMA descriptor (`const __grid_constant__`).
    pub fn map(mut self, map: TensorMap) -> Self {
        self.0.push(Arg::Map(Box::new(map)));
        self
    }

    /// A struct by value, `#[repr(C)]` and the kernel's field for field; aligned to 8 at most.
    pub fn value<T: Copy>(mut self, value: T) -> Self {
        const { assert!(align_of::<T>() <= 8) };
        let mut words = vec![0u64; size_of::<T>().div_ceil(8)];
        // SAFETY: the words have room for the value; they are only ever read as its bytes by the
        // driver.
        unsafe { words.as_mut_ptr().cast::<T>().write(value) };
        self.0.push(Arg::Struct(words));
        self
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        let pointer = |arg: &mut Arg| match arg {
            Arg::Word(x) => (&raw mut *x).cast(),
            Arg::Long(x) => (&raw mut *x).cast(),
            Arg::Map(x) => (&raw mut x.0).cast(),
            Arg::Struct(x) => x.as_mut_ptr().cast(),
        };
        self.0.iter_mut().map(pointer).collect()
    }
}

impl Kernel {
    /// Lets blocks use `bytes` of dynamic shared memory; a launch does so by itself.
    pub fn set_shared(&self, bytes: u32) -> Result<()> {
        if bytes <= self.function.shared.load(Ordering::Relaxed) {
            return Ok(());
        }
        let most = self.gpu.info().shared_per_block_optin;
        if bytes > most {
            let name = &self.function.name;
            let text =
                format!("kernel {name} wants {bytes} bytes of shared memory; a block has {most}");
            return Err(Error::Value(text));
        }
        self.gpu.bind()?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is alive as long as its module, which is never unloaded.
        let result = unsafe { sys::cuFuncSetAttribute(self.function.raw, attribute, bytes as i32) };
        check("cuFuncSetAttribute", result)?;
        self.function.shared.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Lets a kernel compiled for clusters have more blocks in one than every device takes (8).
    pub fn allow_large_clusters(&self) -> Result<()> {
        self.gpu.bind()?;
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        // SAFETY: the function is alive as long as its module, which is never unloaded.
        let result = unsafe { sys::cuFuncSetAttribute(self.function.raw, attribute, 1) };
        check("cuFuncSetAttribute", result)
    }

    /// Enqueues the kernel. A grid with a zero is nothing to do.
    ///
    /// # Safety
    /// `args` are what the entry takes, and the addresses among them are valid for what the
    /// kernel does with them.
    pub unsafe fn launch(
        &self,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        mut args: Args,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.set_shared(shared)?;
        self.gpu.bind()?;
        let mut pointers = args.pointers();
        let name = &self.function.name;
        self.gpu.timed(
            || name.clone(),
            || {
                // SAFETY: the pointers lead to the values in `args`, which the call copies; the
                // rest is promised by the caller.
                let result = unsafe {
                    sys::cuLaunchKernel(
                        self.function.raw,
                        grid[0],
                        grid[1],
                        grid[2],
                        block[0],
                        block[1],
                        block[2],
                        shared,
                        self.gpu.stream(),
                        pointers.as_mut_ptr(),
                        std::ptr::null_mut(),
                    )
                };
                check("cuLaunchKernel", result).map_err(|e| match e {
                    Error::Call { call, reason } => {
                        let reason = format!(
                            "{reason}: {name}, grid {grid:?}, block {block:?}, shared {shared}"
                        );
                        Error::Call { call, reason }
                    }
                    other => other,
                })
            },
        )
    }

    /// Registers of a thread.
    pub fn registers(&self) -> Result<u32> {
        self.attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)
    }

    /// Bytes of local memory of a thread: spills and arrays that are not in registers.
    pub fn local_bytes(&self) -> Result<u32> {
        self.attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
    }

    fn attribute(&self, which: Attribute) -> Result<u32> {
        self.gpu.bind()?;
        let mut value = 0;
        // SAFETY: the function is alive.
        let result = unsafe { sys::cuFuncGetAttribute(&mut value, which, self.function.raw) };
        check("cuFuncGetAttribute", result)?;
        Ok(value.max(0) as u32)
    }
}
