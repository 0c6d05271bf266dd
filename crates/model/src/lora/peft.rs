//! Adapter folders as PEFT writes and reads them: `adapter_config.json` and
//! `adapter_model.safetensors`, whose tensors are called `base_model.model.MODULE.lora_A.weight`
//! `[r, in]` and `.lora_B.weight` `[out, r]`.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tercet_tensor::{DType, Device, Tensor};

use super::adapter::{self, Adapter};
use super::config::{ALL_LINEAR, LoraConfig, means};
use super::modules::{self, Module};
use crate::params::Params;
use crate::stored::Part;
use crate::weights_read::{self, read_values};
use crate::weights_write::{Entry, write_file};
use crate::{Error, Model, Result, folder};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// Fields that change what is computed, and that are served only empty, null or false.
const UNSERVED: [&str; 11] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "exclude_modules",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "loftq_config",
];

/// Ways to start an adapter that leave the base's weights alone; the others (PiSSA, OLoRA, CorDA, …)
/// change them, and the adapter is none for the base without that change.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// What a file holds of one module.
#[derive(Default)]
struct Pair<'a> {
    a: Option<&'a weights_read::Entry>,
    b: Option<&'a weights_read::Entry>,
}

impl Adapter {
    /// Reads a PEFT folder for a model; the tensors take its storage type and device. What PEFT can
    /// write and this cannot compute is refused by the name of its field.
    pub fn load(dir: &Path, model: &Model) -> Result<Self> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let (mut config, regex) = parse(&text).map_err(|reason| Error::file(&path, reason))?;
        config.validate().map_err(|e| Error::file(&path, e.to_string()))?;

        let path = dir.join(TENSORS);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            return Err(Error::file(
                &dir.join("adapter_model.bin"),
                "is a Python pickle, which can run programs and is not read; load it with PEFT and \
                 save it again with safe_serialization=True",
            ));
        }
        let mut entries = BTreeMap::new();
        weights_read::read_header(&path, &mut entries)?;
        let pairs = pair(&entries).map_err(|reason| Error::file(&path, reason))?;
        let mut found = Vec::new();
        for (name, pair) in &pairs {
            let (Some(a), Some(b)) = (pair.a, pair.b) else {
                let (is, lacks) = if pair.a.is_some() { ("A", "B") } else { ("B", "A") };
                let reason =
                    format!("{name}.lora_{is}.weight is there, but no lora_{lacks}.weight");
                return Err(Error::file(&path, reason));
            };
            found.push((name.as_str(), [a, b]));
        }
        let modules = modules::modules(&modules::Plan::of(model));
        let shapes = found.iter().map(|(name, [a, b])| (*name, [&a.shape[..], &b.shape[..]]));
        modules::refuse_misfits(&modules, config.r, shapes)
            .map_err(|e| Error::file(dir, e.to_string()))?;
        let held: Vec<&Module> = modules.iter().filter(|m| pairs.contains_key(&m.name)).collect();
        if regex {
            // What it means is what the file holds.
            config.targets = held.iter().map(|module| module.name.clone()).collect();
        } else {
            check_targets(&config, model, &modules, &held)
                .map_err(|reason| Error::file(dir, reason))?;
        }

        let dtype = model.params().dtype();
        let mut tensors = Vec::new();
        for module in &held {
            let Some(Pair { a: Some(a), b: Some(b) }) = pairs.get(&module.name) else { continue };
            tensors.extend(read(a, 1, dtype)?);
            tensors.extend(read(b, module.weights.len(), dtype)?);
        }
        let specs = adapter::specs(&held, config.r);
        let mut adapter = Self::assemble(config, &held, Params::new(specs, tensors), model);
        adapter.params.move_to(&model.device())?;
        Ok(adapter)
    }

    /// Writes a PEFT folder into an existing folder. `base` is what PEFT loads the base from: a
    /// folder, or a name of the Hugging Face hub.
    pub fn save(&self, dir: &Path, base: &str) -> Result<()> {
        self.save_noted(dir, base, &Map::new())
    }

    /// As [`Adapter::save`], with further fields in `adapter_config.json`, none of PEFT's: what is
    /// to be known of the adapter and changes no number. PEFT from 0.14 on warns of them and goes
    /// on; one before refuses the file.
    pub fn save_noted(&self, dir: &Path, base: &str, notes: &Map<String, Value>) -> Result<()> {
        let mut params = self.params.clone();
        params.move_to(&Device::Cpu)?;
        let mut entries = BTreeMap::new();
        for module in &self.modules {
            let shapes = self.shapes(module);
            let [a, b] = [vec![module.a], module.b.clone()];
            for ((which, shape), slots) in ["A", "B"].iter().zip(shapes).zip([a, b]) {
                let part = |i| if slots.len() == 1 { Part::Whole } else { Part::Third(i) };
                let parts = slots.iter().enumerate();
                let parts = parts.map(|(i, &slot)| (part(i), params.tensor(slot))).collect();
                let name = format!("{PREFIX}{}.lora_{which}.weight", module.name);
                entries.insert(name, Entry { shape, dtype: params.dtype(), parts });
            }
        }
        write_file(&dir.join(TENSORS), entries.iter())?;
        let mut config = self.peft_config(base);
        if let Some(fields) = config.as_object_mut() {
            fields.extend(notes.clone());
        }
        folder::write_text(&dir.join(CONFIG), &format!("{config:#}\n"))
    }

    fn peft_config(&self, base: &str) -> Value {
        let LoraConfig { r, alpha, dropout, targets, rslora } = &self.config;
        let alpha = if alpha.fract() == 0.0 && alpha.abs() < f64::from(1u32 << 31) {
            json!(*alpha as i64)
        } else {
            json!(alpha)
        };
        let targets = if targets.iter().any(|target| target == ALL_LINEAR) {
            json!(ALL_LINEAR)
        } else if targets.iter().any(|target| target.contains('*')) {
            // PEFT has no such patterns.
            json!(self.modules().collect::<Vec<_>>())
        } else {
            json!(targets)
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": true,
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "target_modules": targets,
            "use_rslora": rslora,
            "fan_in_fan_out": self.transposed,
            "bias": "none",
            "init_lora_weights": true,
        })
    }
}

