//! One private step of the training loop.
//!
//! Everything that depends on a person stays on this side of `joint::release`: losses,
//! norms, how many were drawn. What the loop, a record, a controller or a checkpoint is given has
//! come out of it, or is public.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use tercet_model::{Batch, ForwardOptions, Model};
use tercet_tensor::{Device, Grads, GroupSum, Tape, Tensor};
use tercet_train::run::{Measured, Task};
use tercet_train::tune::{pack, portions};
use tercet_train::{Error, Result};

use super::account::Account;
use super::config::PrivateConfig;
use super::joint::{self, Gradients, Portion};
use super::kept;
use super::planted::Gradients as Planted;
use super::report::Promise;
use super::rows::Person;
use crate::mechanism::clip::ClippedSum;
use crate::mechanism::key::Key;
use crate::mechanism::ledger::Ledger;
use crate::mechanism::noise::Noise;
use crate::mechanism::sampling::Sampler;
use crate::method::{Cost, Layout, Steering};

/// Private tuning.
pub struct Private<'a> {
    config: &'a PrivateConfig,
    /// Trained on.
    people: &'a [Person],
    /// Held out.
    validation: &'a [Person],
    /// Persons of whom there is nothing but a gradient.
    canaries: Option<Planted>,
    /// The slots of the model that are released, in the order of the layout.
    slots: Vec<usize>,
    steering: Steering,
    account: Account,
    ledger: Ledger,
    key: Key,
    sampler: Sampler,
    noise: Noise,
    sum: ClippedSum,
    /// What is summed up where the model is, when that is not here.
    on_device: Option<GroupSum>,
    /// Rows of every portion, and the most persons of one.
    rows: usize,
    at_once: usize,
    /// The next step, counted from 0.
    next: u64,
}

/// Persons filled up to a number of rows that is always the same; where each one's rows end.
fn packed(
    people: &[&Person],
    (rows, context): (usize, usize),
) -> Result<(Batch, Vec<Range<usize>>)> {
    let mut batch = pack(people.iter().flat_map(|person| &person.examples));
    batch.fill_up(rows, context)?;
    let (mut groups, mut from) = (Vec::new(), 0);
    for person in people {
        let to = from + person.tokens();
        groups.push(from..to);
        from = to;
    }
    Ok((batch, groups))
}

/// The secrets of a run and where they are spent.
pub struct Secrets {
    /// Coins and noise.
    pub key: Key,
    /// What is spent.
    pub ledger: Ledger,
}

impl<'a> Private<'a> {
    /// From step `next` on: persons to train on and to hold out, canaries beside them, the slots of
    /// the model that are released, in the order of the layout, what decides thresholds and what
    /// counts the budget.
    ///
    /// # Errors
    /// As [`ClippedSum::with_rules`] and [`Sampler::new`].
    pub fn new(
        config: &'a PrivateConfig,
        (people, validation): (&'a [Person], &'a [Person]),
        canaries: Option<Planted>,
        slots: Vec<usize>,
        (steering, account): (Steering, Account),
        Secrets { key, ledger }: Secrets,
        next: u64,
    ) -> Result<Self> {
        let sampler = Sampler::new(&key, account.budget().rate)?;
        let noise = Noise::new(&key);
        let sum = joint::clipped_sum(&steering, config.private.hardened)?;
        let rows = config.rows()?;
        let at_once = config.people_at_once(steering.blocks().sizes().iter().sum());
        Ok(Self {
            config,
            people,
            validation,
            canaries,
            slots,
            steering,
            account,
            ledger,
            key,
            sampler,
            noise,
            sum,
            on_device: None,
            rows,
            at_once,
            next,
        })
    }

    /// Adds the clipped gradients of these persons to the sum. Private.
    ///
    /// A person's loss is the mean over the tokens that count; the pass sums it up, so that no bit
    /// of what a token gives depends on how many there are, and the sum's gradient is shortened.
    fn gather(&mut self, model: &Model, people: &[&Person]) -> Result<()> {
        let context = self.config.data.context;
        let (batch, mut groups) = packed(people, (self.rows, context))?;
        let (first, all) = (groups.last().map_or(0, |last| last.end), batch.input_ids.len());
        // Rows of nobody, in groups as long as somebody's.
        groups.extend((first..all).step_by(context).map(|at| at..(at + context).min(all)));
        let options =
            ForwardOptions { recompute: self.config.train.recompute, ..ForwardOptions::default() };
        let mut tape = Tape::recording();
        let (loss, losses) = model.forward_loss_sum(&mut tape, &batch, &options)?;
        let shares: Vec<f64> = people.iter().map(|own| 1.0 / own.counted() as f64).collect();
        let losses: Vec<f32> = match self.steering.statistics().is_empty() {
            true => vec![0.0; people.len()],
            false => {
                let sums = sums_of(&losses, &groups[..people.len()])?;
                sums.iter().zip(&shares).map(|(sum, share)| (sum * share) as f32).collect()
            }
        };
        let mut grads = Grads::by_group(model.trained().len(), groups)?;
        tape.backward(&loss, &mut grads)?;
        let found = self.slots.iter().map(|&slot| grads.get(slot));
        let gradients = match (&mut self.on_device, found.clone().collect::<Option<Vec<_>>>()) {
            (Some(there), Some(tensors)) => Gradients::There(there, tensors),
            _ => {
                let own = self.slots.iter().zip(found).map(|(&slot, gradient)| {
                    let most = people.len() * model.trained().tensor(slot).len();
                    gradient.map(|gradient| numbers(gradient, most)).transpose()
                });
                Gradients::Here(own.collect::<Result<_>>()?)
            }
        };
        let portion = Portion { losses: &losses, shares: &shares, gradients };
        joint::add(&mut self.sum, &self.steering, portion)
    }

