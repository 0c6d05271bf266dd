//! An alignment run from its configuration to its report.

use std::path::Path;

use tercet_model::Model;
use tercet_train::run::{METRICS, Place, Plan, Start, drive};
use tercet_train::tune::start::{self, Beside};
use tercet_train::tune::{Encoder, Order};
use tercet_train::{Control, Error, Event, Report, Result, config, files, metrics};

use crate::chart::{Line, delta_histogram, lines};
use crate::config::{AlignConfig, config_error};
use crate::delta::DeltaCounts;
use crate::objective::Objectives;
use crate::pairs::{Pair, PairRule, Pairs, read_pairs};
use crate::reference::{Precompute, Reference, ask, precomputed};

/// Below a run's output: log-probabilities of chosen, rejected and most probable answers.
pub const SQUEEZING: &str = "squeezing.svg";
/// Below a run's output: how Δ is distributed.
pub const DELTAS: &str = "delta.svg";

/// Aligns as `config` says, until its last step or until `control.stop` is raised; either way the
/// newest checkpoint holds everything. Returns how it ended.
pub fn align(
    config: &AlignConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Report> {
    let text = config::to_toml(config)?;
    let place = Place::open(&config.output, &text, control.resume, observe)?;
    let objectives = config.align.objectives()?;
    let beside = Beside::load(&config.model.path)?;
    let first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    start::check_context(config.data.context, &first)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let rule = PairRule {
        data: &config.data,
        delta: &config.align.delta,
        needs_delta: objectives.needs_delta(),
    };
    let pairs = read_pairs(&rule, &encoder, control.stop)?;
    let other = match &config.align.reference {
        Some(folder) if objectives.needs_reference() => Some(other(folder, &first, config)?),
        _ => None,
    };
    // Read anew on every resume, these must be what they were: the start, which an adapter stands
    // on and answers are measured against, and a reference of its own.
    let anew = objectives.needs_reference() || first.active_adapter().is_some();
    let models: Vec<&Model> = anew.then_some(&first).into_iter().chain(&other).collect();
    let key = start::key(&pairs.key, &models)?;
    place.check_data(&key)?;
    pairs.count.write(&config.output.join("rows.jsonl"))?;
    files::write_atomic(
        &config.output.join(DELTAS),
        delta_histogram(&pairs.raw_deltas)?.as_bytes(),
    )?;
    said(&pairs, &objectives, &first).iter().for_each(|line| observe(Event::Note(line)));
    let reference = reference(config, &objectives, (&first, other), &pairs, control, observe)?;
    let model = match &place.from {
        Some(checkpoint) => start::resumed(&first, checkpoint, &config.train)?,
        None => first,
    };
    let train = config.train.loop_config();
    let tokens: usize = pairs.train.iter().map(Pair::tokens).sum();
    let plan = Plan {
        output: &config.output,
        config: &text,
        train: &train,
        checkpoint: &config.checkpoint,
        steps: config.train.steps(pairs.train.len()),
        data_key: &key,
        sidecars: &beside.sidecars,
        base: &config.model.path.to_string_lossy(),
        flops_per_token: start::flops_per_token(&model, tokens / (2 * pairs.train.len())),
        unigram: None,
        loss_unit: "",
    };
    let start = Start::new(model, place.from.as_deref())?;
    let mut task = crate::task::Align {
        train: &config.train,
        objectives: &objectives,
        reference,
        pairs: &pairs.train,
        validation: &pairs.validation,
        order: Order::new(pairs.train.len(), &config.train),
        context: config.data.context,
    };
    let (report, _) = drive(&plan, start, place.from.clone(), &mut task, control, observe)?;
    draw_squeezing(&config.output)?;
    Ok(report)
}

/// What the rows came to, before anything is trained on them.
fn said(pairs: &Pairs, objectives: &Objectives, model: &Model) -> Vec<String> {
    let share = |part: usize| 100.0 * part as f64 / pairs.count.rows.max(1) as f64;
    let mut lines = vec![format!(
        "{}; {} pairs to train on, {} held out; {} parameters train",
        pairs.count,
        pairs.train.len(),
        pairs.validation.len(),
        model.trained().elements()
    )];
    let mut sorted = pairs.raw_deltas.clone();
    sorted.sort_by(f64::total_cmp);
    if let (Some(first), Some(last)) = (sorted.first(), sorted.last()) {
        let middle = sorted[sorted.len() / 2];
        let below = sorted.partition_point(|&delta| delta < 0.0);
        let small = sorted.partition_point(|&delta| delta < 0.05) - below;
        let of = |part: usize| 100.0 * part as f64 / sorted.len() as f64;
        lines.push(format!(
            "scores on {} rows ({:.0} %); Δ from {first:.3} over {middle:.3} to {last:.3}, {:.0} % \
             below 0, {:.0} % of 0 to 0.05",
            pairs.scored,
            share(pairs.scored),
            of(below),
            of(small),
        ));
    } else if !objectives.needs_delta() {
        lines.push("no scores, and none are needed".into());
    }
    let DeltaCounts { clipped, dropped, swapped, .. } = pairs.deltas;
    if clipped + dropped + swapped > 0 {
        lines.push(format!(
            "negative Δ: {clipped} set to 0, {dropped} pairs left out, {swapped} pairs exchanged"
        ));
    }
    lines
}

/// The reference, checked against the policy as the run begins.
fn reference(
    config: &AlignConfig,
    objectives: &Objectives,
    (first, other): (&Model, Option<Model>),
    pairs: &Pairs,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Reference> {
    if !objectives.needs_reference() {
        return Ok(Reference::None);
    }
    let mut model = other.unwrap_or_else(|| first.clone());
    model.to_device(control.device)?;
    let all: Vec<&Pair> = pairs.train.iter().chain(&pairs.validation).collect();
    if config.align.reference.is_none() {
        let mut policy = first.clone();
        policy.to_device(control.device)?;
        check_start(&policy, &model, &all[..all.len().min(4)], objectives.ld_alpha())?;
        observe(Event::Note("policy and reference agree: rewards begin at 0"));
    } else {
        observe(Event::Note(
            "the reference is another model: rewards do not begin at 0, which is not checked",
        ));
    }
    if !config.align.precompute {
        return Ok(Reference::Model(Box::new(model)));
    }
    let rule = Precompute {
        folder: &config.output,
        pairs_key: &pairs.key,
        alpha: objectives.ld_alpha(),
        micro_tokens: config.train.micro_tokens,
        stop: control.stop,
    };
    Ok(Reference::Known(precomputed(&rule, &model, &all, observe)?))
}

/// A separate reference, which must read the same tokens.
fn other(folder: &Path, policy: &Model, config: &AlignConfig) -> Result<Model> {
    let model = Model::load_as(folder, config.train.dtype.dtype())?;
    let (has, needs) = (model.config().vocab_size, policy.config().vocab_size);
    if has != needs {
        return Err(config_error(
            "align.reference",
            &format!(
                "has a vocabulary of {has} tokens, the policy one of {needs}; a reference must \
                 read the same tokens"
            ),
        ));
    }
    let most = model.config().max_position_embeddings;
    if most < config.data.context {
        return Err(config_error(
            "align.reference",
            &format!("has a context of {most} tokens, less than data.context"),
        ));
    }
    let same = |path: &Path| std::fs::read(path.join("tokenizer.json")).ok();
    if let (Some(a), Some(b)) = (same(folder), same(&config.model.path))
        && a != b
    {
        return Err(config_error(
            "align.reference",
            "has another tokenizer.json than the policy; a reference must read the same tokens",
        ));
    }
    Ok(model)
}

/// Refuses a policy whose rewards do not begin at 0: then the loss of every objective on ratios
/// would not begin where it should, DPO's and MaPPO's at ln 2.
///
/// Both models are one and compute the same sums in the same order, so their sums are equal.
fn check_start(policy: &Model, reference: &Model, pairs: &[&Pair], alpha: f64) -> Result<()> {
    let (a, b) = (ask(policy, pairs, alpha)?, ask(reference, pairs, alpha)?);
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        for (which, policy, reference) in
            [("chosen", a.chosen, b.chosen), ("rejected", a.rejected, b.rejected)]
        {
            if !policy.is_finite() {
                return Err(Error::Data(format!(
                    "the model's log-probability of the {which} answer of pair {} is {policy}; \
                     its weights are damaged, or the wrong dtype was chosen",
                    i + 1
                )));
            }
            if policy != reference {
                return Err(Error::Data(format!(
                    "before the first step the policy gives the {which} answer of pair {} a \
                     log-probability of {policy}, the reference {reference}: rewards would not \
                     begin at 0",
                    i + 1
                )));
            }
        }
    }
    Ok(())
}

/// Draws what became of the log-probabilities: under DPO that of the chosen answer falls too,
/// squeezed towards the most probable one (arXiv 2407.10490).
fn draw_squeezing(output: &Path) -> Result<()> {
    let records = metrics::read(&output.join(METRICS))?;
    let line = |name: &str, key: &str| Line {
        name: name.to_owned(),
        points: records
            .iter()
            .filter_map(|record| Some((record.step as f64, *record.measures.get(key)?)))
            .collect(),
    };
    let drawn = lines(
        &[
            line("chosen", "logps/chosen"),
            line("rejected", "logps/rejected"),
            line("most probable at the chosen answer's places", "logps/best"),
        ],
        "step",
        "log-probability of an answer (nats)",
    )?;
    files::write_atomic(&output.join(SQUEEZING), drawn.as_bytes())
}
