//! `tercet bench attention`: the operator, piece by piece, against dense attention.

use std::path::PathBuf;

use anyhow::Context;
use half::bf16;
use tercet_attention::{Dims, Element, NsaSpec};
use tercet_cuda::Number;

use super::gpu;
use super::operands::Operands;
use super::operator::{self, Measured, Plan, ROWS};
use super::report::{self, Setting};
use super::timing::Effort;
use crate::device::{Choice, DeviceArg};
use crate::error::user;
use crate::machine::Machine;
use crate::{human, yardstick};

/// Time dense and native sparse attention on this machine: each piece alone, forward, backward,
/// and one decode step. Rates are GFLOP/s and a share of what a matrix product reaches in the same
/// run: `gemm`'s on the CPU, cuBLASLt's on a GPU.
#[derive(clap::Args)]
#[command(after_help = "Rows: forward/{dense,compress,cmp,score+select,slc,win,gate,nsa}, \
    backward/{dense,compress,cmp,slc,win,gate,nsa}, decode/{dense,nsa}.\n\
    `nsa` is the whole operator, compression included.")]
pub struct Args {
    /// Sequence lengths, such as 1k,2k,4k
    #[arg(long, value_delimiter = ',', value_parser = human::parse_length,
          default_value = "1k,2k,4k,8k", value_name = "T,…")]
    lengths: Vec<usize>,
    /// Query heads
    #[arg(long, default_value_t = 16, value_name = "H")]
    heads: usize,
    /// Key/value heads
    #[arg(long, default_value_t = 1, value_name = "K")]
    kv_heads: usize,
    /// Key dimension of a head
    #[arg(long, default_value_t = 64, value_name = "D")]
    dim: usize,
    /// Value dimension of a head [default: the key dimension]
    #[arg(long, value_name = "V")]
    value_dim: Option<usize>,
    /// Storage type; arithmetic is always f32
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// JSON file with the sparse spec [default: the paper's 32/16/64/16, window 512]
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// Only these rows, or whole phases such as `forward`
    #[arg(long, value_delimiter = ',', value_name = "ROW,…")]
    rows: Vec<String>,
    /// Seconds to repeat each row for (at least three runs; very long ones run once)
    #[arg(long, default_value_t = 0.5, value_name = "S")]
    seconds: f64,
    #[command(flatten)]
    device: DeviceArg,
    /// Seed of the random inputs
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write everything to this JSON file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw time against length to this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Longest sequence that is timed; dense attention over it would already take hours.
const LONGEST: usize = 1 << 22;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dtype {
    F32,
    Bf16,
}

/// Measures and prints; writes the files asked for.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let wanted = wanted(&args.rows)?;
    let spec = match &args.spec {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the spec {}", path.display()))?;
            let spec: NsaSpec = serde_json::from_str(&text)
                .with_context(|| format!("{} is not an NSA spec", path.display()))?;
            spec
        }
        None => NsaSpec::default(),
    };
    spec.validate()?;
    if !(0.0..=3600.0).contains(&args.seconds) {
        return Err(user(format!("--seconds {} is outside 0..=3600", args.seconds)));
    }
    let dims = Dims {
        heads: args.heads,
        kv_heads: args.kv_heads,
        key_dim: args.dim,
        value_dim: args.value_dim.unwrap_or(args.dim),
    };
    dims.validate()?;
    if let Some(length) = args.lengths.iter().find(|&&l| l > LONGEST) {
        let most = human::length(LONGEST);
        return Err(user(format!("--lengths: {length} is more than the {most} this can time")));
    }

    let device = args.device.choose()?;
    let bf16 = args.dtype == Dtype::Bf16;
    let setting = setting(dims, spec, bf16, args.spec.as_ref(), args.seed, &device)?;
    println!(
        "{} · {device} · matrix product {:.0} GFLOP/s (this run)\n",
        setting.cpu, setting.gemm_gflops
    );
    println!("{}", report::heading());
    let effort = Effort { seconds: args.seconds };
    let each = |m: &Measured| println!("{}", setting.line(m));
    let rows = measure(&setting, &device, &args.lengths, &wanted, effort, each)?;
    if let Some(table) = report::speedups(&rows) {
        println!("\n{table}");
    }
    if let Some(path) = &args.json {
        super::write(path, &setting.json(&rows)?)?;
    }
    if let Some(path) = &args.svg {
        super::write(path, &setting.svg(&rows))?;
    }
    Ok(())
}

