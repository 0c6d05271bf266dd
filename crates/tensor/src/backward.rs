//! The walk back: gradients on their way from an op's outputs to its inputs.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::dtype::Float;
use crate::parallel;
use crate::pool::Buffer;
use crate::tape::Source;
use crate::{DType, Device, Error, Grads, Result, Tensor, Var, cuda};
use tercet_cuda::Gpu;

/// Holds the gradients that wait for the op that made their value. A gradient has its value's
/// storage type; the gradients of parameters are f32.
pub(crate) struct Backward<'g> {
    tape: u64,
    pending: Vec<Option<Tensor>>,
    grads: &'g mut Grads,
}

impl<'g> Backward<'g> {
    pub(crate) fn new(tape: u64, values: usize, grads: &'g mut Grads) -> Self {
        Backward { tape, pending: vec![None; values], grads }
    }

    pub(crate) fn grads(&mut self) -> &mut Grads {
        self.grads
    }

    fn pending(&mut self, tape: u64, index: usize) -> Result<&mut Option<Tensor>> {
        match self.pending.get_mut(index) {
            Some(slot) if tape == self.tape => Ok(slot),
            _ => Err(Error::Tape("a gradient for a value of another tape")),
        }
    }

    /// Removes the gradient gathered so far; `None` for parameters and constants.
    pub(crate) fn take(&mut self, source: Source) -> Option<Tensor> {
        match source {
            Source::Value { tape, index } => self.pending(tape, index).ok()?.take(),
            _ => None,
        }
    }

    /// Adds a whole gradient, in the value's storage type; the first one is moved in.
    pub(crate) fn give(&mut self, to: Source, gradient: Tensor) -> Result<()> {
        match to {
            Source::Constant => Ok(()),
            Source::Param(slot) => {
                self.grads.give("an op on activations", slot, gradient.to_dtype(DType::F32)?)
            }
            Source::Value { tape, index } => {
                let slot = self.pending(tape, index)?;
                let sum = match slot.take() {
                    None => gradient,
                    Some(sum) => add(sum, gradient)?,
                };
                *slot = Some(sum);
                Ok(())
            }
        }
    }

    /// Lets `f(sum, add)` write the gradient of a variable in the variable's storage type:
    /// on top of `sum` when `add`, else overwriting it wholly. Not called for constants.
    pub(crate) fn accumulate<E: Float>(
        &mut self,
        to: Source,
        shape: &[usize],
        f: impl FnOnce(&mut [E], bool) -> Result<()>,
    ) -> Result<()> {
        match to {
            Source::Constant => Ok(()),
            Source::Param(_) => {
                let mut buffer = Buffer::<E>::stale(shape.iter().product());
                f(&mut buffer, false)?;
                self.give(to, Tensor::from_buffer(buffer, shape))
            }
            Source::Value { tape, index } => {
                let slot = self.pending(tape, index)?;
                let (mut sum, filled) = match slot.take() {
                    Some(sum) => (sum, true),
                    None => (Tensor::stale(E::DTYPE, shape), false),
                };
                f(sum.view_mut("backward", "the gradient")?, filled)?;
                *slot = Some(sum);
                Ok(())
            }
        }
    }

    /// As [`Backward::accumulate`] on a device: `f(sum, add)` is given the address of numbers
    /// stored as `dtype`.
    pub(crate) fn accumulate_cuda(
        &mut self,
        gpu: &Gpu,
        to: Source,
        dtype: DType,
        shape: &[usize],
        f: impl FnOnce(u64, bool) -> Result<()>,
    ) -> Result<()> {
        match to {
            Source::Constant => Ok(()),
            Source::Param(_) => {
                let gradient = cuda::stale(gpu, dtype, shape)?;
                f(cuda::at(&gradient)?, false)?;
                self.give(to, gradient)
            }
            Source::Value { tape, index } => {
                let slot = self.pending(tape, index)?;
                let (mut sum, filled) = match slot.take() {
                    Some(sum) => (sum, true),
                    None => (cuda::stale(gpu, dtype, shape)?, false),
                };
                f(cuda::at_mut(&mut sum)?, filled)?;
                *slot = Some(sum);
                Ok(())
            }
        }
    }

