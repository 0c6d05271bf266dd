//! Launches of `group_sum.cu`: see [`crate::GroupSum`].

use rayon::prelude::*;
use tercet_cuda::{Args, Buffer, Gpu, Label, Pinned, Source};

use super::{SLOTS, SPAN, THREADS, at, kernel};
use crate::{DType, Result, Tensor};

const SOURCE: Source =
    Source { name: "group_sum", text: include_str!("group_sum.cu"), headers: &[SLOTS] };

/// Words of a row of the table, `Slot` in group_sum.cu: address, length, first block, first element.
const ROW: usize = 4;

/// The two halves of each element's sum.
pub(crate) struct Halves {
    gpu: Gpu,
    high: Buffer,
    low: Buffer,
    /// Where the host reads a half.
    pinned: Pinned,
    elements: usize,
}

impl Halves {
    pub(crate) fn new(gpu: &Gpu, elements: usize) -> Result<Self> {
        let room = || gpu.alloc_for(elements * 8, Label::new("sums of persons"));
        let (high, low, pinned) = (room()?, room()?, gpu.pinned(elements * 8)?);
        let halves = Halves { gpu: gpu.clone(), high, low, pinned, elements };
        halves.clear()?;
        Ok(halves)
    }

    pub(crate) fn clear(&self) -> Result<()> {
        self.high.fill(0)?;
        Ok(self.low.fill(0)?)
    }

    /// `[groups, slots]`.
    pub(crate) fn squares(&self, gradients: &[&Tensor], groups: usize) -> Result<Vec<f64>> {
        let (slots, mut found) = (gradients.len(), vec![0f64; gradients.len() * groups]);
        if found.is_empty() {
            return Ok(found);
        }
        let (table, _) = self.table(gradients)?;
        let squares = self.gpu.alloc(found.len() * 8)?;
        let kernel = kernel(&self.gpu, &SOURCE, "group_squares", DType::F32, &[])?;
        let args = Args::new().ptr(table.ptr()).i32(slots as i32).ptr(squares.ptr());
        // SAFETY: the table's rows are live tensors of at least `groups` gradients each.
        unsafe { kernel.launch([groups as u32, slots as u32, 1], [THREADS, 1, 1], 0, args)? };
        squares.download(&mut found)?;
        Ok(found)
    }

    /// Adds what each group gives; `weights` are `[groups, slots]`.
    pub(crate) fn add(&self, gradients: &[&Tensor], weights: &[f64]) -> Result<()> {
        let slots = gradients.len();
        if weights.is_empty() {
            return Ok(());
        }
        let (table, blocks) = self.table(gradients)?;
        let groups = weights.len() / slots;
        let weights = self.gpu.upload(weights)?;
        let kernel = kernel(&self.gpu, &SOURCE, "group_add", DType::F32, &[])?;
        let args = Args::new()
            .ptr(table.ptr())
            .i32(slots as i32)
            .ptr(weights.ptr())
            .i32(groups as i32)
            .ptr(self.high.ptr())
            .ptr(self.low.ptr());
        // SAFETY: as above, and the halves have room for every element of every slot.
        Ok(unsafe { kernel.launch([blocks as u32, 1, 1], [THREADS, 1, 1], 0, args) }?)
    }

    /// All sums, waited for.
    pub(crate) fn read(&mut self) -> Result<Vec<i128>> {
        let high = self.pinned.read::<i64>(&self.high, self.elements)?;
        let mut sums: Vec<i128> = high.par_iter().map(|&high| i128::from(high) << 40).collect();
        let low = self.pinned.read::<i64>(&self.low, self.elements)?;
        sums.par_iter_mut().zip(low).for_each(|(sum, &low)| *sum += i128::from(low));
        Ok(sums)
    }

    /// The slots, and how many blocks of [`SPAN`] elements they have.
    fn table(&self, gradients: &[&Tensor]) -> Result<(Buffer, usize)> {
        let mut table = Vec::with_capacity(gradients.len() * ROW);
        let (mut blocks, mut first) = (0, 0);
        for gradient in gradients {
            let len = gradient.len() / gradient.shape()[0].max(1);
            table.extend([at(gradient)?, len as u64, blocks as u64, first as u64]);
            blocks += len.div_ceil(SPAN);
            first += len;
        }
        Ok((self.gpu.upload(&table)?, blocks))
    }
}
