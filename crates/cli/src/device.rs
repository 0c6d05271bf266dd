//! `--device`: where to compute, and why not elsewhere.

use std::fmt;
use std::str::FromStr;

use crate::error::user;

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

/// The flag, for every verb that computes.
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArg {
    /// Where to compute: auto takes CUDA when driver, cuBLASLt and NVRTC are there, else the CPU
    #[arg(long, default_value = "auto", value_name = "auto|cpu|cuda[:N]")]
    device: Wanted,
}

/// Where a verb computes.
#[derive(Clone, Debug)]
pub enum Choice {
    /// On the CPU.
    Cpu,
}

impl DeviceArg {
    /// Decides, and says on standard error when a GPU that is here is not used.
    pub fn choose(&self) -> anyhow::Result<Choice> {
        match self.device {
            Wanted::Auto | Wanted::Cpu => Ok(Choice::Cpu),
            Wanted::Cuda(_) => Err(user("this build has no CUDA")),
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
}
