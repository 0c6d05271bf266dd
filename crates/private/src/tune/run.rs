//! A private run from its configuration to its report.

use std::path::Path;

use sha2::{Digest, Sha256};
use tercet_model::Model;
use tercet_train::run::{METRICS, Place, Plan, Start, drive};
use tercet_train::tune::Encoder;
use tercet_train::tune::start::{self, Beside};
use tercet_train::{Control, Error, Event, Report, Result, config as toml, files};

use super::account::Account;
use super::budget::{Budget, INSECURE, shown};
use super::config::PrivateConfig;
use super::planted::{CANARIES, Canaries, Fits};
use super::rows::{PrivateRows, rows};
use super::task::{Private, Secrets, layout};
use super::{kept, report};
use crate::accounting::rdp;
use crate::mechanism::clip::Blocks;
use crate::mechanism::key::Key;
use crate::mechanism::ledger::{Identity, Ledger, Mark};
use crate::mechanism::noise::hardened_distance;
use crate::mechanism::statistics::Statistics;
use crate::method::{Layout, Method, Recipe, Steering, quantile};

/// Below a run's output: what was spent.
pub const LEDGER: &str = "ledger.jsonl";
/// Below a run's output: keeps the keys of data in checkpoints from telling who was in them.
pub(super) const SALT: &str = "data.salt";
/// Share of the statistics that a controller cannot do without.
const SHARE: f64 = 0.02;

/// Tunes as `config` says, until its last step, until the budget is used up, or until
/// `control.stop` is raised. Returns how it ended.
///
/// # Errors
/// What is wrong with configuration, rows, folder or ledger, before anything is spent; the loop's.
pub fn tune(
    config: &PrivateConfig,
    control: &Control,
    observe: &mut dyn FnMut(Event),
) -> Result<Report> {
    let text = toml::to_toml(config)?;
    let budget = Budget::plan(config)?;
    let place = Place::open(&config.output, &text, control.resume, observe)?;
    let beside = Beside::load(&config.model.path)?;
    let first = start::first(&config.model, config.lora.as_ref(), &config.train)?;
    start::check_context(config.data.context, &first)?;
    check_model(&first)?;
    let encoder = Encoder::new(&beside.tokenizer, first.config(), &beside.generation)?;
    let new = place.from.is_none() && !config.output.join(LEDGER).exists();
    let salt = salt(&config.output, new)?;
    let mut rows = rows(config, &encoder, &salt, control.stop)?;
    let (slots, layout) = layout(&first, config.private.freeze_a)?;
    let recipe = recipe(config, &budget, &layout)?;
    let price = price(&recipe.statistics);
    let mut steering = Steering::new(recipe, layout)?;
    let canaries = canaries(config, &first, &steering, new)?;
    if let Some(canaries) = &canaries {
        rows.plant(canaries, config)?;
    }
    let key = start::key(&rows.key, &[&first])?;
    place.check_data(&key).map_err(|error| of_canaries(config, error))?;
    rows.count.write(&config.output.join("rows.jsonl"))?;
    let mut notes = said(&rows, &first);
    notes.extend(price);
    let lines = budget.lines(config);
    notes.extend(lines.iter().map(|(name, text)| format!("{name}: {text}")));
    notes.iter().for_each(|line| observe(Event::Note(line)));

    if config.private.hardened {
        let least = steering.least_sigma(0).min(0.7 * budget.sigma);
        check_hardened(&budget, least, steering.blocks(), steering.statistics())?;
    }
    let (mark, model) = match &place.from {
        Some(checkpoint) => {
            let (mark, state) = kept::read(checkpoint)?;
            steering.restore(&state)?;
            (Some(mark), start::resumed(&first, checkpoint, &config.train)?)
        }
        None => (None, first),
    };
    let start = Start::new(model, place.from.as_deref())?;
    let next = start.state.as_ref().map_or(0, |state| state.run.step);
    let ledger = ledger(config, &salt, &key, mark.as_ref(), control.resume)?;
    check_released(&config.output, ledger.entries().len() as u64)?;
    let account = Account::new(budget.clone(), ledger.entries())?;
    let secret = match config.private.insecure_seed {
        Some(seed) => Key::insecure(seed),
        None => Key::from_os()?,
    };
    let train = config.train.loop_config();
    let plan = Plan {
        output: &config.output,
        config: &text,
        train: &train,
        checkpoint: &config.checkpoint,
        steps: budget.steps,
        data_key: &key,
        sidecars: &beside.sidecars,
        base: &config.model.path.to_string_lossy(),
        flops_per_token: 0.0,
        unigram: None,
        loss_unit: "nats per learnt token",
    };
    let people = (&rows.train[..], &rows.validation[..]);
    let secrets = Secrets { key: secret, ledger };
    let canaries = match canaries {
        Some(canaries) => canaries.gradients(place.from.as_deref())?,
        None => None,
    };
    let parts = (steering, account);
    let mut task = Private::new(config, people, canaries, slots, parts, secrets, next)?;
    let outcome = drive(&plan, start, place.from.clone(), &mut task, control, observe);
    let (report, _) = outcome.map_err(|error| error.advised(|| advice(config)))?;
    let promise = task.promise()?;
    files::write_atomic(&config.output.join(report::FILE), &promise.to_json()?)?;
    if report.finished && report.steps < budget.steps {
        observe(Event::Note(&format!(
            "the budget is used up: the run ends after {} of {} steps",
            report.steps, budget.steps
        )));
    }
    let spent = match promise.epsilon {
        None => "NOT PRIVATE: no noise was added".to_owned(),
        Some(epsilon) => format!(
            "epsilon {} at delta {:.2e}, after {} steps",
            shown(epsilon),
            promise.delta,
            promise.steps
        ),
    };
    observe(Event::Note(&spent));
    if config.private.insecure_seed.is_some() {
        observe(Event::Note(INSECURE));
    }
    Ok(report)
}

