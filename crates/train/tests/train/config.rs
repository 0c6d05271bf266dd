//! Configuration: what is accepted, and how the rest is refused.

use std::path::Path;

use tercet_train::RunConfig;

use crate::common::TINY;

fn parse(overrides: &[&str]) -> Result<RunConfig, String> {
    let mut all = vec!["output=out".to_owned(), "data.paths=['x']".to_owned()];
    all.extend(overrides.iter().map(|text| (*text).to_owned()));
    RunConfig::parse(TINY, &all).map_err(|error| {
        assert!(error.is_users());
        error.to_string()
    })
}

fn refused(overrides: &[&str]) -> String {
    match parse(overrides) {
        Ok(_) => panic!("{overrides:?} was accepted"),
        Err(text) => text,
    }
}

#[test]
fn overrides_take_toml_values_and_plain_text() {
    let config = parse(&[
        "train.lr=5e-4",
        "train.dtype=bf16",
        "model.nsa.window=32",
        "output=runs/a b",
        "train.sample_prompt=fn main() {",
        "data.paths=[\"a\", 'b']",
        "data.cache=/x/y",
    ])
    .unwrap();
    assert_eq!(config.train.lr, 5e-4);
    assert_eq!(config.train.dtype, tercet_train::config::Precision::Bf16);
    assert_eq!(config.output, Path::new("runs/a b"));
    assert_eq!(config.train.sample_prompt, "fn main() {");
    assert_eq!(config.data.paths, ["a", "b"]);
    assert_eq!(config.cache(), Path::new("/x/y"));
    let tokens = parse(&["train.tokens=1000"]);
    assert!(tokens.unwrap_err().contains("keep one of the two"));
}

#[test]
fn unknown_keys_suggest_the_nearest_one() {
    for (text, suggestion) in [
        ("train.learning_rate=1", "known here: train.steps"),
        ("train.warm_up=1", "did you mean `train.warmup`?"),
        ("tarin.lr=1", "`tarin` is not a known key; did you mean `train`?"),
        ("data.pahts=['x']", "did you mean `data.paths`?"),
        ("model.num_layers=2", "`model.num_layers` is not a known key"),
        ("model.hiden_size=2", "did you mean `model.hidden_size`?"),
        ("model.nsa.windwo=2", "did you mean `model.nsa.window`?"),
        ("model.moe.topk=2", "did you mean `model.moe.top_k`?"),
        ("checkpoint.evry=2", "did you mean `checkpoint.every`?"),
        ("lr=1", "`lr` is not a known key"),
    ] {
        let error = refused(&[text]);
        assert!(error.contains(suggestion), "{text}: {error}");
    }
}

#[test]
fn wrong_types_name_the_key() {
    for (text, key) in [
        ("train.lr=fast", "`train.lr`"),
        ("train.steps=1.5", "`train.steps`"),
        ("train.steps=-5", "`train.steps`"),
        ("train.betas=[0.9]", "`train.betas`"),
        ("train.dtype=f16", "`train.dtype`"),
        ("train.schedule=linear", "`train.schedule`"),
        ("data.paths=x", "`data.paths`"),
        ("train=5", "`train` is 5; expected a section"),
        ("output=5", "`output` is 5"),
        ("model.hidden_size=big", "`model.hidden_size`"),
        ("model.nsa.window=wide", "`model.nsa.window`"),
        ("model.nsa.compressor=max", "`model.nsa.compressor`"),
        ("train.lr.x=1", "`lr` is a value"),
        ("steps", "expected key=value"),
        ("=5", "not a dotted key"),
        ("train..lr=5", "not a dotted key"),
    ] {
        let error = refused(&[text]);
        assert!(error.contains(key), "{text}: {error}");
    }
}

