//! An alignment run from its configuration to its report.

use std::path::Path;

use tercet_model::Model;
use tercet_train::config::Precision;
use tercet_train::run::{METRICS, Place, Plan, Start, drive};
use tercet_train::tune::start::{self, Beside};
use tercet_train::tune::{Encoder, Order};
use tercet_train::{Control, Error, Event, Report, Result, config, files, metrics};

use crate::chart::{Line, delta_histogram, lines};
use crate::config::AlignConfig;
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
    let mut first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    start::check_context(config.data.context, &first)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let rule = PairRule {
        data: &config.data,
        delta: &config.align.delta,
        needs_delta: objectives.needs_delta(),
    };
    let pairs = read_pairs(&rule, &encoder, control.stop)?;
    if objectives.needs_kto_z() && pairs.train.len() < 2 {
        return Err(Error::Data(
            "kto needs a second pair, whose answer it sets against the first one's prompt".into(),
        ));
    }
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
    // On a device before it is copied: policy and reference then share what is not trained.
    first.to_device(control.device)?;
    pairs.count.write(&config.output.join("rows.jsonl"))?;
    files::write_atomic(
        &config.output.join(DELTAS),
        delta_histogram(&pairs.raw_deltas)?.as_bytes(),
    )?;
    said(&pairs, config.align.delta.value, &objectives, &first)
        .iter()
        .for_each(|line| observe(Event::Note(line)));
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
    let outcome = drive(&plan, start, place.from.clone(), &mut task, control, observe);
    let (report, _) = outcome.map_err(|error| error.advised(|| config.train.advice()))?;
    draw_squeezing(&config.output)?;
    Ok(report)
}

/// What the rows came to, before anything is trained on them.
fn said(
    pairs: &Pairs,
    constant: Option<f64>,
    objectives: &Objectives,
    model: &Model,
) -> Vec<String> {
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
    if let (Some(value), true) = (constant, objectives.needs_delta()) {
        lines.push(format!("Δ = {value} for every pair, as configured; no score is looked at"));
    } else if let (Some(first), Some(last)) = (sorted.first(), sorted.last()) {
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
    let DeltaCounts { clipped, dropped, swapped } = pairs.deltas;
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
    if !config.align.precompute {
        let reference = Reference::Model(Box::new(model));
        check_start(config, objectives, first, &reference, &pairs.train, observe)?;
        return Ok(reference);
    }
    let rule = Precompute {
        folder: &config.output,
        pairs_key: &pairs.key,
        alpha: objectives.ld_alpha(),
        micro_tokens: config.train.micro_tokens,
        stop: control.stop,
    };
    let reference = Reference::Known(precomputed(&rule, &model, &all, observe)?);
    check_start(config, objectives, first, &reference, &pairs.train, observe)?;
    Ok(reference)
}

/// A separate reference, which must read the same tokens.
fn other(folder: &Path, policy: &Model, config: &AlignConfig) -> Result<Model> {
    let model = Model::load_as(folder, config.train.dtype.dtype())?;
    let refused = |problem: String| Error::config("align.reference", &problem);
    check_reads_the_same(folder, &model, &config.model.path, policy).map_err(refused)?;
    let most = model.config().max_position_embeddings;
    if most < config.data.context {
        return Err(refused(format!("has a context of {most} tokens, less than data.context")));
    }
    Ok(model)
}

/// Says why a model does not read the tokens of another, if it does not.
pub(crate) fn check_reads_the_same(
    folder: &Path,
    model: &Model,
    policy_folder: &Path,
    policy: &Model,
) -> std::result::Result<(), String> {
    let (has, needs) = (model.config().vocab_size, policy.config().vocab_size);
    if has != needs {
        return Err(format!(
            "has a vocabulary of {has} tokens, the policy one of {needs}; it must read the same \
             tokens"
        ));
    }
    let tokenizer = |path: &Path| std::fs::read(path.join("tokenizer.json")).ok();
    match (tokenizer(folder), tokenizer(policy_folder)) {
        (Some(a), Some(b)) if a != b => Err("has another tokenizer.json than the policy; it must \
                                             read the same tokens"
            .into()),
        _ => Ok(()),
    }
}

/// Pairs that are looked at before the first step.
const LOOKED_AT: usize = 4;

/// How far the log-probability of one token may be off when it was computed in other company:
/// products of f32 numbers are summed in another order, and bf16 rounds every activation to
/// 2⁻⁹ of itself.
fn rounding(dtype: Precision) -> f64 {
    match dtype {
        Precision::F32 => 1e-4,
        Precision::Bf16 => 5e-2,
    }
}

/// Refuses a policy whose rewards do not begin at 0 (then the loss of every objective on ratios
/// does not begin where it should, DPO's and MaPPO's at ln 2), unless the reference is said to be
/// another model; and one whose numbers are none.
fn check_start(
    config: &AlignConfig,
    objectives: &Objectives,
    policy: &Model,
    reference: &Reference,
    pairs: &[Pair],
    observe: &mut dyn FnMut(Event),
) -> Result<()> {
    let looked: Vec<&Pair> = pairs.iter().take(LOOKED_AT).collect();
    let alpha = objectives.ld_alpha();
    let policy = ask(policy, &looked, alpha)?;
    let reference = match reference {
        Reference::None => return Ok(()),
        Reference::Model(model) => ask(model, &looked, alpha)?,
        Reference::Known(sums) => sums[..looked.len()].to_vec(),
    };
    let mut furthest = 0.0f64;
    for (i, ((pair, a), b)) in looked.iter().zip(&policy).zip(&reference).enumerate() {
        for (which, example, policy, reference) in [
            ("chosen", &pair.chosen, a.chosen, b.chosen),
            ("rejected", &pair.rejected, a.rejected, b.rejected),
        ] {
            if !policy.is_finite() || !reference.is_finite() {
                return Err(Error::Data(format!(
                    "before the first step the {which} answer of pair {} has a log-probability of \
                     {policy} under the policy and {reference} under the reference; weights are \
                     damaged, or train.dtype is the wrong one",
                    i + 1
                )));
            }
            let apart = (policy - reference).abs();
            let most = rounding(config.train.dtype) * example.counted() as f64;
            if apart > most && !config.align.reference_differs {
                return Err(Error::Data(format!(
                    "before the first step the policy gives the {which} answer of pair {} a \
                     log-probability of {policy:.4}, the reference {reference:.4}: rewards would \
                     not begin at 0. Leave align.reference out to measure against the policy as \
                     the run begins, or say align.reference_differs = true if this is meant",
                    i + 1
                )));
            }
            furthest = furthest.max(apart);
        }
    }
    let said = match config.align.reference_differs {
        true => format!(
            "the reference is another model: log-probabilities differ by up to {furthest:.3} nats"
        ),
        false => "policy and reference agree: rewards begin at 0".into(),
    };
    observe(Event::Note(&said));
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