/// The configuration in PEFT's words, and whether its target is a regular expression; the reason
/// when it is none that is served.
fn parse(text: &str) -> std::result::Result<(LoraConfig, bool), String> {
    let fields: Map<String, Value> =
        serde_json::from_str(text).map_err(|e| format!("is not a JSON object: {e}"))?;
    refuse_unserved(&fields)?;
    let number = |name: &str| match fields.get(name) {
        Some(Value::Number(number)) => Ok(number.as_f64().unwrap_or(f64::NAN)),
        Some(other) => Err(format!("{name} is {other}, expected a number")),
        None => Err(format!("{name} is missing")),
    };
    let r = fields.get("r").ok_or("r is missing")?;
    let whole = r.as_u64().and_then(|r| usize::try_from(r).ok());
    let r = whole.ok_or_else(|| format!("r is {r}, expected a whole number"))?;
    let dropout = if fields.contains_key("lora_dropout") { number("lora_dropout")? } else { 0.0 };
    let rslora = match fields.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(is)) => *is,
        Some(other) => return Err(format!("use_rslora is {other}, expected true or false")),
    };
    let (targets, regex) = match fields.get("target_modules") {
        Some(Value::String(one)) => (vec![one.clone()], one != ALL_LINEAR),
        Some(Value::Array(list)) => {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let names: Option<Vec<String>> = list.iter().map(text).collect();
            (names.ok_or("target_modules holds something else than names")?, false)
        }
        _ => return Err("target_modules is missing; expected a list of names".into()),
    };
    Ok((LoraConfig { r, alpha: number("lora_alpha")?, dropout, targets, rslora }, regex))
}

