//! Where the gradients of parameters land: summed over a batch, or apart for each group of its rows.

use std::ops::Range;
use std::sync::Arc;

use crate::{DType, Device, Error, Result, Tensor, cuda};

/// Gradients of the parameters by slot, f32 whatever the parameters' storage. Buffers are made
/// when first needed and kept by [`Grads::zero`].
///
/// Made by [`Grads::by_group`], a slot holds one gradient for each group of a batch's rows,
/// `[groups, ..shape]`: what a person's rows give, when every person's sequences are a group.
/// Only the weights and biases of [`crate::ops::linear`] have such gradients; an op that would give
/// another parameter one is refused, by name. Groups of rows stay apart in everything between, as
/// attention does not cross from one sequence to the next.
#[derive(Clone, Debug, Default)]
pub struct Grads {
    slots: Vec<Slot>,
    groups: Option<Arc<[Range<usize>]>>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    sum: Option<Tensor>,
    /// Whether `sum` holds a gradient; otherwise its contents are left-overs.
    filled: bool,
}

impl Grads {
    /// Room for `slots` parameters.
    pub fn new(slots: usize) -> Self {
        Grads { slots: vec![Slot::default(); slots], groups: None }
    }

    /// Room for `slots` parameters with one gradient for each of `groups`: the ranges of the rows
    /// of a packed batch `[T, ..]`, which must follow one another from 0 to T. A group may span
    /// several sequences; it must hold a row.
    pub fn by_group(slots: usize, groups: Vec<Range<usize>>) -> Result<Self> {
        let mut next = 0;
        for (at, group) in groups.iter().enumerate() {
            if group.start != next || group.end <= group.start {
                return Err(Error::value(
                    "grads",
                    format!(
                        "group {at} is the rows {group:?}, expected at least one row from {next} \
                         on: groups follow one another and cover the batch"
                    ),
                ));
            }
            next = group.end;
        }
        Ok(Grads { slots: vec![Slot::default(); slots], groups: Some(groups.into()) })
    }

    /// The groups of rows, when gradients are kept apart.
    pub fn groups(&self) -> Option<&[Range<usize>]> {
        self.groups.as_deref()
    }

    /// The groups, which must cover `rows` rows, for an op that can tell them apart.
    pub(crate) fn groups_of(
        &self,
        op: &'static str,
        rows: usize,
    ) -> Result<Option<Arc<[Range<usize>]>>> {
        let Some(groups) = &self.groups else { return Ok(None) };
        let covered = groups.last().map_or(0, |last| last.end);
        if covered != rows {
            return Err(Error::value(
                op,
                format!(
                    "the groups of the gradients cover {covered} rows, but a parameter was \
                     multiplied with {rows}; groups must cover the batch"
                ),
            ));
        }
        Ok(Some(groups.clone()))
    }