/// Refuses a model whose gradients would mix persons.
fn check_model(model: &Model) -> Result<()> {
    if model.config().moe.is_some() {
        return Err(Error::config(
            "model.path",
            "is a mixture of experts: where a token goes may depend on who else is in the batch. \
             Tune a dense model",
        ));
    }
    let adapter = model.active_adapter().and_then(|name| model.adapter(name));
    if adapter.is_some_and(|adapter| adapter.config().dropout > 0.0) {
        return Err(Error::config(
            "model.adapter",
            "has dropout, which depends on who else is in the step; set lora_dropout to 0 in its \
             adapter_config.json",
        ));
    }
    Ok(())
}

/// The canaries that a run plants, when it does; new ones for a `new` run.
///
/// # Errors
/// As [`Canaries::open`].
pub(super) fn canaries(
    config: &PrivateConfig,
    first: &Model,
    steering: &Steering,
    new: bool,
) -> Result<Option<Canaries>> {
    let Some(section) = &config.private.canaries else { return Ok(None) };
    let (vocab, context) = (first.config().vocab_size, config.data.context);
    let fits = Fits { vocab, context, dims: &steering.blocks().dims() };
    let seed = || match config.private.insecure_seed {
        Some(seed) => Ok(seed),
        None => {
            let mut bytes = [0; 8];
            getrandom::fill(&mut bytes).map_err(|e| crate::Error::Entropy(e.to_string()))?;
            Ok(u64::from_le_bytes(bytes))
        }
    };
    Canaries::open(&config.output, section, &fits, (new, seed)).map(Some)
}

/// What a key of data tells of a changed plan of canaries as well.
pub(super) fn of_canaries(config: &PrivateConfig, error: Error) -> Error {
    match (error, &config.private.canaries) {
        (Error::Checkpoint(text), Some(_)) => {
            Error::Checkpoint(format!("{text}. A changed {CANARIES} has the same effect"))
        }
        (error, _) => error,
    }
}

/// 32 random bytes in a file of the run, made when it is not there and the run is `new`: with others
/// neither the checkpoint's key of the data nor the ledger's name of the run would be theirs.
fn salt(output: &Path, new: bool) -> Result<Vec<u8>> {
    let path = output.join(SALT);
    if new && !path.exists() {
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).map_err(|e| crate::Error::Entropy(e.to_string()))?;
        files::write_atomic(&path, &salt)?;
    }
    let salt = std::fs::read(&path).map_err(|error| {
        Error::Checkpoint(format!(
            "{} cannot be read: {error}; checkpoints and the ledger know this run by it. Bring it \
             back from a copy",
            path.display()
        ))
    })?;
    if salt.len() == 32 {
        return Ok(salt);
    }
    Err(Error::Checkpoint(format!(
        "{} has {} bytes, expected 32; bring it back from a copy",
        path.display(),
        salt.len()
    )))
}

/// What the method is made of, now that the adapters are known.
///
/// # Errors
/// As [`statistics`].
pub fn recipe(config: &PrivateConfig, budget: &Budget, layout: &Layout) -> Result<Recipe> {
    let private = &config.private;
    let by_adapter = private.by_adapter();
    let blocks = if by_adapter { layout.pairs.len() } else { 1 };
    let statistics = statistics(config, budget, blocks)?;
    Ok(Recipe {
        method: private.method,
        by_adapter,
        threshold: private.threshold.unwrap_or(private.method.threshold()),
        split: private.division.split(),
        balance: private.balance,
        tangent: private.tangent,
        statistics,
        sigma: budget.sigma,
        moves_sigma: budget.mode == super::Mode::M2,
        every: config.every(),
        steps: budget.steps,
        batch: budget.batch,
        seed: config.train.seed,
        eta: eta(budget, config.every())?,
        quantile: private.quantile.clone(),
        schedule: private.schedule.clone(),
    })
}

/// The nominal cost of the steps between two decisions: a controller that spends it is paid half of
/// what it gained over it.
fn eta(budget: &Budget, every: u64) -> Result<f64> {
    // Without noise nothing has a cost; gains are paid as they are.
    if budget.epsilon.is_none() {
        return Ok(1.0);
    }
    Ok(every as f64 * rdp::rho(budget.sigma, budget.rate, budget.order)?)
}