    /// The released slots' weights; empty where nobody wants them.
    fn weights(&self, model: &Model) -> Result<Vec<Vec<f32>>> {
        if !self.steering.wants_weights() {
            return Ok(Vec::new());
        }
        let own = |&slot: &usize| model.trained().tensor(slot).to_vec_f32();
        Ok(self.slots.iter().map(own).collect::<tercet_tensor::Result<_>>()?)
    }

    /// The drawn persons' gradients into the sum; false when stopped, which leaves it empty.
    fn draw(&mut self, model: &Model, stop: &AtomicBool) -> Result<bool> {
        let stream = self.ledger.next_stream();
        let canaries = self.canaries.as_ref().map_or(0, Planted::included);
        let everybody = self.people;
        let mut drawn = self.sampler.draw(stream, everybody.len() + canaries);
        let persons = drawn.partition_point(|&i| i < everybody.len());
        if let Some(canaries) = &self.canaries {
            for &i in &drawn[persons..] {
                canaries.add(i - everybody.len(), &mut self.sum, &self.steering)?;
            }
        }
        drawn.truncate(persons);
        let drawn: Vec<&Person> = drawn.into_iter().map(|i| &everybody[i]).collect();
        for portion in portions(drawn.iter().map(|person| person.tokens()), self.rows) {
            for people in drawn[portion].chunks(self.at_once) {
                if stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                self.gather(model, people)?;
            }
        }
        Ok(!stop.load(Ordering::Relaxed))
    }

    /// Makes ready to sum up on a device what is there, where it is clipped in its own coordinates.
    fn sum_there(&mut self, device: &Device) -> Result<()> {
        match &mut self.on_device {
            Some(there) => there.clear()?,
            None if *device == Device::Cpu || self.steering.changes_coordinates() => {}
            none => {
                *none = Some(GroupSum::new(device, self.steering.blocks().sizes())?);
            }
        }
        Ok(())
    }

    /// What is promised for what the ledger holds now.
    ///
    /// # Errors
    /// As the accountants.
    pub fn promise(&self) -> Result<Promise> {
        let epsilon = self.account.epsilon_now(&self.ledger)?;
        Ok(Promise::of(self.config, self.account.budget(), epsilon, self.ledger.entries()))
    }
}