    /// As [`Backward::accumulate_cuda`], but `f` runs for constants too, into scratch.
    pub(crate) fn accumulate_always_cuda(
        &mut self,
        gpu: &Gpu,
        to: Source,
        dtype: DType,
        shape: &[usize],
        f: impl FnOnce(u64, bool) -> Result<()>,
    ) -> Result<()> {
        if to == Source::Constant {
            return f(cuda::at(&cuda::stale(gpu, dtype, shape)?)?, false);
        }
        self.accumulate_cuda(gpu, to, dtype, shape, f)
    }

    /// As [`Backward::accumulate_f32`] on a device: `f(sum, add)` is given the address of f32
    /// numbers.
    pub(crate) fn accumulate_f32_cuda(
        &mut self,
        gpu: &Gpu,
        to: &Weight,
        f: impl FnOnce(u64, bool) -> Result<()>,
    ) -> Result<()> {
        match to.source {
            Source::Constant => Ok(()),
            Source::Param(slot) => {
                let device = Device::Cuda(gpu.clone());
                let (sum, filled) = self.grads.accumulate_on(to.op, &device, slot, &to.shape)?;
                f(cuda::at_mut(sum)?, filled)
            }
            Source::Value { .. } => {
                let gradient = cuda::stale(gpu, DType::F32, &to.shape)?;
                f(cuda::at(&gradient)?, false)?;
                self.give_f32(to, gradient)
            }
        }
    }

    /// As [`Backward::accumulate`], but `f` runs for constants too, into scratch: for ops that
    /// make other gradients in the same loop.
    pub(crate) fn accumulate_always<E: Float>(
        &mut self,
        to: Source,
        shape: &[usize],
        f: impl FnOnce(&mut [E], bool) -> Result<()>,
    ) -> Result<()> {
        if to == Source::Constant {
            return f(&mut Buffer::<E>::stale(shape.iter().product()), false);
        }
        self.accumulate(to, shape, f)
    }

    /// Adds a whole f32 gradient of a weight; the first one is moved in.
    pub(crate) fn give_f32(&mut self, to: &Weight, gradient: Tensor) -> Result<()> {
        match to.source {
            Source::Constant => Ok(()),
            Source::Value { .. } => self.give(to.source, gradient.to_dtype(to.dtype)?),
            Source::Param(slot) => self.grads.give(to.op, slot, gradient),
        }
    }

    /// As [`Backward::accumulate`], in f32 whatever the variable's storage: for gradients of
    /// weights, which land in their slot without a detour.
    pub(crate) fn accumulate_f32(
        &mut self,
        to: &Weight,
        f: impl FnOnce(&mut [f32], bool) -> Result<()>,
    ) -> Result<()> {
        match to.source {
            Source::Constant => Ok(()),
            Source::Param(slot) => {
                let (sum, filled) =
                    self.grads.accumulate_on(to.op, &Device::Cpu, slot, &to.shape)?;
                f(sum.as_f32_mut()?, filled)
            }
            Source::Value { .. } => {
                let mut buffer = Buffer::<f32>::stale(to.shape.iter().product());
                f(&mut buffer, false)?;
                self.give_f32(to, Tensor::from_buffer(buffer, &to.shape))
            }
        }
    }

    /// As [`Backward::accumulate_f32`] of a gradient that is a sum over `rows` rows:
    /// `f(sum, rows, add)` is called for all of them, or, where groups are kept apart, for each
    /// group with its own `sum`, on several threads.
    pub(crate) fn accumulate_rows(
        &mut self,
        to: &Weight,
        rows: usize,
        f: impl Fn(&mut [f32], Range<usize>, bool) + Sync,
    ) -> Result<()> {
        if let Source::Param(slot) = to.source
            && let Some(groups) = self.grads.groups_of(to.op, rows)?
        {
            let (sum, filled) =
                self.grads.accumulate_groups_on(&Device::Cpu, slot, &to.shape, groups.len())?;
            let len = to.shape.iter().product::<usize>();
            if len > 0 {
                let sums = sum.as_f32_mut()?.par_chunks_exact_mut(len);
                sums.zip(&groups[..]).for_each(|(sum, group)| f(sum, group.clone(), filled));
            }
            return Ok(());
        }
        self.accumulate_f32(to, |sum, add| {
            f(sum, 0..rows, add);
            Ok(())
        })
    }

