//! CUDA C to loaded modules: NVRTC, the cache in memory and the one on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::{self as driver, CUresult};
use cudarc::nvrtc::sys::{self as nvrtc, nvrtcResult};

use crate::disk_cache::{self, Key};
use crate::error::check;
use crate::gpu::lock;
use crate::kernel::{Function, Kernel};
use crate::library::{Library, look_for};
use crate::{Error, Gpu, Result};

/// Headers every kernel may include; there are no others.
pub const HEADERS: &[(&str, &str)] = &[
    ("types.cuh", include_str!("device/types.cuh")),
    ("mma.cuh", include_str!("device/mma.cuh")),
    ("hopper.cuh", include_str!("device/hopper.cuh")),
];

/// The text of some kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Shown in errors and in the cache folder.
    pub name: &'static str,
    /// CUDA C++17 that includes nothing but `types.cuh`, `hopper.cuh` and `headers`.
    pub text: &'static str,
    /// Further headers: name in the `#include`, text.
    pub headers: &'static [(&'static str, &'static str)],
}

impl Source {
    /// A source without headers of its own.
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Source { name, text, headers: &[] }
    }
}

/// A module by the address of its source's text and its constants: looking one up on every
/// launch must not read the text.
type Name = (usize, String);

/// All modules of a device.
#[derive(Default)]
pub(crate) struct Modules {
    /// Each with a lock of its own: what one thread compiles, others need not wait for.
    functions: Mutex<HashMap<Name, Arc<Mutex<Option<Module>>>>>,
    disk: Mutex<Disk>,
}

#[derive(Default)]
struct Disk {
    folder: Option<PathBuf>,
    warning: Option<String>,
    warned: bool,
    compiled: usize,
    cached: usize,
}

/// Loaded modules are kept until the process ends.
struct Module {
    /// The source's name.
    name: &'static str,
    raw: driver::CUmodule,
    entries: HashMap<String, Arc<Function>>,
}

// SAFETY: the handle may be used from any thread once the context is current there.
unsafe impl Send for Module {}

impl Modules {
    pub(crate) fn use_cache(&self, folder: Option<PathBuf>) {
        let mut disk = lock(&self.disk);
        disk.folder = folder;
        disk.warned = false;
    }

    pub(crate) fn take_warning(&self) -> Option<String> {
        lock(&self.disk).warning.take()
    }

    pub(crate) fn counts(&self) -> (usize, usize) {
        let disk = lock(&self.disk);
        (disk.compiled, disk.cached)
    }
}

/// The machine code of `source` for compute capability `arch`, with or without such a device:
/// for checks of all kernels and their spills.
pub fn compile_for(
    source: &Source,
    arch: (u32, u32),
    defines: &[(&str, String)],
) -> Result<Vec<u8>> {
    look_for(Library::Nvrtc)?;
    let target = Target::of(arch)?;
    compile(source, &options(&target, &constants(defines)), target.real)
}

fn constants(defines: &[(&str, String)]) -> String {
    defines.iter().map(|(name, value)| format!("-D{name}={value}\n")).collect()
}

impl Gpu {
    /// The kernel `entry` of `source`, compiled for this device with `-D name=value` for each
    /// of `defines`; compiled once, then found in memory or in the cache folder.
    pub fn kernel(
        &self,
        source: &Source,
        entry: &str,
        defines: &[(&str, String)],
    ) -> Result<Kernel> {
        let name = (source.text.as_ptr() as usize, constants(defines));
        let held = lock(&self.0.modules.functions).entry(name).or_default().clone();
        let mut held = lock(&held);
        let module = match &mut *held {
            Some(module) => module,
            none => none.insert(self.module(source, &constants(defines))?),
        };
        if let Some(function) = module.entries.get(entry) {
            return Ok(Kernel { gpu: self.clone(), function: function.clone() });
        }
        let text = CString::new(entry).map_err(|_| Error::Value("an entry with a NUL".into()))?;
        let mut raw = std::ptr::null_mut();
        self.bind()?;
        // SAFETY: the module is loaded in this context and the name is terminated.
        let result = unsafe { driver::cuModuleGetFunction(&mut raw, module.raw, text.as_ptr()) };
        check("cuModuleGetFunction", result)
            .map_err(|e| Error::Value(format!("{} has no entry `{entry}`: {e}", source.name)))?;
        let function = Arc::new(Function::new(raw, format!("{}::{entry}", source.name)));
        module.entries.insert(entry.to_owned(), function.clone());
        Ok(Kernel { gpu: self.clone(), function })
    }