/// Describes this machine and times the yardstick.
pub fn setting(
    dims: Dims,
    spec: NsaSpec,
    bf16: bool,
    spec_file: Option<&PathBuf>,
    seed: u64,
    device: &Choice,
) -> anyhow::Result<Setting> {
    Ok(Setting {
        version: env!("CARGO_PKG_VERSION"),
        cpu: match device {
            Choice::Cpu => Machine::detect().cpu,
            Choice::Cuda(gpu) => gpu.info().name.clone(),
        },
        device: device.name(),
        kernels: match device {
            Choice::Cpu => tercet_attention::cpu::isa_name(),
            Choice::Cuda(_) => "CUDA",
        },
        threads: rayon::current_num_threads(),
        heads: dims.heads,
        kv_heads: dims.kv_heads,
        key_dim: dims.key_dim,
        value_dim: dims.value_dim,
        dtype: if bf16 { "bf16" } else { "f32" },
        spec,
        spec_file: spec_file.map(|p| p.display().to_string()),
        seed,
        gemm_gflops: yardstick::matmul_gflops(device, bf16, 15)?,
    })
}

/// Runs the wanted rows for every length; `each` hears of each row as it is done.
pub fn measure(
    setting: &Setting,
    device: &Choice,
    lengths: &[usize],
    wanted: &dyn Fn(&str) -> bool,
    effort: Effort,
    each: impl Fn(&Measured),
) -> anyhow::Result<Vec<Measured>> {
    let bf16_storage = setting.dtype == "bf16";
    if let Choice::Cuda(gpu) = device {
        let number = if bf16_storage { Number::BF16 } else { Number::F32 };
        let mut rows = Vec::new();
        let mut keep = |m: Measured| {
            each(&m);
            rows.push(m);
        };
        for &tokens in lengths {
            let operator = (setting.dims(), &setting.spec);
            let mut plan = gpu::Plan { wanted, effort, each: &mut keep };
            gpu::measure(gpu, number, operator, tokens, setting.seed, &mut plan)?;
        }
        return Ok(rows);
    }
    Ok(match bf16_storage {
        true => measure_as::<bf16>(setting, lengths, wanted, effort, each)?,
        false => measure_as::<f32>(setting, lengths, wanted, effort, each)?,
    })
}

fn measure_as<E: Element>(
    setting: &Setting,
    lengths: &[usize],
    wanted: &dyn Fn(&str) -> bool,
    effort: Effort,
    each: impl Fn(&Measured),
) -> tercet_attention::Result<Vec<Measured>> {
    let mut rows = Vec::new();
    let mut keep = |m: Measured| {
        each(&m);
        rows.push(m);
    };
    for &tokens in lengths {
        let ops = Operands::<E>::new(setting.dims(), &setting.spec, tokens, setting.seed)?;
        operator::measure(&ops, &mut Plan { wanted, effort, each: &mut keep })?;
    }
    Ok(rows)
}

/// A test for row names: exact names, or a phase; everything when none is named.
fn wanted(names: &[String]) -> anyhow::Result<impl Fn(&str) -> bool + use<>> {
    let matches = |row: &str, name: &str| {
        row == name || row.strip_prefix(name).is_some_and(|rest| rest.starts_with('/'))
    };
    if let Some(unknown) = names.iter().find(|n| !ROWS.iter().any(|r| matches(r, n))) {
        let known = ROWS.join(", ");
        return Err(user(format!("there is no row `{unknown}`; there are {known}")));
    }
    let names = names.to_vec();
    Ok(move |row: &str| names.is_empty() || names.iter().any(|n| matches(row, n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_exactly_or_by_phase() {
        let forward = wanted(&["forward".into(), "decode/nsa".into()]).unwrap();
        assert!(forward("forward/slc") && forward("decode/nsa"));
        assert!(!forward("backward/slc") && !forward("decode/dense"));
        assert!(wanted(&[]).unwrap()("backward/gate"));
        assert!(wanted(&["forward/sl".into()]).is_err());
    }
}
