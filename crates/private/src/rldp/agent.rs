//! Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905), learning while it decides.
//!
//! With ᾱ the temperature, Q̄ the slowly following critics and a′ ~ π(s′):
//!
//! * critics: `mean (Q_k(s,a) − y)²`, `y = r + γ·(min Q̄(s′,a′) − ᾱ·log π(a′|s′))`;
//! * actor: `mean ᾱ·log π(a|s) − min Q(s,a)` with a drawn afresh, the noise held;
//! * temperature: `−log ᾱ·mean(log π + H)`, target entropy H = −(number of actions).
//!
//! No transition is terminal: a run that ends has not failed.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::mlp::{Adam, Mlp, are_numbers};
use super::policy;
use super::random::Random;
use super::replay::{Replay, Transition};
use super::state::Normaliser;
use crate::{Error, Result};

const DISCOUNT: f32 = 0.99;
/// Share by which the slow critics follow at every update.
const FOLLOW: f32 = 0.005;
const BATCH: usize = 32;
const UPDATES: usize = 2;
/// Decisions that are drawn evenly before the policy is asked.
pub const WARM_UP: u64 = 5;
/// Temperature at the start.
const TEMPERATURE: f32 = 0.2;
/// No state or action is wider.
const MOST_DIM: usize = 4096;
/// No reward is larger.
const MOST_REWARD: f32 = 1e3;
/// Bytes of a SHA-256.
const SEAL: usize = 32;

/// The controller: a pure function of its seed and of what it is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    dims: (usize, usize),
    seed: u64,
    seen: Normaliser,
    actor: Mlp,
    critics: [Mlp; 2],
    slow: [Mlp; 2],
    log_temperature: [f32; 1],
    /// Of the actor, the critics and the temperature.
    adams: [Adam; 4],
    replay: Replay,
    /// The last decision, until its outcome is known.
    open: Option<(Vec<f32>, Vec<f32>)>,
    decisions: u64,
}

impl Agent {
    /// An agent that has seen nothing, for states of `state_dim` numbers and actions of
    /// `action_dim`.
    ///
    /// # Errors
    /// [`Error::Controller`] for sizes of 0 or above 4096.
    pub fn new(state_dim: usize, action_dim: usize, seed: u64) -> Result<Self> {
        if ![state_dim, action_dim].iter().all(|dim| (1..=MOST_DIM).contains(dim)) {
            return Err(Error::Controller(format!(
                "states of {state_dim} numbers and actions of {action_dim} are refused, expected \
                 from 1 to {MOST_DIM} of each"
            )));
        }
        let mut random = Random::new(seed, 0);
        let actor = Mlp::new(state_dim, 2 * action_dim, &mut random);
        let critics = [(); 2].map(|()| Mlp::new(state_dim + action_dim, 1, &mut random));
        Ok(Self {
            dims: (state_dim, action_dim),
            seed,
            seen: Normaliser::new(state_dim),
            adams: [&actor.params, &critics[0].params, &critics[1].params, &vec![0.0]]
                .map(|params| Adam::new(params.len())),
            actor,
            slow: critics.clone(),
            critics,
            log_temperature: [libm::logf(TEMPERATURE)],
            replay: Replay::default(),
            open: None,
            decisions: 0,
        })
    }

    /// Takes what came of the last decision, learns, and decides: numbers of [−1, 1].
    ///
    /// `state` is raw (it is normalised here) and is what the last decision led to;
    /// `reward_of_last` is `None` at the first decision and at no other.
    ///
    /// # Errors
    /// [`Error::Step`] for a state of another size, a number that is not finite, a reward beyond
    /// ±1000, missing or too many; nothing has changed then. Also when a checkpoint's weights were
    /// so large that an action is not a number.
    pub fn decide(&mut self, state: &[f32], reward_of_last: Option<f32>) -> Result<Vec<f32>> {
        self.check(state, reward_of_last)?;
        let mut random = Random::new(self.seed, self.decisions + 1);
        let state = self.seen.normalise(state);
        if let (Some((before, action)), Some(reward)) = (self.open.take(), reward_of_last) {
            self.replay.push(Transition { state: before, action, reward, next: state.clone() });
            (0..UPDATES).for_each(|_| self.update(&mut random));
        }
        let action = if self.decisions < WARM_UP {
            (0..self.dims.1).map(|_| random.centred()).collect()
        } else {
            let heads = self.actor.forward(&state).swap_remove(3);
            policy::draw(&heads, &random.normals(self.dims.1)).0
        };
        if !are_numbers(&action, self.dims.1) {
            return Err(Error::Step("the controller's networks give no number any more".into()));
        }
        self.decisions += 1;
        self.open = Some((state, action.clone()));
        Ok(action)
    }

    /// Decisions so far.
    pub fn decisions(&self) -> u64 {
        self.decisions
    }

    /// Goes on as `other`, which a checkpoint of the same run holds.
    ///
    /// # Errors
    /// [`Error::Controller`] when it has another seed, or states or actions of another size.
    pub fn go_on(&mut self, other: Self) -> Result<()> {
        if (other.dims, other.seed) != (self.dims, self.seed) {
            return Err(Error::Controller(format!(
                "the checkpoint's policy has (state, action) sizes {:?} and seed {}, this run has \
                 {:?} and {}; go on with the configuration that it began with",
                other.dims, other.seed, self.dims, self.seed
            )));
        }
        *self = other;
        Ok(())
    }

