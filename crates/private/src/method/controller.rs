//! Whatever decides between two steps: the seam between a run and its controller.

use super::random_action::RandomAction;
use super::state::{Reader, State};
use crate::Result;
use crate::rldp::Agent;
use crate::rldp::reward::reward;
use crate::rldp::state::Released;

/// Whatever decides.
#[derive(Clone, Debug)]
pub enum Controller {
    /// Chance.
    Random(RandomAction),
    /// A Soft Actor-Critic.
    Rldp {
        /// The policy and all it remembers.
        agent: Box<Agent>,
        /// What [`reward`] adds to the cost; fixed before the run.
        eta: f64,
    },
}

impl Controller {
    /// `actions` numbers of [−1, 1]: one a threshold, and where σ moves as well one for it.
    ///
    /// # Errors
    /// As [`Agent::decide`].
    pub fn decide(&mut self, seen: &Released, actions: usize) -> Result<Vec<f32>> {
        match self {
            Self::Random(chance) => Ok(chance.decide(actions)),
            Self::Rldp { agent, eta } => {
                let paid = match agent.decisions() {
                    0 => None,
                    _ => Some(reward(-seen.loss_change, seen.cost, *eta)?),
                };
                agent.decide(&seen.vector()?, paid)
            }
        }
    }

    pub(super) fn write(&self, state: &mut State) -> Result<()> {
        match self {
            Self::Random(chance) => state.numbers.push(chance.decisions() as f64),
            Self::Rldp { agent, .. } => state.policy = agent.to_bytes()?,
        }
        Ok(())
    }

    pub(super) fn read(&mut self, reader: &mut Reader) -> Result<()> {
        match self {
            Self::Random(chance) => chance.go_on(reader.number()? as u64),
            Self::Rldp { agent, .. } => agent.go_on(Agent::from_bytes(reader.policy()?)?)?,
        }
        Ok(())
    }
}
