//! `--device`: where to compute, and why not elsewhere.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::OnceLock;

use tercet_cuda::{Gpu, Library, look_for};
use tercet_tensor::Device;
use tercet_train::files;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// CUDA when everything it needs is there, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device.
    Cuda(usize),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        match lower.split_once(':') {
            None if lower == "auto" => Ok(Self::Auto),
            None if lower == "cpu" => Ok(Self::Cpu),
            None if lower == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) => match ordinal.parse::<u16>() {
                Ok(ordinal) => Ok(Self::Cuda(ordinal.into())),
                Err(_) => Err(format!("`{ordinal}` is not the number of a CUDA device")),
            },
            _ => Err(format!("`{text}` is no device; expected auto, cpu, cuda or cuda:N")),
        }
    }
}

/// The flag of every verb that computes.
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArg {
    /// Where to compute: auto takes CUDA when driver, cuBLASLt and NVRTC are there, else the CPU
    #[arg(
        long,
        default_value = "auto",
        value_name = "auto|cpu|cuda[:N]",
        hide_default_value = true
    )]
    device: Wanted,
}

/// Where a verb computes.
#[derive(Clone, Debug)]
pub enum Choice {
    /// On the CPU.
    Cpu,
    /// On a GPU.
    Cuda(Gpu),
}

impl DeviceArg {
    /// Decides, and says on standard error when a GPU that is here is not used.
    pub fn choose(&self) -> anyhow::Result<Choice> {
        match self.device {
            Wanted::Cpu => Ok(Choice::Cpu),
            Wanted::Cuda(ordinal) => {
                let gpu = open(ordinal).map_err(|e| {
                    anyhow::Error::new(e).context(format!("--device cuda:{ordinal} cannot be used"))
                })?;
                Ok(Choice::Cuda(gpu))
            }
            // Without a driver there is no GPU to miss.
            Wanted::Auto if look_for(Library::Cuda).is_err() => Ok(Choice::Cpu),
            Wanted::Auto => match open(0) {
                Ok(gpu) => Ok(Choice::Cuda(gpu)),
                Err(reason) => {
                    eprintln!(
                        "tercet: THE CPU IS USED, NOT THE GPU: {reason} (--device cpu takes the \
                         CPU without this line)"
                    );
                    Ok(Choice::Cpu)
                }
            },
        }
    }

    /// Whether a GPU is asked for by name.
    pub fn is_cuda(&self) -> bool {
        matches!(self.device, Wanted::Cuda(_))
    }
}

impl Choice {
    /// Where tensors live.
    pub fn tensors(&self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda(gpu) => Device::Cuda(gpu.clone()),
        }
    }

    /// As --device takes it.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Cuda(gpu) => format!("cuda:{}", gpu.info().ordinal),
        }
    }

    /// The GPU, if that is where to compute.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(gpu),
        }
    }
}

/// The device that was opened, for [`farewell`].
static OPENED: OnceLock<Gpu> = OnceLock::new();

/// Opens a device once everything it needs is known to be there.
fn open(ordinal: usize) -> tercet_cuda::Result<Gpu> {
    for library in Library::ALL {
        look_for(library)?;
    }
    let gpu = Gpu::open(ordinal)?;
    gpu.use_cache(cache_folder());
    Ok(OPENED.get_or_init(|| gpu).clone())
}

/// Where compiled kernels are kept: `TERCET_CACHE`, else the user's cache folder.
pub fn cache_folder() -> Option<PathBuf> {
    let folder =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(chosen) = folder("TERCET_CACHE") {
        return Some(chosen);
    }
    let caches = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library/Caches"))
    } else {
        folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))
    };
    caches.map(|caches| caches.join("tercet"))
}

/// What is worth saying when a verb has ended: that kernels could not be kept, for one.
pub fn farewell() {
    let Some(gpu) = OPENED.get() else { return };
    if let Some(warning) = gpu.cache_warning() {
        eprintln!("tercet: {warning}");
    }
    // For whoever keeps the list of `tercet kernels`: the constants of real launches.
    if let Some(path) = std::env::var_os("TERCET_KERNELS") {
        let line = |(name, constants, entries): (&str, String, Vec<String>)| {
            format!("{name} {}: {}\n", constants.trim(), entries.join(" "))
        };
        let lines: String = gpu.modules().into_iter().map(line).collect();
        if let Err(error) = files::write_atomic(path.as_ref(), lines.as_bytes()) {
            eprintln!("tercet: {error}");
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Cpu => {
                let threads = rayon::current_num_threads();
                let kernels = tercet_attention::cpu::isa_name();
                write!(f, "the CPU, {threads} threads, {kernels} kernels")
            }
            Self::Cuda(gpu) => {
                let info = gpu.info();
                write!(f, "cuda:{} ({})", info.ordinal, info.name)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_people_write_them() {
        for (text, wanted) in [
            ("auto", Wanted::Auto),
            ("CPU", Wanted::Cpu),
            ("cuda", Wanted::Cuda(0)),
            ("cuda:3", Wanted::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(wanted));
        }
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "cuda:99999999"] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }

    #[test]
    fn without_a_driver_auto_is_the_cpu_and_cuda_says_what_is_missing() {
        if look_for(Library::Cuda).is_ok() {
            println!("skipped: there is a driver here");
            return;
        }
        assert!(matches!(DeviceArg { device: Wanted::Auto }.choose(), Ok(Choice::Cpu)));
        let error = DeviceArg { device: Wanted::Cuda(0) }.choose().unwrap_err();
        let text = crate::error::message(&error);
        assert!(text.contains("libcuda") && text.contains("looked for"), "{text}");
        assert_eq!(crate::error::exit_code(&error), 2);
    }
}
