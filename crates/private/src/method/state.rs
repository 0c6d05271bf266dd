//! What a method must find again after a stop: numbers and arrays, in an order that it knows.

use crate::{Error, Result};

/// Numbers and arrays of a method, bit for bit, and the policy of a learnt controller.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Single numbers.
    pub numbers: Vec<f64>,
    /// Arrays, such as a mean gradient.
    pub arrays: Vec<Vec<f32>>,
    /// A controller as it writes itself; empty where there is none.
    pub policy: Vec<u8>,
}

/// Takes a [`State`] apart in the order in which it was put together.
pub struct Reader<'a> {
    numbers: std::slice::Iter<'a, f64>,
    arrays: std::slice::Iter<'a, Vec<f32>>,
    policy: &'a [u8],
}

impl<'a> Reader<'a> {
    /// From the beginning.
    pub fn new(state: &'a State) -> Self {
        Self { numbers: state.numbers.iter(), arrays: state.arrays.iter(), policy: &state.policy }
    }

    pub(super) fn number(&mut self) -> Result<f64> {
        self.numbers.next().copied().filter(|x| !x.is_nan()).ok_or_else(misfit)
    }

    pub(super) fn numbers(&mut self, count: usize) -> Result<Vec<f64>> {
        (0..count).map(|_| self.number()).collect()
    }

    /// An array of so many elements.
    pub(super) fn array(&mut self, len: usize) -> Result<Vec<f32>> {
        self.arrays.next().filter(|array| array.len() == len).cloned().ok_or_else(misfit)
    }

    /// The policy, which must be there.
    pub(super) fn policy(&mut self) -> Result<&'a [u8]> {
        let policy = std::mem::take(&mut self.policy);
        if policy.is_empty() { Err(misfit()) } else { Ok(policy) }
    }

    pub(super) fn end(mut self) -> Result<()> {
        let over = self.numbers.next().is_some()
            || self.arrays.next().is_some()
            || !self.policy.is_empty();
        if over { Err(misfit()) } else { Ok(()) }
    }
}

fn misfit() -> Error {
    Error::State("the method's state in the checkpoint does not fit this configuration".into())
}
