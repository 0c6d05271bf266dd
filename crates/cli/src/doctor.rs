//! `tercet doctor`: what is here, what will be used, and why.

use std::fmt::Write;

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
    print!("{}", report(&machine, gemm));
    Ok(())
}

fn report(machine: &Machine, gemm: Option<f64>) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<10}{text}");
    };
    let threads = rayon::current_num_threads();
    let simd = tercet_attention::cpu::isa_name();
    let cuda = machine::cuda_driver();

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
    line(
        "cuda",
        match &cuda {
            Some(path) => format!("driver library found at {} (not loaded)", path.display()),
            None => "no driver library found".into(),
        },
    );
    if let Some(rate) = gemm {
        let side = yardstick::SIDE;
        line("gemm", format!("{rate:.0} GFLOP/s (f32 {side}×{side}×{side}, median of 9)"));
    }
    line("", String::new());
    line("will use", format!("the CPU, {threads} threads, {simd} attention kernels"));
    line(
        "because",
        match &cuda {
            Some(_) => "this release computes on the CPU only; the GPU here is not used".into(),
            None => "this release computes on the CPU only, and no GPU was found either".into(),
        },
    );
    for warning in warnings(machine, threads) {
        line("WARNING", warning);
    }
    out
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
        let text = report(&machine, Some(123.4));
        for part in ["Test CPU", "8.0 GiB", "123 GFLOP/s", "will use", "because", "2 GiB"] {
            assert!(text.contains(part), "{part} is missing from\n{text}");
        }
    }
}