#[test]
fn zero_and_absurd_sizes_name_the_key_and_the_bounds() {
    for (text, words) in [
        ("train.steps=0", "`train.steps` = 0 is outside 1..="),
        ("train.batch_tokens=0", "`train.batch_tokens` = 0"),
        ("train.batch_tokens=99999999999", "`train.batch_tokens`"),
        ("train.accumulation=0", "`train.accumulation` = 0"),
        ("train.accumulation=3", "does not divide train.batch_tokens = 256"),
        ("train.accumulation=8", "less than data.context = 64"),
        ("train.lr=0", "`train.lr` = 0 is outside (0, 10]"),
        ("train.lr=nan", "`train.lr`"),
        ("train.lr=-1e-3", "`train.lr`"),
        ("train.betas=[0.9, 1.0]", "`train.betas` holds 1"),
        ("train.eps=0", "`train.eps`"),
        ("train.clip=-1", "`train.clip`"),
        ("train.decay=1.5", "`train.decay`"),
        ("train.final_lr=2", "`train.final_lr`"),
        ("train.nan_patience=0", "`train.nan_patience`"),
        ("train.eval_batches=0", "`train.eval_batches`"),
        ("checkpoint.keep=0", "`checkpoint.keep`"),
        ("data.context=1", "`data.context`"),
        ("data.context=999999999999", "`data.context`"),
        ("data.validation=1", "`data.validation`"),
        ("data.vocab_size=256", "`data.vocab_size` = 256 is outside 257..="),
        ("data.vocab_size=0", "`data.vocab_size`"),
        ("data.max_bytes=0", "`data.max_bytes`"),
        ("data.tokenizer=x.json", "keep one of the two"),
        ("model.num_hidden_layers=0", "`model.num_hidden_layers` = 0 is outside"),
        ("model.hidden_size=0", "`model.hidden_size` = 0"),
        ("model.num_key_value_heads=3", "4 query heads cannot be shared by 3"),
        ("model.head_dim=7", "`model.head_dim` = 7 must be even"),
        ("model.vocab_size=100", "`model.vocab_size` = 100 is less than the 300 tokens"),
        (
            "model.max_position_embeddings=32",
            "`model.max_position_embeddings` = 32 is less than the 64",
        ),
        ("model.nsa.compress_stride=3", "compress_stride = 3 must divide"),
        ("model.path=folder", "cannot be set beside model.path"),
    ] {
        let error = refused(&[text]);
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn heads_that_do_not_divide_name_the_key() {
    let text = TINY.replace("head_dim = 8\n", "");
    let overrides = ["output=o", "data.paths=['x']", "model.hidden_size=30"].map(String::from);
    let error = RunConfig::parse(&text, &overrides).unwrap_err().to_string();
    let expected = "config: `model.hidden_size` = 30 is not divisible by num_attention_heads = 4";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn what_is_written_reads_back_as_it_was() {
    let config = parse(&["train.seed=7", "data.max_bytes=1000", "data.special_tokens=['<a>']"]);
    let config = config.unwrap();
    assert_eq!(RunConfig::parse(&config.to_toml(), &[]).unwrap(), config);
}

#[test]
fn a_missing_file_and_broken_toml_name_the_file() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("run.toml");
    let error = RunConfig::load(&path, &[]).unwrap_err();
    assert!(error.is_users() && error.to_string().contains("run.toml"), "{error}");
    std::fs::write(&path, "output = 'x'\n[train\n").unwrap();
    let error = RunConfig::load(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("run.toml") && error.contains("line 2"), "{error}");
    std::fs::write(&path, "").unwrap();
    let error = RunConfig::load(&path, &[]).unwrap_err().to_string();
    assert!(error.contains("`output` is missing"), "{error}");
}

#[test]
fn the_recipes_of_this_repository_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // Recipes for tuning are read by the crates that do it.
        let tuning = ["sft.toml", "align.toml", "sample.toml", "iterative.toml", "private.toml"];
        if tuning.iter().any(|name| path.ends_with(name)) {
            continue;
        }
        if path.extension().is_some_and(|extension| extension == "toml") {
            RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            count += 1;
        }
    }
    assert!(count > 0);
}
