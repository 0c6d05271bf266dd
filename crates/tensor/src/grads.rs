//! Where the gradients of parameters land.

use crate::{DType, Device, Error, Result, Tensor, cuda};

/// Gradients of the parameters by slot, f32 whatever the parameters' storage. Buffers are made
/// when first needed and kept by [`Grads::zero`].
#[derive(Clone, Debug, Default)]
pub struct Grads {
    slots: Vec<Slot>,
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
        Grads { slots: vec![Slot::default(); slots] }
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no slot.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The gradient of a slot: f32, the parameter's shape; `None` when no loss has reached the
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
    /// overwritten wholly).
    pub(crate) fn accumulate(
        &mut self,
        slot: usize,
        shape: &[usize],
    ) -> Result<(&mut [f32], bool)> {
        let (sum, filled) = self.accumulate_on(&Device::Cpu, slot, shape)?;
        Ok((sum.as_f32_mut()?, filled))
    }

    /// As [`Grads::accumulate`], on any device; the gradients of a slot stay on one.
    pub(crate) fn accumulate_on(
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
    pub(crate) fn give(&mut self, slot: usize, gradient: Tensor) -> Result<()> {
        let held = self.slot(slot)?;
        if !held.filled {
            *held = Slot { sum: Some(gradient), filled: true };
            return Ok(());
        }
        let device = gradient.device();
        let (sum, _) = self.accumulate_on(&device, slot, gradient.shape())?;
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
