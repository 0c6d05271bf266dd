//! Gradients that were kept apart by groups, put together on the device where they are: what a sum of
//! clipped gradients needs, without the gradients' way to main memory.
//!
//! Sums are of whole numbers, exact, and so the same in any order: `round(weight·x)` of each element,
//! to the nearest and halves to even, the product rounded to a double first.

use crate::cuda::group_sum::Halves;
use crate::{DType, Device, Error, Result, Tensor};

/// A weighted sum of groups' gradients on a device, by slot.
pub struct GroupSum {
    device: Device,
    halves: Halves,
    sizes: Vec<usize>,
    groups: u64,
}

/// After so many groups the halves of a sum, each below 2⁴¹ a group, could leave 64 bits.
const MOST: u64 = 1 << 22;

impl GroupSum {
    /// An empty sum of slots with so many elements each, on a CUDA device.
    ///
    /// # Errors
    /// [`Error::Device`] for another device, [`Error::Value`] for an empty slot; when memory is short.
    pub fn new(device: &Device, sizes: &[usize]) -> Result<Self> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::Device {
                op: "group_sum",
                what: "the device",
                expected: "a CUDA device".into(),
                got: "cpu".into(),
            });
        };
        if sizes.is_empty() || sizes.contains(&0) {
            return Err(Error::value("group_sum", "there must be slots, none of them empty"));
        }
        let halves = Halves::new(gpu, sizes.iter().sum())?;
        Ok(Self { device: device.clone(), halves, sizes: sizes.to_vec(), groups: 0 })
    }

    /// `Σ x²` of the first `groups` groups in each slot, `[groups, slots]`, in f64 and a fixed order
    /// that depends on the slot's size alone. Waits for it.
    ///
    /// # Errors
    /// [`Error::Shape`] and its like when a gradient is not f32 `[groups or more, elements]` here.
    pub fn squares(&self, gradients: &[&Tensor], groups: usize) -> Result<Vec<f64>> {
        self.check(gradients, groups)?;
        self.halves.squares(gradients, groups)
    }

    /// Adds `round(weight·x)` of every element of the first groups; `weights` are `[groups, slots]`,
    /// and what has the weight 0 may be anything. No product may be 2⁸⁰ or more.
    ///
    /// # Errors
    /// As [`GroupSum::squares`]; [`Error::Value`] for more than 2²² groups between two
    /// [`GroupSum::take`]s.
    pub fn add(&mut self, gradients: &[&Tensor], weights: &[f64]) -> Result<()> {
        let groups = weights.len() / self.sizes.len();
        if groups * self.sizes.len() != weights.len() {
            let expected = format!("a whole number of {} weights", self.sizes.len());
            return Err(Error::shape("group_sum", "the weights", expected, &[weights.len()]));
        }
        self.check(gradients, groups)?;
        self.groups += groups as u64;
        if self.groups > MOST {
            return Err(Error::value("group_sum", "more than 2^22 groups are too many for a sum"));
        }
        self.halves.add(gradients, weights)
    }

    /// The sums by slot, and an empty sum.
    ///
    /// # Errors
    /// The device's.
    pub fn take(&mut self) -> Result<Vec<Vec<i128>>> {
        let all = self.halves.read()?;
        self.clear()?;
        let mut all = &all[..];
        let slot = |&size: &usize| {
            let (own, rest) = all.split_at(size);
            all = rest;
            own.to_vec()
        };
        Ok(self.sizes.iter().map(slot).collect())
    }

    /// Forgets what was added.
    ///
    /// # Errors
    /// The device's.
    pub fn clear(&mut self) -> Result<()> {
        self.groups = 0;
        self.halves.clear()
    }

    fn check(&self, gradients: &[&Tensor], groups: usize) -> Result<()> {
        if gradients.len() != self.sizes.len() {
            let expected = format!("{} gradients", self.sizes.len());
            return Err(Error::shape("group_sum", "the slots", expected, &[gradients.len()]));
        }
        for (gradient, &size) in gradients.iter().zip(&self.sizes) {
            if gradient.dtype() != DType::F32 {
                let (what, expected, got) = ("a gradient", "f32", gradient.dtype());
                return Err(Error::DType { op: "group_sum", what, expected, got });
            }
            if gradient.device() != self.device {
                let got = gradient.device();
                return Err(Error::device("group_sum", "a gradient", &self.device, &got));
            }
            let held = gradient.shape().first().copied().unwrap_or(0);
            if held < groups || held.checked_mul(size) != Some(gradient.len()) {
                let expected = format!("[{groups} or more, {size} elements]");
                let got = gradient.shape();
                return Err(Error::shape("group_sum", "a gradient", expected, got));
            }
        }
        Ok(())
    }
}
