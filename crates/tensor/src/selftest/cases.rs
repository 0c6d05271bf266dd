//! The ops but attention, each in shapes that fill vectors and blocks and in shapes that do not.

use super::{Case, tensor};
use crate::ops::{self, Gelu};
use crate::{Device, Llama3Scaling, Result, RopeTable, Tensor, Var, YarnScaling};

/// Unwraps what cannot fail: shapes here fit their numbers.
fn all_of(shapes: &[&[usize]], seed: u64) -> Vec<Tensor> {
    let inputs = shapes.iter().enumerate().map(|(i, s)| tensor(s, seed + i as u64));
    inputs.collect::<Result<_>>().unwrap_or_default()
}

fn ints(values: Vec<i32>, device: &Device) -> Result<Tensor> {
    let shape = [values.len()];
    Tensor::from_i32(values, &shape)?.to_device(device)
}

fn named(name: &str, shape: &[usize]) -> String {
    format!("{name} {shape:?}")
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    elementwise(&mut cases);
    products(&mut cases);
    norms(&mut cases);
    tokens(&mut cases);
    experts(&mut cases);
    cases
}

fn elementwise(cases: &mut Vec<Case>) {
    for shape in [[1, 1], [3, 7], [64, 129], [300, 1024]] {
        let one = || all_of(&[&shape], 1);
        let two = || all_of(&[&shape, &shape], 2);
        cases.push(Case::new(named("add", &shape), two(), 2, 1, |tape, x, _| {
            Ok(vec![ops::add(tape, &x[0], &x[1])?])
        }));
        cases.push(Case::new(named("scale", &shape), one(), 1, 1, |tape, x, _| {
            Ok(vec![ops::scale(tape, &x[0], -1.7)?])
        }));
        cases.push(Case::new(named("dropout", &shape), one(), 1, 1, |tape, x, _| {
            Ok(vec![ops::dropout(tape, &x[0], 0.3, 42)?])
        }));
        for (name, kind) in [("gelu tanh", Gelu::Tanh), ("gelu exact", Gelu::Exact)] {
            cases.push(Case::new(named(name, &shape), one(), 1, 1, move |tape, x, _| {
                let x = ops::scale(tape, &x[0], 4.0)?;
                Ok(vec![ops::gelu(tape, &x, kind)?])
            }));
        }
        cases.push(Case::new(named("sigmoid", &shape), one(), 1, 1, |tape, x, _| {
            let x = ops::scale(tape, &x[0], 8.0)?;
            Ok(vec![ops::sigmoid(tape, &x)?])
        }));
        cases.push(Case::new(named("swiglu", &shape), two(), 2, 1, |tape, x, _| {
            Ok(vec![ops::swiglu(tape, &x[0], &x[1])?])
        }));
    }
}

fn products(cases: &mut Vec<Case>) {
    for [rows, outer, inner] in
        [[1, 8, 16], [7, 13, 29], [130, 96, 257], [600, 384, 512], [24, 16, 9000]]
    {
        let shapes: [&[usize]; 3] = [&[rows, inner], &[outer, inner], &[outer]];
        let name = format!("linear [{rows}, {inner}] to {outer}");
        let terms = inner.max(outer).max(rows);
        cases.push(Case::new(name.clone(), all_of(&shapes[..2], 10), 1, terms, |tape, x, _| {
            Ok(vec![ops::linear(tape, &x[0], &x[1], None)?])
        }));
        cases.push(Case::new(name + ", bias", all_of(&shapes, 11), 1, terms, |tape, x, _| {
            Ok(vec![ops::linear(tape, &x[0], &x[1], Some(&x[2]))?])
        }));
    }
    // The last has two chunks and one whose tokens are all ignored.
    for (rows, vocab, width) in [(1, 5, 3), (70, 1003, 40), (256, 512, 64), (9000, 320, 8)] {
        let inputs = all_of(&[&[rows, width], &[vocab, width]], 20);
        let name = format!("linear_cross_entropy [{rows}, {width}], vocabulary {vocab}");
        let case = Case::new(name, inputs, 1, vocab.max(rows), move |tape, x, device| {
            let target = |t: usize| match t {
                t if t % 5 == 1 || t >= 8192 => -100,
                t => ((t * 7919) % vocab) as i32,
            };
            let targets = ints((0..rows).map(target).collect(), device)?;
            let x0 = ops::scale(tape, &x[0], 3.0)?;
            Ok(vec![ops::linear_cross_entropy(tape, &x0, &x[1], &targets)?])
        });
        // The logits' gradient is stored in bf16 between the two products: half a unit of 2⁻⁸.
        cases.push(case.stored(1.0 / 512.0));

        let inputs = all_of(&[&[rows, width], &[vocab, width]], 25);
        let name = format!("token_log_probs [{rows}, {width}], vocabulary {vocab}");
        let case = Case::new(name, inputs, 1, vocab.max(rows), move |tape, x, device| {
            let target = |t: usize| match t {
                t if t % 5 == 1 || t >= 8192 => -100,
                t => ((t * 7919) % vocab) as i32,
            };
            let targets = ints((0..rows).map(target).collect(), device)?;
            let x0 = ops::scale(tape, &x[0], 3.0)?;
            let found = ops::token_log_probs(tape, &x0, &x[1], &targets)?;
            let constants = [found.best, found.entropy, found.hits].map(|y| tape.leaf(y));
            Ok([found.log_probs].into_iter().chain(constants).collect())
        });
        cases.push(case.stored(1.0 / 512.0));
    }
}

