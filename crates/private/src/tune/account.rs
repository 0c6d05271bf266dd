//! What is spent so far, by the ledger, and whether one more step fits.

use super::budget::{Budget, Mode};
use crate::accounting::rdp_filter::RdpFilter;
use crate::accounting::{Phase, pld, rdp};
use crate::mechanism::ledger::{Entry, Ledger};
use crate::{Error, Result};

/// ε is computed anew this often in a run; between, the next one's is shown, which is not below.
const MARKS: u64 = 100;

/// The books of a run.
pub struct Account {
    budget: Budget,
    filter: Option<RdpFilter>,
    /// An ε that holds for up to so many attempts.
    known: Option<(u64, f64)>,
}

impl Account {
    /// Counts what a ledger already holds.
    ///
    /// # Errors
    /// [`Error::State`] when that is more than the budget; as [`RdpFilter::new`].
    pub fn new(budget: Budget, entries: &[Entry]) -> Result<Self> {
        let filter = match (budget.mode, budget.epsilon) {
            (Mode::M2, Some(epsilon)) => {
                Some(RdpFilter::new(epsilon, budget.accounted_delta, budget.order)?)
            }
            _ => None,
        };
        let mut account = Self { budget, filter, known: None };
        if let Some(filter) = &mut account.filter {
            for entry in entries {
                if !filter.try_step(entry.sigma, entry.rate)? {
                    return Err(Error::State(
                        "the ledger holds more than the budget of this run".into(),
                    ));
                }
            }
        }
        Ok(account)
    }

    /// What the run may spend.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Whether `step` at noise `sigma` may be taken after what `ledger` holds.
    ///
    /// # Errors
    /// As [`pld::epsilon_upper`].
    pub fn fits(&self, ledger: &Ledger, step: u64, sigma: f64) -> Result<bool> {
        let Some(epsilon) = self.budget.epsilon else { return Ok(true) };
        if let Some(filter) = &self.filter {
            return filter.clone().try_step(sigma, self.budget.rate);
        }
        // As planned, it fits; steps that had to be done again come on top.
        if ledger.entries().len() as u64 <= step {
            return Ok(true);
        }
        let mut phases = ledger.spent()?;
        phases.push(Phase::new(sigma, self.budget.rate, 1)?);
        Ok(pld::epsilon_upper(&phases, self.budget.accounted_delta)? <= epsilon)
    }

    /// Counts a step about to be written; it must fit.
    ///
    /// # Errors
    /// [`Error::Step`] when it does not.
    pub fn count(&mut self, sigma: f64) -> Result<()> {
        let Some(filter) = &mut self.filter else { return Ok(()) };
        if filter.try_step(sigma, self.budget.rate)? {
            return Ok(());
        }
        Err(Error::Step("a step that does not fit the budget was to be taken".into()))
    }

    /// An ε that holds for what `ledger` has: never too small, and of the whole run's as soon as
    /// it is at its end. `None` without noise. Under a filter it is the target from the start: what
    /// a path that chose its own noise has spent is no promise.
    ///
    /// `sigma` is that of the steps to come.
    ///
    /// # Errors
    /// As [`pld::epsilon_upper`].
    pub fn epsilon(&mut self, ledger: &Ledger, sigma: f64) -> Result<Option<f64>> {
        let Some(target) = self.budget.epsilon else { return Ok(None) };
        if self.filter.is_some() {
            return Ok(Some(target));
        }
        let attempts = ledger.entries().len() as u64;
        if let Some((until, epsilon)) = self.known
            && attempts <= until
        {
            return Ok(Some(epsilon));
        }
        let stride = self.budget.steps.div_ceil(MARKS);
        let until = match attempts < self.budget.steps {
            true => attempts.next_multiple_of(stride).min(self.budget.steps),
            false => attempts,
        };
        let mut phases = ledger.spent()?;
        phases.push(Phase::new(sigma, self.budget.rate, until - attempts)?);
        let epsilon = pld::epsilon_upper(&phases, self.budget.accounted_delta)?;
        self.known = Some((until, epsilon));
        Ok(Some(epsilon))
    }

    /// ε of what `ledger` has, exactly by its lines; `None` without noise.
    ///
    /// # Errors
    /// As [`pld::epsilon_upper`].
    pub fn epsilon_now(&self, ledger: &Ledger) -> Result<Option<f64>> {
        match (self.budget.epsilon, &self.filter) {
            (None, _) => Ok(None),
            (target, Some(_)) => Ok(target),
            (Some(_), None) => {
                Ok(Some(pld::epsilon_upper(&ledger.spent()?, self.budget.accounted_delta)?))
            }
        }
    }

    /// Share of the budget that is spent: of the filter's, or of the steps.
    pub fn share(&self, ledger: &Ledger) -> f64 {
        match &self.filter {
            Some(filter) => filter.spent() / filter.budget(),
            None => ledger.entries().len() as f64 / self.budget.steps as f64,
        }
    }

    /// The Rényi divergence of a step, for a controller.
    ///
    /// # Errors
    /// As [`rdp::rho`].
    pub fn rho(&self, sigma: f64) -> Result<f64> {
        if self.budget.epsilon.is_none() {
            return Ok(0.0);
        }
        rdp::rho(sigma, self.budget.rate, self.budget.order)
    }
}
