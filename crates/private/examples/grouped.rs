//! What persons' gradients cost: forward and backward of LoRA over packed batches, plain (one sum),
//! grouped (a gradient for each person, clipped and summed) and each (a person at a time), at equal
//! portions. The peak of memory is that of the ways of one run; times are compared within one,
//! round by round:
//!
//! `cargo run --release -p tercet-private --example grouped -- plain,grouped,each [r] [tokens]`

use std::time::Instant;

use serde_json::json;
use tercet_model::{Adapter, Batch, ForwardOptions, LoraConfig, Model};
use tercet_private::mechanism::clip::{Blocks, ClippedSum, Grid, Rule};
use tercet_tensor::{DType, Grads, Tape, Tensor};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const PERSONS: usize = 8;
const ROUNDS: usize = 9;

fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ways: Vec<&str> = args.first().map_or("plain,grouped", String::as_str).split(',').collect();
    let number = |at: usize, default| args.get(at).map_or(Ok(default), |text| text.parse());
    let (r, tokens): (usize, usize) = (number(1, 8)?, number(2, 128)?);
    let config = serde_json::from_value(json!({
        "model_type": "tercet", "vocab_size": 8192, "hidden_size": 512,
        "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
    }))?;
    let mut model = Model::new(config, 1, DType::F32)?;
    let adapter = Adapter::new(&model, LoraConfig { r, ..LoraConfig::default() }, 2)?;
    model.attach("a", adapter)?;
    model.activate(Some("a"))?;
    let params = model.trained();
    let sizes: Vec<usize> = params.tensors().iter().map(Tensor::len).collect();
    let pairs: Vec<Vec<usize>> =
        model.adapter("a").into_iter().flat_map(|a| a.pairs().map(|(_, slots)| slots)).collect();
    let blocks = Blocks::by_pair(sizes.clone(), &pairs)?;
    let mut sum = ClippedSum::new(blocks, vec![0.1; pairs.len()], Rule::Clip, Grid::Fine)?;
    let persons: Vec<Vec<i32>> = (0..PERSONS)
        .map(|p| (0..tokens).map(|t| ((t * 31 + p * 977 + t * t * 7) % 8192) as i32).collect())
        .collect();

    let mut times = vec![Vec::new(); ways.len()];
    for round in 0..ROUNDS * ways.len() {
        let way = ways[round % ways.len()];
        let start = Instant::now();
        let mut clipping = 0.0;
        match way {
            "plain" => drop(walk(&model, &persons, Grads::new(sizes.len()))?),
            "grouped" => {
                let groups = (0..PERSONS).map(|p| p * tokens..(p + 1) * tokens).collect();
                let grads = walk(&model, &persons, Grads::by_group(sizes.len(), groups)?)?;
                clipping = clip(&mut sum, PERSONS, &grads)?;
            }
            "each" => {
                for person in &persons {
                    let grads =
                        walk(&model, std::slice::from_ref(person), Grads::new(sizes.len()))?;
                    clipping += clip(&mut sum, 1, &grads)?;
                }
            }
            other => return Err(format!("{other:?} is not plain, grouped or each").into()),
        }
        times[round % ways.len()].push((1e3 * start.elapsed().as_secs_f64(), 1e3 * clipping));
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    println!(
        "{PERSONS} persons of {tokens} tokens, r = {r}, {} parameters of {}; {peak}",
        params.elements(),
        model.params().elements(),
    );
    for (way, mut times) in ways.iter().zip(times) {
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let ((median, clipping), fastest) = (times[ROUNDS / 2], times[0].0);
        println!(
            "{way}: {median:.0} ms a step ({fastest:.0} at best), clipping {clipping:.0} ms of it"
        );
    }
    Ok(())
}

/// Forward, and back into `grads`, each person's loss being the mean over its tokens.
fn walk(model: &Model, persons: &[Vec<i32>], mut grads: Grads) -> Fallible<Grads> {
    let sequences: Vec<&[i32]> = persons.iter().map(Vec::as_slice).collect();
    let batch = Batch::next_token(&sequences);
    let slopes: Vec<f32> =
        persons.iter().flat_map(|p| vec![-1.0 / (p.len() - 1) as f32; p.len()]).collect();
    let mut tape = Tape::recording();
    let found = model.token_log_probs(&mut tape, &batch, &ForwardOptions::default())?;
    let slopes = Tensor::from_f32(slopes, found.log_probs.shape())?;
    tape.backward_from(&[(&found.log_probs, slopes)], &mut grads)?;
    Ok(grads)
}

/// Seconds it took.
fn clip(sum: &mut ClippedSum, persons: usize, grads: &Grads) -> Fallible<f64> {
    let start = Instant::now();
    let slots: Result<Vec<Option<&[f32]>>, _> =
        grads.iter().map(|grad| grad.map(|grad| grad.as_f32()).transpose()).collect();
    sum.add(persons, &slots?)?;
    Ok(start.elapsed().as_secs_f64())
}