/// What is released beside the gradient, for `blocks` thresholds.
///
/// # Errors
/// [`Error::Config`] when the counts would take nearly all of the budget.
pub fn statistics(config: &PrivateConfig, budget: &Budget, blocks: usize) -> Result<Statistics> {
    let private = &config.private;
    let found = match (private.method, private.share) {
        (Method::Quantile, Some(share)) => Statistics::new(share, false, blocks),
        // Without noise there is no budget to share; the counts must be there.
        (Method::Quantile, None) if budget.sigma == 0.0 => Statistics::new(SHARE, false, blocks),
        (Method::Quantile, None) => {
            let noise = private.quantile.count_noise.unwrap_or(budget.batch / 20.0);
            quantile::share(budget.sigma, noise, blocks)
                .and_then(|share| Statistics::new(share.max(1e-6), false, blocks))
        }
        (method, share) if method.is_controlled() => {
            Statistics::new(share.unwrap_or(SHARE), true, blocks)
        }
        (_, Some(share)) => Statistics::new(share, true, 0),
        (_, None) => Ok(Statistics::default()),
    };
    Ok(found?)
}

/// Refuses hardened noise whose distance from a Gaussian is more than the δ that was kept for it;
/// no step has a smaller σ than `least`.
fn check_hardened(
    budget: &Budget,
    least: f64,
    blocks: &Blocks,
    statistics: &Statistics,
) -> Result<()> {
    let Some(epsilon) = budget.epsilon else { return Ok(()) };
    let dims = [blocks.dims(), statistics.sizes()].concat();
    // No block has a smaller multiplier than all of them together.
    let scale = vec![least; dims.len()];
    let step = hardened_distance(&vec![1.0; dims.len()], &scale, &dims);
    let needed = (1.0 + libm::exp(epsilon)) * step * budget.steps as f64;
    if needed <= budget.delta - budget.accounted_delta {
        return Ok(());
    }
    Err(Error::config(
        "private.hardened",
        format!(
            "needs {needed:.1e} of delta for its distance from a Gaussian, more than a thousandth \
             of {:.1e}; raise private.delta, or leave it out",
            budget.delta
        ),
    ))
}

/// The ledger of this run: a new one, or the one that belongs to the checkpoint.
fn ledger(
    config: &PrivateConfig,
    salt: &[u8],
    data: &str,
    mark: Option<&Mark>,
    resume: bool,
) -> Result<Ledger> {
    let digest = |parts: &[&[u8]]| {
        let mut hasher = Sha256::new();
        parts.iter().for_each(|part| hasher.update(part));
        files::hex(&hasher.finalize())
    };
    // How many go through the model at once may change on the way: it changes no bit.
    let mut private = config.private.clone();
    private.micro_people = Some(1);
    let private = toml::to_toml(&private)?;
    let numbers = [config.train.batch as u64, config.steps(), config.data.context as u64];
    let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let identity = Identity {
        run: digest(&[b"run", salt]),
        data: data.to_owned(),
        config: digest(&[private.as_bytes(), &numbers]),
    };
    let path = config.output.join(LEDGER);
    let opened = match (mark, resume) {
        (Some(mark), _) => Ledger::open(&path, &identity, Some(mark)),
        // Killed before its first checkpoint: what it spent is spent.
        (None, true) if path.exists() => Ledger::open(&path, &identity, None),
        (None, _) => {
            if !path.exists() {
                // A new ledger would forget what the folder shows to be spent.
                check_released(&config.output, 0)?;
            }
            Ledger::create(&path, &identity)
        }
    };
    Ok(opened?)
}

/// Refuses a ledger of fewer attempts than steps whose noisy numbers lie in the run's folder: an
/// older copy of it, or none.
fn check_released(output: &Path, attempts: u64) -> Result<()> {
    let path = output.join(METRICS);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    // A line that was being written when the run was killed is not whole.
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_u64();
    let released = text.lines().filter_map(step).max().unwrap_or(0);
    if released <= attempts {
        return Ok(());
    }
    Err(Error::Checkpoint(format!(
        "{} shows {released} steps whose noise was spent, and the ledger beside it holds \
         {attempts}: it is missing, or an older copy. Bring the newest ledger back, or begin a new \
         run in another `output`",
        path.display()
    )))
}

/// What the rows came to. Private: for whoever may see the rows.
fn said(rows: &PrivateRows, model: &Model) -> Vec<String> {
    let mut lines = vec![format!(
        "{}; {} parameters train (these counts are of the data: keep them with it)",
        rows.count,
        model.trained().elements()
    )];
    if rows.over_cap > 0 {
        lines.push(format!(
            "{} rows are left out: their persons have more than private.cap",
            rows.over_cap
        ));
    }
    lines
}

/// What statistics cost, in a line; `None` when there are none.
pub fn price(statistics: &Statistics) -> Option<String> {
    let share = statistics.share();
    (share > 0.0).then(|| {
        format!(
            "statistics take {:.2} % of the budget: {:.2} % more noise on the gradient",
            100.0 * share,
            100.0 * Budget::price_of(share)
        )
    })
}

/// What needs less memory.
fn advice(config: &PrivateConfig) -> String {
    format!("{}; private.micro_people", config.train.advice())
}