impl Task for Private<'_> {
    fn step(
        &mut self,
        model: &Model,
        step: u64,
        grads: &mut Grads,
        stop: &AtomicBool,
    ) -> Result<Option<Measured>> {
        let weights = self.weights(model)?;
        self.steering.prepare(step, &weights);
        self.sum.clear();
        self.sum.set_bounds(joint::all_bounds(&self.steering))?;
        self.sum_there(&model.device())?;
        let (sigma, scales) = (self.steering.sigma(step), self.steering.scales(step)?);
        // What the noise is does not depend on the sum: it is drawn beside it.
        let wanted = joint::wanted(&self.sum, &self.steering, (&scales, sigma))?;
        let (noise, stream) = (self.noise.clone(), self.ledger.next_stream());
        let (gathered, drawn) =
            rayon::join(|| self.draw(model, stop), || wanted.draw(&noise, stream));
        if !gathered? {
            self.sum.clear();
            return Ok(None);
        }
        let drawn = drawn?;
        if let Some(there) = &mut self.on_device {
            joint::collect(&mut self.sum, there)?;
        }
        // From here on nothing stops the step: what is written is spent.
        self.account.count(sigma)?;
        let budget = self.account.budget();
        let (rate, batch) = (budget.rate, budget.batch);
        let spent = self.ledger.spend(step, rate, sigma, &self.key)?;
        let released = joint::release(&mut self.sum, &self.steering, spent, drawn, batch)?;
        if let Some(canaries) = &mut self.canaries {
            canaries.score(&self.steering, &released.gradient, &scales);
        }
        let noisy = self.steering.statistics().read(&released.statistics);
        let threshold = self.steering.bounds().iter().map(|c| c * c).sum::<f64>().sqrt();
        let cost = Cost { rho: self.account.rho(sigma)?, spent: self.account.share(&self.ledger) };
        let gradient = self.steering.learn(step, &scales, released.gradient, &noisy, cost)?;
        let device = model.device();
        for (&slot, values) in self.slots.iter().zip(gradient) {
            let tensor = Tensor::from_f32(values, model.trained().tensor(slot).shape())?;
            grads.set(slot, tensor.to_device(&device)?)?;
        }
        self.next = step + 1;
        let mut measures = vec![("threshold", threshold), ("sigma", sigma), ("budget", cost.spent)];
        let least = self.steering.least_sigma(step);
        if let Some(epsilon) = self.account.epsilon(&self.ledger, least)? {
            measures.push(("epsilon", epsilon));
        }
        if let Some(below) = &noisy.below {
            measures.push(("below", below.iter().sum::<f64>() / below.len() as f64));
        }
        Ok(Some(Measured { loss: noisy.loss, measures, ..Measured::default() }))
    }

    /// Mean cross-entropy of the held-out tokens: of other persons, or of public rows. It is
    /// written down and looked at by nothing.
    fn evaluate(&mut self, model: &Model) -> Result<Option<Measured>> {
        if self.validation.is_empty() {
            return Ok(None);
        }
        let (mut sum, mut tokens) = (0.0, 0);
        let lengths = self.validation.iter().map(Person::tokens);
        for portion in portions(lengths, self.rows) {
            let people: Vec<&Person> = self.validation[portion].iter().collect();
            let cut = (self.rows, self.config.data.context);
            sum += sums(model, &people, cut)?.iter().sum::<f64>();
            tokens += people.iter().map(|person| person.counted()).sum::<usize>();
        }
        Ok(Some(Measured { loss: Some(sum / tokens as f64), ..Measured::default() }))
    }

    fn position(&self, step: u64) -> u64 {
        step
    }

    fn sidecars(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = kept::write(self.ledger.mark(), &self.steering.state()?)?;
        files.push((super::report::FILE.into(), self.promise()?.to_json()?));
        if let Some(canaries) = &self.canaries {
            files.push(canaries.file()?);
        }
        Ok(files)
    }

    fn adapter_notes(&self) -> Result<Map<String, Value>> {
        Ok(self.promise()?.notes())
    }

    fn is_done(&mut self) -> Result<bool> {
        let sigma = self.steering.sigma(self.next);
        Ok(!self.account.fits(&self.ledger, self.next, sigma)?)
    }

    fn is_discreet(&self) -> bool {
        true
    }
}

/// Σ −log p of each person's tokens that count, in nats; `people` have at most `rows` tokens
/// together, and none of their examples more than `context`.
pub(super) fn sums(model: &Model, people: &[&Person], cut: (usize, usize)) -> Result<Vec<f64>> {
    let (batch, groups) = packed(people, cut)?;
    let options = ForwardOptions::default();
    let (_, losses) = model.forward_loss_sum(&mut Tape::inference(), &batch, &options)?;
    sums_of(&losses, &groups)
}

fn sums_of(losses: &Tensor, groups: &[Range<usize>]) -> Result<Vec<f64>> {
    let losses = losses.to_vec_f32()?;
    let own = |rows: &Range<usize>| losses[rows.clone()].iter().map(|&x| f64::from(x)).sum();
    Ok(groups.iter().map(own).collect())
}

/// The first `most` numbers of a gradient, in main memory.
fn numbers(gradient: &Tensor, most: usize) -> Result<Cow<'_, [f32]>> {
    Ok(match gradient.device() {
        Device::Cpu => Cow::Borrowed(&gradient.as_f32()?[..most]),
        _ => {
            let mut all = gradient.to_vec_f32()?;
            all.truncate(most);
            Cow::Owned(all)
        }
    })
}

/// The slots of an adapter that are released, and their layout: without the As where they are frozen.
///
/// # Errors
/// [`Error::Fault`] without an adapter.
pub fn layout(model: &Model, freeze_a: bool) -> Result<(Vec<usize>, Layout)> {
    let adapter = model.active_adapter().and_then(|name| model.adapter(name));
    let adapter = adapter.ok_or_else(|| Error::Fault("a private run has no adapter".into()))?;
    let (mut slots, mut pairs, mut is_a) = (Vec::new(), Vec::new(), Vec::new());
    for (_, own) in adapter.pairs() {
        let mut pair = Vec::new();
        for (at, slot) in own.into_iter().enumerate().skip(usize::from(freeze_a)) {
            pair.push(slots.len());
            slots.push(slot);
            is_a.push(at == 0);
        }
        pairs.push(pair);
    }
    let sizes = slots.iter().map(|&slot| model.trained().tensor(slot).len()).collect();
    Ok((slots, Layout { sizes, pairs, is_a, rank: adapter.config().r }))
}