    /// Refuses to mix the groups of a parameter's gradient.
    fn refuse_groups(&self, op: &'static str, slot: usize) -> Result<()> {
        if self.groups.is_none() {
            return Ok(());
        }
        Err(Error::value(
            op,
            format!(
                "parameter {slot} would get a gradient that does not tell groups of rows apart; \
                 only linear's weights and biases have one: train those alone (LoRA), or without \
                 groups"
            ),
        ))
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no slot.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The gradient of a slot: f32, the parameter's shape, with the groups before it in
    /// [`Grads::by_group`]; `None` when no loss has reached the
    /// parameter since the last [`Grads::zero`].
    pub fn get(&self, slot: usize) -> Option<&Tensor> {
        self.slots.get(slot).filter(|s| s.filled).and_then(|s| s.sum.as_ref())
    }

    /// All slots in order, as [`Grads::get`] gives them.
    pub fn iter(&self) -> impl Iterator<Item = Option<&Tensor>> {
        (0..self.len()).map(|slot| self.get(slot))
    }

    /// Forgets all gradients but keeps their memory; costs nothing.
    pub fn zero(&mut self) {
        self.slots.iter_mut().for_each(|s| s.filled = false);
    }

    /// Multiplies every gradient by `factor`.
    pub fn scale(&mut self, factor: f32) -> Result<()> {
        for slot in self.slots.iter_mut().filter(|s| s.filled) {
            if let Some(sum) = &mut slot.sum {
                match sum.device() {
                    Device::Cpu => crate::ops::scale_in_place(sum.as_f32_mut()?, factor),
                    Device::Cuda(gpu) => cuda::scale::in_place(&gpu, sum, factor)?,
                }
            }
        }
        Ok(())
    }

    /// Puts a gradient, such as one from a checkpoint or another machine.
    pub fn set(&mut self, slot: usize, gradient: Tensor) -> Result<()> {
        if gradient.dtype() != DType::F32 {
            let (expected, got) = ("f32", gradient.dtype());
            return Err(Error::DType { op: "grads", what: "the gradient", expected, got });
        }
        let slot = self.slot(slot)?;
        *slot = Slot { sum: Some(gradient), filled: true };
        Ok(())
    }

    fn slot(&mut self, slot: usize) -> Result<&mut Slot> {
        let count = self.slots.len();
        self.slots.get_mut(slot).ok_or_else(|| {
            Error::value("grads", format!("slot {slot} does not exist; there are {count}"))
        })
    }

    /// The numbers of a slot and whether they hold a gradient to add to (otherwise they must be
    /// overwritten wholly). The gradients of a slot stay on one device. `op` cannot tell groups
    /// apart.
    pub(crate) fn accumulate_on(
        &mut self,
        op: &'static str,
        device: &Device,
        slot: usize,
        shape: &[usize],
    ) -> Result<(&mut Tensor, bool)> {
        self.refuse_groups(op, slot)?;
        self.sum(device, slot, shape)
    }

    /// As [`Grads::accumulate_on`], for all groups: `[groups, ..shape]`.
    pub(crate) fn accumulate_groups_on(
        &mut self,
        device: &Device,
        slot: usize,
        shape: &[usize],
        groups: usize,
    ) -> Result<(&mut Tensor, bool)> {
        self.sum(device, slot, &[&[groups], shape].concat())
    }

    fn sum(
        &mut self,
        device: &Device,
        slot: usize,
        shape: &[usize],
    ) -> Result<(&mut Tensor, bool)> {
        let slot = self.slot(slot)?;
        let filled = std::mem::replace(&mut slot.filled, true);
        match &slot.sum {
            Some(sum) if filled && sum.device() != *device => {
                return Err(Error::device("grads", "the gradient", device, &sum.device()));
            }
            Some(sum) if sum.shape() == shape && sum.device() == *device => {}
            Some(sum) if filled => {
                return Err(Error::shape(
                    "grads",
                    "the gradient",
                    format!("{shape:?}"),
                    sum.shape(),
                ));
            }
            _ => slot.sum = None,
        }
        let sum = match slot.sum.take() {
            Some(sum) => sum,
            None => Tensor::stale_on(device, DType::F32, shape)?,
        };
        Ok((slot.sum.insert(sum), filled))
    }

    /// Adds a whole tensor; the first one is moved in.
    pub(crate) fn give(&mut self, op: &'static str, slot: usize, gradient: Tensor) -> Result<()> {
        self.refuse_groups(op, slot)?;
        let held = self.slot(slot)?;
        if !held.filled {
            *held = Slot { sum: Some(gradient), filled: true };
            return Ok(());
        }
        let device = gradient.device();
        let (sum, _) = self.sum(&device, slot, gradient.shape())?;
        match &device {
            Device::Cpu => {
                crate::parallel::map(
                    sum.as_f32_mut()?,
                    gradient.as_f32()?,
                    crate::parallel::add_into,
                );
                Ok(())
            }
            Device::Cuda(gpu) => cuda::add::in_place(gpu, sum, &gradient),
        }
    }
}