    /// Where a gradient of a sum over `rows` rows is kept apart by groups, on a device.
    pub(crate) fn groups_cuda(
        &mut self,
        gpu: &Gpu,
        to: &Weight,
        rows: usize,
    ) -> Result<Option<Apart>> {
        let Source::Param(slot) = to.source else { return Ok(None) };
        let Some(groups) = self.grads.groups_of(to.op, rows)? else { return Ok(None) };
        let device = Device::Cuda(gpu.clone());
        let (sum, filled) =
            self.grads.accumulate_groups_on(&device, slot, &to.shape, groups.len())?;
        Ok(Some(Apart { sums: cuda::at_mut(sum)?, groups, add: filled }))
    }

    /// As [`Backward::accumulate_rows`] on a device, group after group: `f(sum, rows, add)` is
    /// given the address of f32 numbers.
    pub(crate) fn accumulate_rows_cuda(
        &mut self,
        gpu: &Gpu,
        to: &Weight,
        rows: usize,
        f: impl Fn(u64, Range<usize>, bool) -> Result<()>,
    ) -> Result<()> {
        let Some(Apart { mut sums, groups, add }) = self.groups_cuda(gpu, to, rows)? else {
            return self.accumulate_f32_cuda(gpu, to, |sum, add| f(sum, 0..rows, add));
        };
        let bytes = (4 * to.shape.iter().product::<usize>()) as u64;
        for group in groups.iter() {
            f(sums, group.clone(), add)?;
            sums += bytes;
        }
        Ok(())
    }
}

/// A gradient on a device that is kept apart by groups of rows.
pub(crate) struct Apart {
    /// The address of the first group's f32 numbers; the others follow.
    pub sums: u64,
    pub groups: Arc<[Range<usize>]>,
    /// Whether there is something to add to.
    pub add: bool,
}

/// What the backward of an op must know of a weight to give it its gradient.
pub(crate) struct Weight {
    op: &'static str,
    source: Source,
    shape: Vec<usize>,
    dtype: DType,
}

impl Weight {
    /// `op` is who asks, for messages.
    pub(crate) fn of(op: &'static str, var: &Var) -> Self {
        Weight { op, source: var.source(), shape: var.shape().to_vec(), dtype: var.dtype() }
    }

    pub(crate) fn wants_grad(&self) -> bool {
        self.source != Source::Constant
    }
}

/// `a + b`, both on one device, written over whichever of the two nobody else holds.
fn add(mut a: Tensor, mut b: Tensor) -> Result<Tensor> {
    fn run<E: Float>(a: &mut Tensor, b: &Tensor) -> Result<()> {
        let b = b.view::<E>("backward", "the gradient")?;
        let a = a.view_mut::<E>("backward", "the gradient")?;
        if a.len() != b.len() {
            return Err(Error::shape("backward", "a gradient", format!("{}", a.len()), &[b.len()]));
        }
        parallel::map(a, b, add_slice);
        Ok(())
    }
    if !a.is_unique() && b.is_unique() {
        std::mem::swap(&mut a, &mut b);
    }
    match a.device() {
        Device::Cpu => crate::dtype::float_dispatch!("backward", a.dtype(), run(&mut a, &b))?,
        Device::Cuda(gpu) => cuda::add::in_place(&gpu, &mut a, &b)?,
    }
    Ok(a)
}

crate::simd::multiversion! {
    fn add_slice<E: Float>(a: &mut [E], b: &[E]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = E::from_f32(a.to_f32() + b.to_f32());
        }
    }
}
