//! The project's picture: what one real query of a trained model reads.

mod draw;
mod trace;

use std::path::PathBuf;

use anyhow::Context;
use tercet_model::{Model, Tokenizer};
use tercet_train::files;

use crate::error::user;
use crate::generate;
use trace::Trace;

/// Draw what one query of a trained model reads through the three branches, as SVG.
///
/// The text is read as one sequence; of its last queries in all layers, the one is drawn whose
/// attention goes most to blocks that it had to choose.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or the output folder of a run
    model: PathBuf,
    /// Text file to read; its first tokens are taken, as many as the context holds
    text: PathBuf,
    /// Where to draw
    #[arg(long, default_value = "reads.svg", value_name = "FILE")]
    svg: PathBuf,
}

/// Queries looked at, counted from the end of the text.
const CANDIDATES: usize = 256;

/// Blocks quoted below the drawing.
const QUOTES: usize = 3;

/// Draws.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = generate::model_folder(&args.model)?;
    let (model, tokenizer) = (Model::load(&folder)?, Tokenizer::load(&folder)?);
    let text = std::fs::read_to_string(&args.text)
        .with_context(|| format!("cannot read {}", args.text.display()))?;
    let svg = reads(&model, &tokenizer, &text)?;
    files::write_atomic(&args.svg, svg.as_bytes())?;
    println!("wrote {}", args.svg.display());
    Ok(())
}

/// The drawing of one query of `model` over the beginning of `text`.
pub fn reads(model: &Model, tokenizer: &Tokenizer, text: &str) -> anyhow::Result<String> {
    let mut ids = tokenizer.encode(text, true)?;
    ids.truncate(model.config().max_position_embeddings);
    let trace = trace::trace(model, &ids)?;
    let Some(Query { layer, position, group, chosen, .. }) = telling(&trace) else {
        return Err(user(format!(
            "a text of {} tokens has no query with a choice of blocks; give a longer one",
            ids.len()
        )));
    };
    let words = |from: usize, to: usize| tokenizer.decode(&ids[from..to.min(ids.len())]);
    let block = trace.spec.select_block;
    let quotes: Result<Vec<(usize, String)>, _> = chosen
        .iter()
        .take(QUOTES)
        .map(|&b| words(b * block, (b + 1) * block).map(|text| (b, text)))
        .collect();
    Ok(draw::draw(&draw::Reading {
        spec: &trace.spec,
        position,
        compressed: &trace.compressed(layer, position, group),
        selected: &trace.selected(layer, position, group),
        gates: trace.gates(layer, position, group),
        caption: &format!("A query of layer {} of the quickstart's model", layer + 1),
        query_text: &words(position.saturating_sub(40), position + 1)?,
        quotes: &quotes?,
    }))
}

/// A query and the blocks it chose, most attended first.
struct Query {
    layer: usize,
    position: usize,
    group: usize,
    chosen: Vec<usize>,
    share: f32,
}

/// The query whose compressed attention lies most on blocks that it chose: selected, but neither
/// forced nor inside the window anyway.
fn telling(trace: &Trace) -> Option<Query> {
    let spec = &trace.spec;
    let first = trace.tokens.saturating_sub(CANDIDATES);
    let mut best: Option<Query> = None;
    for layer in 0..trace.layers.len() {
        for position in first..trace.tokens {
            for group in 0..trace.groups() {
                let shares = trace.compressed(layer, position, group);
                let share_of = |block: usize| -> f32 {
                    let from = block * spec.select_block / spec.compress_stride;
                    let to = (block + 1) * spec.select_block / spec.compress_stride;
                    shares[from.min(shares.len())..to.min(shares.len())].iter().sum()
                };
                let window = (position + 1).saturating_sub(spec.window) / spec.select_block;
                let free = |b: &usize| *b >= spec.select_initial && *b < window;
                let mut chosen: Vec<usize> =
                    trace.selected(layer, position, group).into_iter().filter(free).collect();
                chosen.sort_by(|a, b| share_of(*b).total_cmp(&share_of(*a)).then(a.cmp(b)));
                let share: f32 = chosen.iter().map(|&b| share_of(b)).sum();
                if !chosen.is_empty() && best.as_ref().is_none_or(|b| share > b.share) {
                    best = Some(Query { layer, position, group, chosen, share });
                }
            }
        }
    }
    best
}
