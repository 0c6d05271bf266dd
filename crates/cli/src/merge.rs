//! `tercet merge`: LoRA adapters become part of a model's weights.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;
use tercet_model::{Adapter, Model, copy_companions, folder};

use crate::generate::model_folder;
use crate::{error, human};

/// Add LoRA adapters to a model's weights, and write the model that results.
///
/// MODEL is a Hugging Face folder or the output folder of a run; an ADAPTER is a folder as PEFT
/// writes it (adapter_config.json, adapter_model.safetensors). Several are added in the order
/// given, each in f32, and stored as MODEL stores them; the tokenizer is copied. What was promised of
/// an adapter's privacy (privacy.json) is copied, too, numbered where there are several.
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
    let promises = promises(&source, &args.adapters)?;
    let (model, merged) = folder::create(&args.out, |out| {
        let mut model = Model::load(&source)?;
        let mut merged = Vec::new();
        for dir in &args.adapters {
            let adapter = Adapter::load(dir, &model)?;
            let config = adapter.config();
            merged.push(format!(
                "merged {}: rank {}, scale {}, {} parameters, {} modules",
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
        merged.extend(carry(&promises, out)?);
        Ok((model, merged))
    })?;
    for line in merged {
        println!("{line}");
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

/// What was promised of the model and of each adapter: folder and content.
fn promises(model: &Path, adapters: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, Value)>> {
    let mut promises = Vec::new();
    // A model that was merged before has one for each adapter in it.
    let numbered = (1..).map(|at| format!("privacy-{at}.json"));
    let names = numbered.take_while(|name| model.join(name).exists());
    for name in names.chain(["privacy.json".to_owned()]) {
        promises.extend(read(&model.join(name))?.map(|found| (model.to_owned(), found)));
    }
    for dir in adapters {
        let found = match read(&dir.join("privacy.json"))? {
            None => read(&dir.join("adapter_config.json"))?
                .and_then(|config| config.get("privacy").cloned()),
            found => found,
        };
        promises.extend(found.map(|found| (dir.clone(), found)));
    }
    Ok(promises)
}

/// A file's JSON, if there is such a file.
fn read(path: &Path) -> anyhow::Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = serde_json::from_str(&text).map_err(|problem| {
        error::user(format!("{} is not a JSON object: {problem}", path.display()))
    })?;
    Ok(Some(found))
}

/// Writes them beside the merged weights; what to say of each.
fn carry(promises: &[(PathBuf, Value)], out: &Path) -> tercet_model::Result<Vec<String>> {
    let mut lines = Vec::new();
    for (at, (dir, promise)) in promises.iter().enumerate() {
        let name = match promises.len() {
            1 => "privacy.json".to_owned(),
            _ => format!("privacy-{}.json", at + 1),
        };
        folder::write_text(&out.join(&name), &format!("{promise:#}\n"))?;
        let said = match (promise["private"].as_bool(), promise["epsilon"].as_f64()) {
            (Some(true), Some(epsilon)) => format!("is private with epsilon {epsilon}"),
            _ => "is NOT PRIVATE".to_owned(),
        };
        lines.push(format!("{} {said}: {name}", dir.display()));
    }
    if promises.len() > 1 {
        lines.push("the epsilons add up for a person who is in several of the data sets".into());
    }
    Ok(lines)
}
