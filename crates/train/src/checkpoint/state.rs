//! `state/`: what resuming needs besides the weights.
//!
//! `optimizer.safetensors` holds AdamW's moments (`m.NAME`, `v.NAME`) and, for bf16 models, the
//! f32 weights (`master.NAME`); `run.json` the counters; `config.toml` the configuration.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View, serialize_to_file};
use serde::{Deserialize, Serialize};
use tercet_model::Model;
use tercet_tensor::{AdamWState, SlotState};
use toml::{Table, Value};

use super::Snapshot;
use crate::error::{Error, Result};
use crate::guard::Guard;

const OPTIMIZER: &str = "optimizer.safetensors";
const RUN: &str = "run.json";
const CONFIG: &str = "config.toml";

/// Keys that may differ on resume: they change what is watched or kept, or name a place (what the
/// text and the tokenizer must be is checked by their content), or divide work without changing a
/// bit.
const FREE: [&str; 18] = [
    "output",
    "data.paths",
    "data.validation_paths",
    "data.bad_rows",
    "data.text_field",
    "data.max_bytes",
    "data.tokenizer",
    "data.cache",
    "train.eval_every",
    "train.eval_batches",
    "train.sample_every",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.nan_patience",
    "train.outlier_z",
    "private.micro_people",
    "checkpoint.every",
    "checkpoint.keep",
];

/// Counters of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Steps done.
    pub step: u64,
    /// First position of the training stream not yet trained on.
    pub data_position: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seed of every random choice; there is no other generator state, since order and samples
    /// are pure functions of seed and step.
    pub seed: u64,
    /// Key of the tokenized corpus.
    pub data_key: String,
    /// Updates AdamW has made: steps less skipped ones.
    pub updates: u64,
    /// Windows and counts of the guard.
    pub guard: Guard,
}

/// A tensor of the optimizer's file.
struct Stored<'a> {
    shape: &'a [usize],
    values: &'a [f32],
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

/// Writes the three files.
pub fn write(folder: &Path, snapshot: &Snapshot) -> Result<()> {
    let mut entries = Vec::new();
    for (slot, state) in snapshot.optimizer.slots.iter().enumerate() {
        let name = snapshot.model.trained().name(slot);
        let shape = snapshot.model.trained().tensor(slot).shape();
        let parts =
            [("m", Some(&state.m)), ("v", Some(&state.v)), ("master", state.master.as_ref())];
        for (kind, values) in parts {
            if let Some(values) = values {
                entries.push((format!("{kind}.{name}"), Stored { shape, values }));
            }
        }
    }
    let path = folder.join(OPTIMIZER);
    serialize_to_file(entries, None, &path).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(error) => Error::io("write", &path)(error),
        other => Error::Checkpoint(format!("{} cannot be written: {other}", path.display())),
    })?;
    let run = serde_json::to_vec_pretty(snapshot.run)
        .map_err(|error| Error::Checkpoint(format!("the run's state has no JSON: {error}")))?;
    for (name, content) in [(RUN, run), (CONFIG, snapshot.config.as_bytes().to_vec())] {
        let path = folder.join(name);
        fs::write(&path, content).map_err(Error::io("write", &path))?;
    }
    Ok(())
}

/// Reads the counters.
pub fn read_run(folder: &Path) -> Result<RunState> {
    let path = folder.join(RUN);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))
}

/// Reads the optimizer's state of `model` after `updates` updates.
pub fn read_optimizer(folder: &Path, model: &Model, updates: u64) -> Result<AdamWState> {
    let path = folder.join(OPTIMIZER);
    let refuse = |problem: String| Error::Checkpoint(format!("{}: {problem}", path.display()));
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| refuse(error.to_string()))?;
    let views: HashMap<&str, _> = tensors.iter().collect();
    let read = |kind: &str, slot: usize| -> Result<Option<Vec<f32>>> {
        let name = format!("{kind}.{}", model.trained().name(slot));
        let Some(view) = views.get(name.as_str()) else { return Ok(None) };
        let shape = model.trained().tensor(slot).shape();
        if view.shape() != shape || view.dtype() != Dtype::F32 {
            let (dtype, found) = (view.dtype(), view.shape());
            return Err(refuse(format!("{name} is {dtype:?} {found:?}, expected F32 {shape:?}")));
        }
        Ok(Some(view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()))
    };
    let needed = |kind: &str, slot: usize| {
        let name = model.trained().name(slot);
        read(kind, slot)?.ok_or_else(|| refuse(format!("{kind}.{name} is missing")))
    };
    let slots = (0..model.trained().len())
        .map(|slot| {
            Ok(SlotState {
                m: needed("m", slot)?,
                v: needed("v", slot)?,
                master: read("master", slot)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(AdamWState { step: updates, slots })
}

/// Compares the configuration a checkpoint was written under with this run's. `None` when no key
/// that matters differs, else what differs and what to do.
pub fn differing_key(folder: &Path, config: &str) -> Result<Option<String>> {
    let path = folder.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let parse = |text: &str| {
        text.parse::<Table>()
            .map(|table| flatten(&table))
            .map_err(|error| Error::Checkpoint(format!("{}: {}", path.display(), error.message())))
    };
    let (then, now) = (parse(&text)?, parse(config)?);
    let show = |value: Option<&Value>| value.map_or("not set".to_owned(), ToString::to_string);
    let keys = then.keys().chain(now.keys().filter(|key| !then.contains_key(*key)));
    for key in keys {
        if !FREE.contains(&key.as_str()) && then.get(key) != now.get(key) {
            return Ok(Some(format!(
                "was written with {key} = {}, but this run has {}; use the same value, or start a \
                 new run in another `output` (with model.path it continues these weights)",
                show(then.get(key)),
                show(now.get(key))
            )));
        }
    }
    Ok(None)
}

/// Dotted keys and values of all tables.
fn flatten(table: &Table) -> BTreeMap<String, Value> {
    let mut flat = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                flat.extend(flatten(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v)));
            }
            value => {
                flat.insert(key.clone(), value.clone());
            }
        }
    }
    flat
}
