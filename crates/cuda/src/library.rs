//! Finding shared libraries without failing.
//!
//! The bindings load a library by its bare name when it is first used, and panic when that does
//! not work. So it is looked for here first: under the same names, then in the folders where
//! toolkits put it. A library loaded from a folder is found again by its bare name.

use std::path::PathBuf;
use std::sync::OnceLock;

use crate::{Error, Result};

/// A library that is loaded when needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver.
    Cuda,
    /// The kernel compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
}

impl Library {
    /// All of them, in the order of need.
    pub const ALL: [Library; 3] = [Library::Cuda, Library::Nvrtc, Library::CublasLt];

    /// Its name without an extension.
    pub fn name(self) -> &'static str {
        match self {
            Library::Cuda => "libcuda",
            Library::Nvrtc => "libnvrtc",
            Library::CublasLt => "libcublasLt",
        }
    }

    fn stem(self) -> &'static str {
        &self.name()[3..]
    }

    /// Names under which the bindings look, too.
    fn file_names(self) -> Vec<String> {
        let mut names = cudarc::get_lib_name_candidates(self.stem());
        if self == Library::Cuda {
            names.extend(cudarc::get_lib_name_candidates("nvcuda"));
        }
        names
    }
}

/// Where a library was found (a file name that the system's loader resolved, or a path), or why
/// it cannot be used.
pub fn look_for(library: Library) -> Result<String> {
    static FOUND: [OnceLock<Result<String>>; 3] = [const { OnceLock::new() }; 3];
    FOUND[library as usize].get_or_init(|| load(library)).clone()
}

fn load(library: Library) -> Result<String> {
    let names = library.file_names();
    let open = |name: &std::ffi::OsStr| {
        // SAFETY: loading runs the library's constructors; these are NVIDIA's own libraries,
        // asked for by their own names.
        let loaded = unsafe { libloading::Library::new(name) };
        // The handle is kept for ever, so that the bare name goes on finding it.
        loaded.map(std::mem::forget).is_ok()
    };
    if let Some(name) = names.iter().find(|name| open(name.as_ref())) {
        return Ok(name.clone());
    }
    let folders = folders();
    for folder in &folders {
        for name in &names {
            let path = folder.join(name);
            if path.exists() && open(path.as_os_str()) {
                return Ok(path.display().to_string());
            }
        }
    }
    let mut places: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
    places.insert(0, "the loader's search path (LD_LIBRARY_PATH, ld.so.conf)".into());
    let looked = format!("{} and its versioned names in {}", names[0], places.join(", "));
    Err(Error::Missing { name: library.name(), looked })
}

/// Where toolkits and drivers put their libraries when the loader has not been told.
fn folders() -> Vec<PathBuf> {
    let mut roots = vec![PathBuf::from("/usr/local/cuda"), PathBuf::from("/opt/cuda")];
    if let Ok(entries) = std::fs::read_dir("/usr/local") {
        let mut versions: Vec<_> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cuda-"))
            })
            .collect();
        versions.sort();
        roots.extend(versions.into_iter().rev());
    }
    let mut folders = Vec::new();
    for root in roots {
        folders.extend(
            ["lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|f| root.join(f)),
        );
    }
    folders.push(PathBuf::from("/usr/lib/wsl/lib"));
    folders.retain(|folder| folder.is_dir());
    folders
}
