//! `tercet doctor`: what is here, what will be used, and why.

use std::fmt::Write;

use tercet_cuda::{DeviceInfo, Gpu, Library, look_for};

use crate::machine::{self, Machine};
use crate::{human, lock, yardstick};

/// Look at this machine, and say what will be used and why.
///
/// CPU features, threads, memory, devices, versions, and the speed of a matrix product, which
/// everything else is compared with.
#[derive(clap::Args)]
pub struct Args {
    /// Do not time the matrix product (about a second)
    #[arg(long)]
    quick: bool,
}

/// Prints the report.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let machine = Machine::detect();
    let gemm = (!args.quick).then(|| yardstick::gemm_gflops(9));
    print!("{}", report(&machine, gemm, &Cuda::look()));
    Ok(())
}

fn report(machine: &Machine, gemm: Option<f64>, cuda: &Cuda) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<10}{text}");
    };
    let threads = rayon::current_num_threads();
    let simd = tercet_attention::cpu::isa_name();

    let build = if cfg!(debug_assertions) { "DEBUG build" } else { "release build" };
    let (arch, os) = (std::env::consts::ARCH, std::env::consts::OS);
    line("tercet", format!("{} ({build}, {arch}-{os})", env!("CARGO_PKG_VERSION")));
    let libraries = ["gemm", "rayon", "safetensors", "tokenizers"]
        .map(|name| format!("{name} {}", lock::version(name).unwrap_or("portable")));
    line("libraries", libraries.join(", "));
    line("cpu", machine.cpu.clone());
    let features: Vec<String> = machine::simd_features()
        .into_iter()
        .map(|(name, has)| format!("{name} {}", if has { "yes" } else { "no" }))
        .collect();
    line("features", features.join(", "));
    line("threads", format!("{threads} of {} logical cores", machine.cores));
    line(
        "memory",
        format!(
            "{} in all, {} available",
            human::bytes(machine.memory_total),
            human::bytes(machine.memory_available)
        ),
    );
    for text in &cuda.lines {
        line("cuda", text.clone());
    }
    let cache = crate::device::cache_folder();
    let cache = cache.map_or("no folder: HOME is not set".into(), |f| f.display().to_string());
    line("cache", format!("{cache} (compiled kernels; TERCET_CACHE names another)"));
    if let Some(rate) = gemm {
        let side = yardstick::SIDE;
        line("gemm", format!("{rate:.0} GFLOP/s (f32 {side}×{side}×{side}, median of 9)"));
    }
    line("", String::new());
    match &cuda.usable {
        Ok(device) => {
            line("will use", format!("{device}, where --device does not say cpu"));
            line("because", "driver, NVRTC, cuBLASLt and a device were found".into());
        }
        Err(reason) => {
            line("will use", format!("the CPU, {threads} threads, {simd} attention kernels"));
            line("because", reason.clone());
        }
    }
    for warning in warnings(machine, threads) {
        line("WARNING", warning);
    }
    out
}

/// What there is for computing on a GPU.
struct Cuda {
    /// One line for each library and device.
    lines: Vec<String>,
    /// The device that `--device auto` takes, or why there is none.
    usable: Result<String, String>,
}

impl Cuda {
    fn look() -> Self {
        let mut lines = Vec::new();
        let mut missing = None;
        for library in Library::ALL {
            match look_for(library) {
                Ok(place) => lines.push(format!("{} found: {place}", library.name())),
                Err(reason) => {
                    lines.push(reason.to_string());
                    missing.get_or_insert(format!("{} was not found", library.name()));
                }
            }
        }
        let devices = match look_for(Library::Cuda) {
            Ok(_) => tercet_cuda::probe(),
            Err(_) => Ok(Vec::new()),
        };
        let mut usable = Err("no GPU was found".to_owned());
        match devices {
            Ok(devices) => {
                lines.extend(devices.iter().map(describe));
                if let Some(first) = devices.first() {
                    usable = match Gpu::open(first.ordinal) {
                        Ok(_) => Ok(format!("cuda:{} ({})", first.ordinal, first.name)),
                        Err(reason) => Err(reason.to_string()),
                    };
                }
            }
            Err(reason) => {
                lines.push(reason.to_string());
                usable = Err(reason.to_string());
            }
        }
        Self { lines, usable: missing.map_or(usable, Err) }
    }
}

fn describe(device: &DeviceInfo) -> String {
    let DeviceInfo { ordinal, name, arch, multiprocessors, total_memory, l2, driver, .. } = device;
    format!(
        "cuda:{ordinal} {name}, compute capability {}.{}, {multiprocessors} multiprocessors, {}, \
         L2 {}, driver for CUDA {}.{}",
        arch.0,
        arch.1,
        human::bytes(*total_memory),
        human::bytes(*l2),
        driver.0,
        driver.1
    )
}

fn warnings(machine: &Machine, threads: usize) -> Vec<String> {
    let mut all = Vec::new();
    if cfg!(debug_assertions) {
        all.push("built without --release: expect a tenth of the speed or less".into());
    }
    if threads > machine.cores {
        all.push(format!("{threads} threads on {} cores will only get in each other's way", {
            machine.cores
        }));
    }
    let has = |name| machine::simd_features().iter().any(|&(n, has)| n == name && has);
    if cfg!(target_arch = "x86_64") && !(has("AVX2") && has("FMA")) {
        all.push("NO AVX2 AND FMA ON THIS CPU: the slow portable kernels will be used".into());
    }
    if machine.memory_available != 0 && machine.memory_available < 2 << 30 {
        all.push(
            "less than 2 GiB of memory is available; `tercet plan` says what a run needs".into(),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_what_will_be_used_and_why() {
        let machine = Machine {
            cpu: "Test CPU".into(),
            cores: 1024,
            memory_total: 8 << 30,
            memory_available: 1 << 30,
        };
        let lines = vec!["cuda:0 Card".to_owned()];
        let mut cuda = Cuda { lines, usable: Err("NVRTC was not found".into()) };
        let text = report(&machine, Some(123.4), &cuda);
        assert!(text.contains("NVRTC was not found") && text.contains("cuda:0 Card"), "{text}");
        cuda.usable = Ok("cuda:0 (Card)".into());
        assert!(report(&machine, None, &cuda).contains("will use  cuda:0 (Card)"));
        for part in ["Test CPU", "8.0 GiB", "123 GFLOP/s", "will use", "because", "2 GiB"] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
    }
}