    /// Names, constants and entries of the modules that launches have asked for so far, in
    /// alphabetical order.
    pub fn modules(&self) -> Vec<(&'static str, String, Vec<String>)> {
        let modules = lock(&self.0.modules.functions);
        let mut all: Vec<_> = modules
            .iter()
            .filter_map(|((_, constants), held)| {
                let held = lock(held);
                let module = held.as_ref()?;
                let mut entries: Vec<String> = module.entries.keys().cloned().collect();
                entries.sort();
                Some((module.name, constants.replace("-D", "").replace('\n', " "), entries))
            })
            .collect();
        all.sort();
        all
    }

    fn module(&self, source: &Source, constants: &str) -> Result<Module> {
        // Without the compiler, what an earlier run left in the cache cannot be named either,
        // since the compiler's version is part of the name.
        look_for(Library::Nvrtc)?;
        let target = Target::of(self.arch())?;
        let options = options(&target, constants);
        let key = key(source, &options)?;
        let modules = &self.0.modules;
        let folder = lock(&modules.disk).folder.clone();
        self.bind()?;
        if let Some(folder) = &folder
            && let Some(image) = disk_cache::read(folder, source.name, &key)
            && let Ok(raw) = load(&image)
        {
            lock(&modules.disk).cached += 1;
            return Ok(Module { name: source.name, raw, entries: HashMap::new() });
        }
        let image = compile(source, &options, target.real)?;
        let raw = load(&image)?;
        let written = folder.map(|folder| disk_cache::write(&folder, source.name, &key, &image));
        let mut disk = lock(&modules.disk);
        disk.compiled += 1;
        if let Some(Err(warning)) = written
            && !std::mem::replace(&mut disk.warned, true)
        {
            disk.warning = Some(warning);
        }
        Ok(Module { name: source.name, raw, entries: HashMap::new() })
    }
}

fn load(image: &[u8]) -> Result<driver::CUmodule> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: the image is what the compiler made, whole by its checksum; the driver checks its
    // format.
    let result: CUresult =
        unsafe { driver::cuModuleLoadData(&mut raw, image.as_ptr().cast::<c_void>()) };
    check("cuModuleLoadData", result)?;
    Ok(raw)
}

/// What to compile for.
struct Target {
    name: String,
    /// Machine code, rather than PTX for a device newer than the compiler.
    real: bool,
}

impl Target {
    fn of((major, minor): (u32, u32)) -> Result<Target> {
        let arch = (major * 10 + minor) as c_int;
        let mut count = 0;
        // SAFETY: the library is loaded; the list is as long as it said.
        let known = unsafe {
            nvrtc_check("nvrtcGetNumSupportedArchs", nvrtc::nvrtcGetNumSupportedArchs(&mut count))?;
            let mut known = vec![0 as c_int; count.max(0) as usize];
            nvrtc_check(
                "nvrtcGetSupportedArchs",
                nvrtc::nvrtcGetSupportedArchs(known.as_mut_ptr()),
            )?;
            known
        };
        if known.contains(&arch) {
            // wgmma and setmaxnreg exist for sm_90a alone.
            let name = if arch == 90 { "sm_90a".into() } else { format!("sm_{arch}") };
            return Ok(Target { name, real: true });
        }
        match known.into_iter().filter(|&k| k < arch).max() {
            Some(nearest) => Ok(Target { name: format!("compute_{nearest}"), real: false }),
            None => Err(Error::Value(format!("this NVRTC cannot compile for sm_{arch}"))),
        }
    }
}

