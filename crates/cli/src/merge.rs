//! `tercet merge`: LoRA adapters become part of a model's weights.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};
use tercet_model::{Adapter, Model, copy_companions, folder};

use crate::generate::model_folder;
use crate::{error, human};

/// Add LoRA adapters to a model's weights, and write the model that results.
///
/// MODEL is a Hugging Face folder or the output folder of a run; an ADAPTER is a folder as PEFT
/// writes it (adapter_config.json, adapter_model.safetensors). Several are added in the order
/// given, each in f32, and stored as MODEL stores them; the tokenizer is copied. What was promised of
/// an adapter's privacy (privacy.json) is copied, too, numbered where there are several, and an adapter
/// of which nothing was promised is named among them.
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

/// What was promised of the model and of each adapter: folder and content. Beside a promise, an
/// adapter without one is said to have none: what is promised of one part holds for no other.
fn promises(model: &Path, adapters: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, Value)>> {
    let mut promises = Vec::new();
    for name in numbered(model)? {
        promises.extend(read(&model.join(name))?.map(|found| (model.to_owned(), Some(found))));
    }
    for dir in adapters {
        let gist = read(&dir.join("adapter_config.json"))?
            .and_then(|config| config.get("privacy").cloned());
        let whole = read(&dir.join("privacy.json"))?;
        if let (Some(whole), Some(gist)) = (&whole, &gist) {
            agree(dir, whole, gist)?;
        }
        promises.push((dir.clone(), whole.or(gist)));
    }
    if promises.iter().all(|(_, found)| found.is_none()) {
        return Ok(Vec::new());
    }
    let or_none = |(dir, found): (PathBuf, Option<Value>)| {
        let none = || {
            json!({"private": false, "warnings": [format!(
                "{}: nothing is promised of this adapter, nor of whose rows it was trained on",
                dir.display()
            )]})
        };
        let found = found.unwrap_or_else(none);
        (dir, found)
    };
    Ok(promises.into_iter().map(or_none).collect())
}

/// Refuses an adapter of which two files promise different things.
fn agree(dir: &Path, whole: &Value, gist: &Value) -> anyhow::Result<()> {
    let Some(key) = ["private", "epsilon", "delta"].into_iter().find(|key| whole[key] != gist[key])
    else {
        return Ok(());
    };
    Err(error::user(format!(
        "{}: privacy.json has {key} = {}, the field `privacy` of adapter_config.json {}; one of the \
         two was changed. Bring the folder back from the run's checkpoint",
        dir.display(),
        whole[key],
        gist[key]
    )))
}

/// The promises in a model folder, in their order: a model that was merged before has one for each
/// adapter in it.
fn numbered(model: &Path) -> anyhow::Result<Vec<String>> {
    let read = || format!("cannot read {}", model.display());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(model).with_context(read)? {
        let name = entry.with_context(read)?.file_name().to_string_lossy().into_owned();
        let middle = name.strip_prefix("privacy").and_then(|rest| rest.strip_suffix(".json"));
        let number = match middle {
            Some("") => Some(0),
            middle => middle.and_then(|m| m.strip_prefix('-')).and_then(|n| n.parse::<u64>().ok()),
        };
        found.extend(number.map(|number| (number, name)));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
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
            (Some(true), Some(epsilon)) if epsilon >= 0.0 => {
                format!("is private with epsilon {epsilon}")
            }
            _ => "is NOT PRIVATE".to_owned(),
        };
        lines.push(format!("{} {said}: {name}", dir.display()));
    }
    if promises.len() > 1 {
        lines.push("the epsilons add up for a person who is in several of the data sets".into());
    }
    Ok(lines)
}