    fn check(&self, state: &[f32], reward: Option<f32>) -> Result<()> {
        let (n, most) = (self.dims.0, MOST_REWARD);
        let wrong = match (reward, &self.open) {
            _ if !are_numbers(state, n) => {
                format!("the controller's state is not {n} finite numbers: {state:?}")
            }
            (None, None) => return Ok(()),
            (Some(r), Some(_)) if r.abs() <= most => return Ok(()),
            _ => format!(
                "the controller's reward is {reward:?}; it has none before its first decision, \
                 then one within ±{most}"
            ),
        };
        Err(Error::Step(wrong))
    }

    fn update(&mut self, random: &mut Random) {
        let batch = self.replay.sample(BATCH, random);
        let temperature = libm::expf(self.log_temperature[0]);
        let mut targets = Vec::with_capacity(batch.len());
        for transition in &batch {
            let heads = self.actor.forward(&transition.next).swap_remove(3);
            let (action, log_prob) = policy::draw(&heads, &random.normals(self.dims.1));
            let input = [&transition.next[..], &action].concat();
            let value = self.slow.each_ref().map(|critic| critic.forward(&input)[3][0]);
            let value = value[0].min(value[1]) - temperature * log_prob;
            targets.push(transition.reward + DISCOUNT * value);
        }
        for (critic, adam) in self.critics.iter_mut().zip(&mut self.adams[1..]) {
            let grads = critic_gradient(critic, &batch, &targets);
            adam.step(&mut critic.params, &grads);
        }
        let noise: Vec<Vec<f32>> = batch.iter().map(|_| random.normals(self.dims.1)).collect();
        let (grads, log_prob) =
            actor_gradient(&self.actor, &self.critics, temperature, &batch, &noise);
        self.adams[0].step(&mut self.actor.params, &grads);
        let off = self.dims.1 as f32 - log_prob;
        self.adams[3].step(&mut self.log_temperature, &[off]);
        for (slow, critic) in self.slow.iter_mut().zip(&self.critics) {
            let pairs = slow.params.iter_mut().zip(&critic.params);
            pairs.for_each(|(slow, fast)| *slow += FOLLOW * (fast - *slow));
        }
    }

    /// Everything there is to go on from: JSON, then its SHA-256.
    ///
    /// # Errors
    /// [`Error::Step`] when a number is not finite any more, which no input leads to.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes = serde_json::to_vec(self);
        let mut bytes = bytes.map_err(|error| Error::Step(error.to_string()))?;
        let hash = Sha256::digest(&bytes);
        bytes.extend_from_slice(&hash);
        Ok(bytes)
    }

    /// The agent that [`Self::to_bytes`] wrote: it goes on with the same bits.
    ///
    /// # Errors
    /// [`Error::Controller`] for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let refuse = |problem: &str| {
            Error::Controller(format!(
                "the checkpoint {problem}; bring it back from a copy or go on from an older one"
            ))
        };
        let body = bytes.len().checked_sub(SEAL).ok_or_else(|| refuse("is too short"))?;
        let (body, hash) = bytes.split_at(body);
        if Sha256::digest(body)[..] != *hash {
            return Err(refuse("does not have the hash it ends with: it was cut or changed"));
        }
        let agent: Self = serde_json::from_slice(body)
            .map_err(|error| refuse(&format!("is not understood ({error})")))?;
        if agent.is_whole()? { Ok(agent) } else { Err(refuse("does not fit together")) }
    }

    /// Whether all sizes are those of an agent and all numbers finite.
    fn is_whole(&self) -> Result<bool> {
        let like = Self::new(self.dims.0, self.dims.1, 0)?;
        Ok(self.seen.is_like(self.dims.0, self.decisions)
            && self.actor.is_like(&like.actor)
            && self.critics.iter().chain(&self.slow).all(|critic| critic.is_like(&like.critics[0]))
            && self.log_temperature[0].is_finite()
            && self.adams.iter().zip(&like.adams).all(|(adam, like)| adam.is_like(like))
            && self.replay.is_like(self.dims)
            && self.open.is_some() == (self.decisions > 0)
            && self
                .open
                .iter()
                .all(|(s, a)| are_numbers(s, self.dims.0) && are_numbers(a, self.dims.1)))
    }
}

/// Gradient of a critic's `mean (Q − y)²`.
fn critic_gradient(critic: &Mlp, batch: &[Transition], targets: &[f32]) -> Vec<f32> {
    let mut grads = vec![0.0; critic.params.len()];
    for (transition, target) in batch.iter().zip(targets) {
        let trace = critic.forward(&[&transition.state[..], &transition.action].concat());
        let d = 2.0 * (trace[3][0] - target) / batch.len() as f32;
        critic.backward(&trace, &[d], &mut grads);
    }
    grads
}

/// Gradient of the actor's loss, and the mean log-probability of the actions drawn for it.
fn actor_gradient(
    actor: &Mlp,
    critics: &[Mlp; 2],
    temperature: f32,
    batch: &[Transition],
    noise: &[Vec<f32>],
) -> (Vec<f32>, f32) {
    let mut grads = vec![0.0; actor.params.len()];
    let (mut log_prob, share) = (0.0, 1.0 / batch.len() as f32);
    for (Transition { state, .. }, noise) in batch.iter().zip(noise) {
        let trace = actor.forward(state);
        let (action, log) = policy::draw(&trace[3], noise);
        log_prob += share * log;
        let input = [&state[..], &action].concat();
        let traces = critics.each_ref().map(|critic| critic.forward(&input));
        let lower = usize::from(traces[1][3][0] < traces[0][3][0]);
        let mut unused = vec![0.0; critics[lower].params.len()];
        let d_input = critics[lower].backward(&traces[lower], &[-share], &mut unused);
        let d_action = &d_input[state.len()..];
        let d_heads = policy::backward(&trace[3], noise, d_action, share * temperature);
        actor.backward(&trace, &d_heads, &mut grads);
    }
    (grads, log_prob)
}

#[cfg(test)]
mod tests;
