//! The parameters of a model: names, shapes and tensors, index = slot.

use tercet_tensor::{DType, Device, Tensor};

use crate::layout::ParamSpec;
use crate::{Error, Result};

/// Named tensors in a fixed order; a tensor's index is its slot in gradients and optimizer state.
#[derive(Clone, Debug)]
pub struct Params {
    specs: Vec<ParamSpec>,
    tensors: Vec<Tensor>,
}

impl Params {
    /// Pairs specs with tensors of the same shapes and one floating type.
    pub(crate) fn new(specs: Vec<ParamSpec>, tensors: Vec<Tensor>) -> Self {
        debug_assert_eq!(specs.len(), tensors.len());
        for (spec, tensor) in specs.iter().zip(&tensors) {
            debug_assert_eq!(spec.shape, tensor.shape(), "{}", spec.name);
        }
        Self { specs, tensors }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Number of elements of all tensors.
    pub fn elements(&self) -> usize {
        self.specs.iter().map(ParamSpec::len).sum()
    }

    /// Storage type of all tensors.
    pub fn dtype(&self) -> DType {
        self.tensors.first().map_or(DType::F32, Tensor::dtype)
    }

    /// Where all tensors live.
    pub fn device(&self) -> Device {
        self.tensors.first().map_or(Device::Cpu, Tensor::device)
    }

    /// Moves all tensors.
    pub(crate) fn move_to(&mut self, device: &Device) -> Result<()> {
        for tensor in &mut self.tensors {
            *tensor = tensor.to_device(device)?;
        }
        Ok(())
    }

    /// The name of a slot.
    pub fn name(&self, slot: usize) -> &str {
        &self.specs[slot].name
    }

    /// Names, shapes and initial values in slot order.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The tensor of a slot.
    pub fn tensor(&self, slot: usize) -> &Tensor {
        &self.tensors[slot]
    }

    /// The tensors in slot order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensors in slot order, for an optimizer; shapes and types must stay.
    pub fn tensors_mut(&mut self) -> &mut [Tensor] {
        &mut self.tensors
    }

    /// The slot of a name.
    pub fn slot(&self, name: &str) -> Option<usize> {
        self.specs.iter().position(|spec| spec.name == name)
    }

    /// Replaces the tensor of a slot by one of the same shape and type.
    pub fn set(&mut self, slot: usize, tensor: Tensor) -> Result<()> {
        let (spec, old) = (&self.specs[slot], &self.tensors[slot]);
        if tensor.shape() != spec.shape || tensor.dtype() != old.dtype() {
            return Err(Error::Batch(format!(
                "{} is {} {:?}, not {} {:?}",
                spec.name,
                old.dtype(),
                spec.shape,
                tensor.dtype(),
                tensor.shape()
            )));
        }
        self.tensors[slot] = tensor;
        Ok(())
    }
}