fn refuse_unserved(fields: &Map<String, Value>) -> std::result::Result<(), String> {
    let set = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    match fields.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => return Err(format!("peft_type is {other:?}; only \"LORA\" is served")),
        None => return Err("peft_type is missing; expected \"LORA\"".into()),
    }
    for (name, value) in fields.iter().filter(|(_, value)| set(value)) {
        let variant = name.starts_with("use_") && name != "use_rslora";
        let method =
            name.ends_with("_config") && !["eva_config", "runtime_config"].contains(&&**name);
        if variant || method || UNSERVED.contains(&&**name) {
            return Err(format!("{name} is {value}, which changes the numbers and is not served"));
        }
        if name == "bias" && value != "none" {
            return Err(format!("bias is {value}; only \"none\" is served"));
        }
        if name == "init_lora_weights"
            && let Value::String(start) = value
            && !PLAIN_STARTS.contains(&&**start)
        {
            return Err(format!(
                "init_lora_weights is {value}, which changed the base too; convert the adapter with \
                 PEFT's path_initial_model_for_weight_conversion"
            ));
        }
    }
    Ok(())
}

/// The file's tensors by module; the reason when one belongs to no plain adapter.
fn pair(
    entries: &BTreeMap<String, weights_read::Entry>,
) -> std::result::Result<BTreeMap<String, Pair<'_>>, String> {
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for (name, entry) in entries {
        if !matches!(entry.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            let dtype = entry.dtype;
            return Err(format!("{name} is stored as {dtype:?}; only F32, BF16 and F16 are read"));
        }
        let inner = name.strip_prefix(PREFIX);
        let module = |end: &str| inner.and_then(|inner| inner.strip_suffix(end));
        if let Some(module) = module(".lora_A.weight") {
            pairs.entry(module.to_owned()).or_default().a = Some(entry);
        } else if let Some(module) = module(".lora_B.weight") {
            pairs.entry(module.to_owned()).or_default().b = Some(entry);
        } else {
            return Err(format!(
                "holds {name}; expected {PREFIX}MODULE.lora_A.weight and .lora_B.weight only"
            ));
        }
    }
    if pairs.is_empty() {
        return Err("holds no tensor".into());
    }
    Ok(pairs)
}

/// Refuses a file that holds other modules than the configuration's targets: PEFT would drop them,
/// or leave untrained what is missing.
fn check_targets(
    config: &LoraConfig,
    model: &Model,
    modules: &[Module],
    held: &[&Module],
) -> std::result::Result<(), String> {
    // PEFT's names have no stars.
    if let Some(star) = config.targets.iter().find(|target| target.contains('*')) {
        return Err(format!("target_modules holds {star:?}, which is no name"));
    }
    let refused = modules::refused(&modules::Plan::of(model));
    let all = config.targets.iter().any(|target| target == ALL_LINEAR);
    let targeted = |name: &str| config.targets.iter().any(|target| means(target, name));
    if let Some(module) = refused.iter().find(|module| !all && targeted(&module.name)) {
        let (name, what) = (&module.name, module.what);
        return Err(format!("target_modules means {name}, {what}, which takes no adapter here"));
    }
    for module in modules {
        let is_held = held.iter().any(|held| held.name == module.name);
        if is_held != (all || targeted(&module.name)) {
            let (name, file) = (&module.name, TENSORS);
            return Err(match is_held {
                true => format!("{file} holds {name}, which target_modules does not mean"),
                false => format!("target_modules means {name}, which {file} does not hold"),
            });
        }
    }
    Ok(())
}

/// A tensor in as many parts, cut between rows.
fn read(entry: &weights_read::Entry, parts: usize, dtype: DType) -> Result<Vec<Tensor>> {
    let shape = [entry.shape[0] / parts, entry.shape[1]];
    let len = shape[0] * shape[1];
    // Exact sources stay exact: bf16 → bf16 never passes through a rounding.
    if dtype == DType::BF16 {
        let values = read_values(entry, bf16::from_f32)?;
        return values.chunks(len).map(|v| Ok(Tensor::from_bf16(v.to_vec(), &shape)?)).collect();
    }
    let values = read_values(entry, |value| value)?;
    values.chunks(len).map(|v| Ok(Tensor::from_f32(v.to_vec(), &shape)?)).collect()
}
