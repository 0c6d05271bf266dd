//! `tercet tokenizer`: byte-level BPE from text.

use std::path::PathBuf;

use tercet_train::config::DataConfig;
use tercet_train::data::Corpus;
use tercet_train::tokenizer_train;

use crate::{human, interrupt};

/// Train a tokenizer.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Train(Train),
}

/// Train a byte-level BPE tokenizer: every text can be written with it, none is unknown. The same
/// text, size and special tokens give the same file.
#[derive(clap::Args)]
struct Train {
    /// Files, folders and globs of text, code, .jsonl, each also as .gz or .zst
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
    /// Tokens in the vocabulary, the 256 bytes and special tokens included
    #[arg(short, long, value_name = "N")]
    vocab_size: usize,
    /// Where to write the tokenizer
    #[arg(short, long, default_value = "tokenizer.json", value_name = "FILE")]
    output: PathBuf,
    /// A special token besides <|endoftext|>; may be given several times
    #[arg(long, value_name = "TOKEN")]
    special: Vec<String>,
    /// The field of a .jsonl line that holds its text
    #[arg(long, default_value = "text", value_name = "NAME")]
    text_field: String,
    /// Text to look at, at most, spread evenly over all of it (MiB)
    #[arg(long, default_value_t = tokenizer_train::SAMPLE_BYTES >> 20, value_name = "MIB")]
    sample: u64,
}

/// Trains and writes the file.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let What::Train(train) = &args.what;
    let data = DataConfig {
        paths: train.paths.clone(),
        text_field: train.text_field.clone(),
        ..DataConfig::default()
    };
    let stop = interrupt::stop_flag()?;
    let corpus = Corpus::scan(&data, &stop)?;
    eprintln!(
        "read {} documents, {}",
        human::grouped(corpus.documents),
        human::bytes(corpus.bytes)
    );
    let sample = train.sample.saturating_mul(1 << 20);
    let json = tokenizer_train::train(&corpus, train.vocab_size, &train.special, sample)?;
    tokenizer_train::save(&json, &train.output)?;
    println!(
        "wrote {}: {} tokens",
        train.output.display(),
        human::grouped(train.vocab_size as u64)
    );
    Ok(())
}
