//! `tercet attend`: the operator as a tool, so that anyone can check it from any framework.

mod compute;
mod device;
mod input;
mod output;
mod tensor_file;

use std::path::PathBuf;
use std::time::Instant;

use half::bf16;

use crate::device::{Choice, DeviceArg};
use crate::error::user;
use crate::human;
use device::on_device;
use input::Input;
use output::Output;

/// Run the attention operator on tensors in a file.
///
/// INPUT holds q [T, H, D], k_cmp, k_slc, k_win [T, K, D], v_cmp, v_slc, v_win [T, K, V],
/// gate [T, H, 3] (after the sigmoid: cmp, slc, win), the tensors of the compressor
/// (linear: phi_{k,v}_weight, _pe; mlp: phi_{k,v}_weight1, _bias1, _weight2, _bias2, _pe) and
/// perhaps cu_seqlens [B + 1]. Keys and values of the compressed branch are raw. The spec is JSON:
/// the metadata entry `spec`, or a file.
///
/// OUTPUT receives out [T, H, V], indices [T, K, S], lse_cmp, lse_slc, lse_win [T, H] and, with
/// --backward, d_NAME for every input.
#[derive(clap::Args)]
pub struct Args {
    /// Input tensors
    #[arg(long, value_name = "X.safetensors")]
    input: PathBuf,

    /// Where the results go; written whole or not at all
    #[arg(long, value_name = "Y.safetensors")]
    output: PathBuf,

    /// Spec of the attention, instead of the input's metadata
    #[arg(long, value_name = "SPEC.json")]
    spec: Option<PathBuf>,

    /// How inputs are stored while computing; arithmetic is f32 (float64 with --reference)
    #[arg(long, value_enum, default_value_t = Storage::F32)]
    dtype: Storage,

    #[command(flatten)]
    device: DeviceArg,

    /// Compute in float64 by the readable code that the fast code is checked against; results
    /// are rounded to f32
    #[arg(long)]
    reference: bool,

    /// Also compute the gradients of sum(out · d_out); the input then holds d_out [T, H, V]
    #[arg(long)]
    backward: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Storage {
    F32,
    Bf16,
}

/// Reads, computes, writes, and says so in one line.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if same_file(args) {
        return Err(user(format!(
            "--output {} is the input; writing there would replace it",
            args.output.display()
        )));
    }
    let input = Input::open(&args.input, args.spec.as_deref(), args.backward)?;
    // Made before the work, so that a folder that cannot be written is known at once.
    let output = Output::create(&args.output)?;
    // The reference is float64 code of the CPU.
    let device = if args.reference { Choice::Cpu } else { args.device.choose()? };
    let started = Instant::now();
    let results = match (args.reference, args.dtype) {
        (false, Storage::F32) if device.gpu().is_some() => on_device::<f32>(&input, &device),
        (false, Storage::Bf16) if device.gpu().is_some() => on_device::<bf16>(&input, &device),
        (false, Storage::F32) => compute::fast::<f32>(&input),
        (false, Storage::Bf16) => compute::fast::<bf16>(&input),
        (true, Storage::F32) => compute::reference::<f32>(&input),
        (true, Storage::Bf16) => compute::reference::<bf16>(&input),
    }?;
    let seconds = started.elapsed().as_secs_f64();
    output.write(&input.spec, &results)?;
    println!(
        "wrote {}: {} tensors for {} tokens, {}",
        args.output.display(),
        results.len(),
        human::grouped(input.tokens as u64),
        human::seconds(seconds)
    );
    Ok(())
}

fn same_file(args: &Args) -> bool {
    let real = |path: &PathBuf| path.canonicalize().ok();
    real(&args.input).is_some_and(|input| Some(input) == real(&args.output))
}
