//! `tercet merge`: LoRA adapters become part of a model's weights.

use std::path::PathBuf;

use tercet_model::{Adapter, Model, copy_companions, folder};

use crate::generate::model_folder;
use crate::human;

/// Add LoRA adapters to a model's weights, and write the model that results.
///
/// MODEL is a Hugging Face folder or the output folder of a run; an ADAPTER is a folder as PEFT
/// writes it (adapter_config.json, adapter_model.safetensors). Several are added in the order
/// given, each in f32, and stored as MODEL stores them; the tokenizer is copied.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  \
    tercet merge ./SmolLM2-135M-Instruct ./my-adapter ./merged\n  \
    tercet generate ./merged -p \"Once upon a time\"")]
pub struct Args {
    /// Model folder, or the output folder of a run
    model: PathBuf,
    /// Adapter folders
    #[arg(required = true, num_args = 1.., value_name = "ADAPTER")]
    adapters: Vec<PathBuf>,
    /// The folder to make; it must not exist, or be empty
    out: PathBuf,
}

/// Merges and says what was merged.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let source = model_folder(&args.model)?;
    let (model, merged) = folder::create(&args.out, |out| {
        let mut model = Model::load(&source)?;
        let mut merged = Vec::new();
        for dir in &args.adapters {
            let adapter = Adapter::load(dir, &model)?;
            let config = adapter.config();
            merged.push(format!(
                "{}: rank {}, scale {}, {} parameters, {} modules",
                dir.display(),
                config.r,
                config.scale(),
                human::count(adapter.params().elements() as f64),
                adapter.modules().count(),
            ));
            model.attach("merged", adapter)?;
            model.merge("merged")?;
        }
        model.save(out)?;
        copy_companions(&source, out)?;
        Ok((model, merged))
    })?;
    for line in merged {
        println!("merged {line}");
    }
    println!(
        "{}: {} with {} layers, {} parameters, stored as {}",
        args.out.display(),
        model.config().model_type.name(),
        model.config().num_hidden_layers,
        human::count(model.params().elements() as f64),
        model.params().dtype()
    );
    Ok(())
}