fn norms(cases: &mut Vec<Case>) {
    let shapes: [&[usize]; 6] =
        [&[1, 8], &[5, 33], &[3, 4, 64], &[257, 128], &[70, 2048], &[4, 5000]];
    for shape in shapes {
        let width = *shape.last().unwrap_or(&1);
        let rows = shape.iter().product::<usize>() / width;
        let inputs = || all_of(&[shape, &[width], &[width]], 30);
        let terms = width.max(rows);
        cases.push(Case::new(named("layer_norm", shape), inputs(), 1, terms, |tape, x, _| {
            Ok(vec![ops::layer_norm(tape, &x[0], &x[1], &x[2], 1e-5)?])
        }));
        let inputs = all_of(&[shape, &[width]], 31);
        cases.push(Case::new(named("rms_norm", shape), inputs, 1, terms, |tape, x, _| {
            Ok(vec![ops::rms_norm(tape, &x[0], &x[1], 1e-6)?])
        }));
    }
}

fn tokens(cases: &mut Vec<Case>) {
    // Ids that come once, tens, hundreds and thousands of times.
    for (vocab, width, count) in
        [(1, 1, 1), (50, 33, 200), (3000, 256, 700), (9, 132, 12_000), (700, 20, 3000)]
    {
        let name = format!("embedding [{vocab}, {width}] of {count}");
        let inputs = all_of(&[&[vocab, width]], 40);
        cases.push(Case::new(name, inputs, 0, count, move |tape, x, device| {
            let ids = (0..count).map(|t| ((t * t * 31 + t) % vocab) as i32).collect();
            Ok(vec![ops::embedding(tape, &x[0], &ints(ids, device)?)?])
        }));
    }
    for [tokens, heads, dim] in [[1, 1, 2], [37, 3, 64], [200, 5, 96], [300, 16, 128]] {
        for (kind, name) in ["plain", "llama3", "yarn"].into_iter().enumerate() {
            let name = format!("rope {name} [{tokens}, {heads}, {dim}]");
            let inputs = all_of(&[&[tokens, heads, dim]], 50);
            cases.push(Case::new(name, inputs, 1, 2, move |tape, x, device| {
                let llama3 = Llama3Scaling {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position_embeddings: 8192,
                };
                let table = match kind {
                    0 => RopeTable::plain(dim, 10_000.0)?,
                    1 => RopeTable::llama3(dim, 500_000.0, &llama3)?,
                    _ => RopeTable::yarn(dim, 10_000.0, &YarnScaling::new(4.0, 2048))?,
                };
                let positions = (0..tokens).map(|t| (t * 97 % 4099) as i32).collect();
                Ok(vec![ops::rope(tape, &x[0], &ints(positions, device)?, &table)?])
            }));
        }
    }
}

/// A layer of experts from the router to the sum; the routes of CPU and device are the same
/// where no two probabilities are nearly equal.
fn experts(cases: &mut Vec<Case>) {
    for (tokens, experts, top_k, width) in [(1, 2, 1, 8), (90, 8, 2, 48), (400, 16, 4, 64)] {
        let mut shapes: Vec<Vec<usize>> = vec![vec![tokens, width], vec![tokens, experts]];
        shapes.extend(vec![vec![40, width]; experts]);
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let name = format!("experts [{tokens}, {width}], {top_k} of {experts}");
        let mut inputs = all_of(&shapes, 60);
        if let Some(logits) = inputs.get_mut(1)
            && let Ok(far) = apart(tokens, experts)
        {
            *logits = far;
        }
        let terms = tokens.max(width);
        cases.push(Case::new(name, inputs, 2, terms, move |tape, x, _| {
            let routing = ops::moe_route(tape, &x[1], top_k, true)?;
            let rows = ops::gather_rows(tape, &x[0], &routing.plan)?;
            let weights: Vec<Var> = x[2..].to_vec();
            let rows = ops::expert_linear(tape, &rows, &weights, &routing.plan)?;
            let sum = ops::scatter_rows(tape, &rows, &routing.weights, &routing.plan)?;
            Ok(vec![sum, routing.balance])
        }));
    }
}

/// Logits of which no two in a row are near each other, in any storage type.
fn apart(tokens: usize, experts: usize) -> Result<Tensor> {
    let logit = |i: usize| {
        let (t, e) = (i / experts, i % experts);
        ((e * 5 + t * 3 + t / experts) % experts) as f32 / 4.0
    };
    Tensor::from_f32((0..tokens * experts).map(logit).collect(), &[tokens, experts])
}
