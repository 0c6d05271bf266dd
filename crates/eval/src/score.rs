//! Log-likelihoods of many continuations.
//!
//! Requests without a common context are packed, some thousand tokens to a forward pass; where
//! several continue one long context, it is read once and each continuation goes on from a copy of
//! its keys and values.

use std::collections::HashMap;

use tercet_model::{Batch, ForwardOptions, IGNORE, Model};
use tercet_tensor::{Device, Tape, log_sum_exp};

use crate::error::Result;
use crate::request::Request;

/// Tokens of a packed forward pass. Numbers do not get better beyond a few thousand.
const PACK_CPU: usize = 2048;
const PACK_CUDA: usize = 8192;

/// What a pass over a few tokens costs, in tokens of a packed pass.
const PASS_CPU: usize = 24;
const PASS_CUDA: usize = 1024;

/// What a continuation is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// `Σ ln p` of its tokens, in nats.
    pub log_prob: f64,
    /// Each of its tokens is the most probable one.
    pub greedy: bool,
}

/// The likelihood of each request, in their order. `done` hears how many requests and tokens have
/// been dealt with since it last did.
pub(crate) fn likelihoods(
    model: &Model,
    requests: &[Request],
    done: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Likelihood>> {
    let cpu = model.device() == Device::Cpu;
    let (pack, pass) = if cpu { (PACK_CPU, PASS_CPU) } else { (PACK_CUDA, PASS_CUDA) };
    let mut found = vec![Likelihood::default(); requests.len()];
    let mut single = Vec::new();
    for group in by_context(requests) {
        let context = requests[group[0]].from;
        if (group.len() - 1) * context > group.len() * pass {
            shared(model, requests, &group, &mut found)?;
            done(group.len(), context * group.len());
        } else {
            single.extend(group);
        }
    }
    // Longest first: the first pass is the one that needs most memory.
    single.sort_by_key(|&at| std::cmp::Reverse(requests[at].tokens.len()));
    let mut rest = &single[..];
    while !rest.is_empty() {
        let mut tokens = 0;
        let mut fits = |&at: &usize| {
            tokens += requests[at].tokens.len() - 1;
            tokens <= pack
        };
        let count = rest.iter().map_while(|at| fits(at).then_some(())).count().max(1);
        let (now, later) = rest.split_at(count);
        packed(model, requests, now, &mut found)?;
        done(now.len(), now.iter().map(|&at| requests[at].tokens.len()).sum());
        rest = later;
    }
    Ok(found)
}

/// One forward pass.
fn packed(
    model: &Model,
    requests: &[Request],
    places: &[usize],
    found: &mut [Likelihood],
) -> Result<()> {
    let mut batch = Batch { input_ids: vec![], targets: vec![], cu_seqlens: vec![0] };
    for &at in places {
        let Request { tokens, from } = &requests[at];
        batch.input_ids.extend(&tokens[..tokens.len() - 1]);
        batch.targets.extend(std::iter::repeat_n(IGNORE, from - 1));
        batch.targets.extend(&tokens[*from..]);
        batch.cu_seqlens.push(batch.input_ids.len() as i32);
    }
    let tape = &mut Tape::inference();
    let each = model.token_log_probs(tape, &batch, &ForwardOptions::default())?;
    let (log_probs, hits) = (each.log_probs.value().to_vec_f32()?, each.hits.to_vec_f32()?);
    for (&at, ends) in places.iter().zip(batch.cu_seqlens.windows(2)) {
        let own = ends[0] as usize + requests[at].from - 1..ends[1] as usize;
        found[at] = Likelihood {
            log_prob: log_probs[own.clone()].iter().map(|&p| f64::from(p)).sum(),
            greedy: hits[own].iter().all(|&hit| hit == 1.0),
        };
    }
    Ok(())
}

/// Several continuations of one context.
fn shared(
    model: &Model,
    requests: &[Request],
    places: &[usize],
    found: &mut [Likelihood],
) -> Result<()> {
    let longest = places.iter().map(|&at| requests[at].tokens.len() - 1).max().unwrap_or(1);
    let mut slots = model.slots(2, longest)?;
    let context = requests[places[0]].context();
    let first = slots.read(model, 0, context)?;
    for &at in places {
        let continuation = requests[at].continuation();
        let mut sum = Likelihood { log_prob: 0.0, greedy: true };
        sum.add(&first, continuation[0]);
        if let Some((_, read)) = continuation.split_last().filter(|(_, read)| !read.is_empty()) {
            slots.copy(0, 1)?;
            slots.read_each(model, 1, read, &mut |i, logits| {
                let rows = logits.chunks_exact(model.config().vocab_size);
                for (row, &target) in rows.zip(&continuation[i + 1..]) {
                    sum.add(row, target);
                }
            })?;
        }
        found[at] = sum;
    }
    Ok(())
}

impl Likelihood {
    /// One token more, given its logits `[vocab]`.
    fn add(&mut self, logits: &[f32], token: i32) {
        let own = logits[token as usize];
        self.log_prob += f64::from(own) - log_sum_exp(logits);
        // The first of equals counts, as in a packed pass.
        let (before, after) = logits.split_at(token as usize);
        self.greedy &= before.iter().all(|&z| z < own) && after.iter().all(|&z| z <= own);
    }
}

/// Places of requests with the same context, groups and places in the order they come in.
fn by_context(requests: &[Request]) -> Vec<Vec<usize>> {
    let mut known: HashMap<&[i32], usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (at, request) in requests.iter().enumerate() {
        let group = *known.entry(request.context()).or_insert(groups.len());
        if group == groups.len() {
            groups.push(Vec::new());
        }
        groups[group].push(at);
    }
    groups
}
