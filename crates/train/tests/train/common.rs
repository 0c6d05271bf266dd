//! A tiny corpus and a tiny run, shared by the tests.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use tercet_tensor::Device;
use tercet_train::{Control, Event, Report, Result, RunConfig, pretrain};

/// Writes a few dozen small documents that differ.
pub fn write_corpus(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for i in 0..40 {
        let mut text = String::new();
        for line in 0..30 {
            let n = (i * 37 + line * 11) % 23;
            text += &format!("let value_{n} = step({line}, {});\n", n * i % 17);
        }
        fs::write(folder.join(format!("part-{i:02}.rs")), text).unwrap();
    }
}

/// A model of a few thousand parameters with native sparse attention, 12 steps.
pub const TINY: &str = r#"
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
tie_word_embeddings = true

[model.nsa]
compress_block = 8
compress_stride = 4
select_block = 8
select_count = 4
window = 16

[data]
vocab_size = 300
context = 64
validation = 0.1

[train]
steps = 12
batch_tokens = 256
accumulation = 2
lr = 3e-3
warmup = 3
eval_every = 4
eval_batches = 2

[checkpoint]
every = 4
keep = 2
"#;

/// The tiny run on a corpus, with output in a folder and further overrides.
pub fn tiny(corpus: &Path, output: &Path, overrides: &[&str]) -> RunConfig {
    let mut all = vec![
        format!("output='{}'", output.display()),
        format!("data.paths=['{}']", corpus.display()),
    ];
    all.extend(overrides.iter().map(|text| (*text).to_owned()));
    RunConfig::parse(TINY, &all).unwrap()
}

/// Runs to the end.
pub fn run(config: &RunConfig, resume: bool) -> Result<Report> {
    let stop = AtomicBool::new(false);
    pretrain(
        config,
        &Control { stop: &stop, resume, gemm_flops: None, device: &Device::Cpu },
        &mut |_| {},
    )
}

/// Runs until `steps` steps are done, then raises the stop flag.
pub fn run_until(config: &RunConfig, resume: bool, steps: u64) -> Result<Report> {
    let stop = AtomicBool::new(false);
    let mut observe = |event: Event| {
        if let Event::Step(progress) = event
            && progress.record.step >= steps
        {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    pretrain(
        config,
        &Control { stop: &stop, resume, gemm_flops: None, device: &Device::Cpu },
        &mut observe,
    )
}

/// All files of a checkpoint but the configuration (whose `output` differs) and the manifest
/// (which holds its hash).
pub fn contents(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in [checkpoint.to_owned(), checkpoint.join("state")] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_file() && name != "manifest.json" && name != "config.toml" {
                files.push((name, fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    assert!(files.iter().any(|(name, _)| name == "optimizer.safetensors"));
    assert!(files.iter().any(|(name, _)| name == "model.safetensors"));
    files
}