fn options(target: &Target, constants: &str) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={}", target.name),
        "--std=c++17".into(),
        "--generate-line-info".into(),
        // Else a lambda is taken for a function of the host.
        "--device-as-default-execution-space".into(),
    ];
    options.extend(constants.lines().map(str::to_owned));
    options
}

fn key(source: &Source, options: &[String]) -> Result<Key> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded.
    nvrtc_check("nvrtcVersion", unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) })?;
    let version = format!("nvrtc {major}.{minor}");
    let headers = HEADERS.iter().chain(source.headers);
    let mut parts: Vec<&[u8]> =
        vec![version.as_bytes(), source.name.as_bytes(), source.text.as_bytes()];
    parts.extend(headers.flat_map(|(name, text)| [name.as_bytes(), text.as_bytes()]));
    parts.extend(options.iter().map(|o| o.as_bytes()));
    Ok(Key::of(parts))
}

/// A program of the compiler, destroyed when dropped.
struct Program(nvrtc::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `nvrtcCreateProgram` and destroyed once.
        unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile(source: &Source, options: &[String], real: bool) -> Result<Vec<u8>> {
    let c_string = |text: &str| {
        CString::new(text).map_err(|_| Error::Value(format!("{}: a NUL in the text", source.name)))
    };
    let text = c_string(source.text)?;
    let name = c_string(&format!("{}.cu", source.name))?;
    let headers: Vec<_> = HEADERS.iter().chain(source.headers).collect();
    let names = headers.iter().map(|(n, _)| c_string(n)).collect::<Result<Vec<_>>>()?;
    let texts = headers.iter().map(|(_, t)| c_string(t)).collect::<Result<Vec<_>>>()?;
    let arguments = options.iter().map(|o| c_string(o)).collect::<Result<Vec<_>>>()?;
    let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (names, texts, arguments) = (pointers(&names), pointers(&texts), pointers(&arguments));
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings are terminated and outlive the program; counts are the lists' lengths;
    // the image and the log are read into buffers of the sizes the compiler gives.
    unsafe {
        let result = nvrtc::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            names.len() as c_int,
            texts.as_ptr(),
            names.as_ptr(),
        );
        nvrtc_check("nvrtcCreateProgram", result)?;
        let count = arguments.len() as c_int;
        let result = nvrtc::nvrtcCompileProgram(program.0, count, arguments.as_ptr());
        if result != nvrtcResult::NVRTC_SUCCESS {
            let mut length = 0;
            nvrtc_check(
                "nvrtcGetProgramLogSize",
                nvrtc::nvrtcGetProgramLogSize(program.0, &mut length),
            )?;
            let mut log = vec![0u8; length.max(1)];
            nvrtc_check(
                "nvrtcGetProgramLog",
                nvrtc::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()),
            )?;
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            return Err(Error::Compile {
                name: source.name.into(),
                options: options.join(" "),
                log,
            });
        }
        let mut length = 0;
        let mut image;
        if real {
            nvrtc_check("nvrtcGetCUBINSize", nvrtc::nvrtcGetCUBINSize(program.0, &mut length))?;
            image = vec![0u8; length];
            nvrtc_check(
                "nvrtcGetCUBIN",
                nvrtc::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()),
            )?;
        } else {
            nvrtc_check("nvrtcGetPTXSize", nvrtc::nvrtcGetPTXSize(program.0, &mut length))?;
            image = vec![0u8; length];
            nvrtc_check("nvrtcGetPTX", nvrtc::nvrtcGetPTX(program.0, image.as_mut_ptr().cast()))?;
        }
        Ok(image)
    }
}

fn nvrtc_check(call: &'static str, result: nvrtcResult) -> Result<()> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the library is loaded, since it gave `result`; the text is static.
    let reason = unsafe {
        let text = nvrtc::nvrtcGetErrorString(result);
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into() }
    };
    Err(Error::Call { call, reason })
}
