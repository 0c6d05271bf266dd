//! Which tensors of a gradient share a threshold.

use crate::{Error, Result};

/// The most elements of a gradient.
const MOST_ELEMENTS: usize = 1 << 36;

/// The tensors of a gradient, and which of them share a threshold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub(super) sizes: Vec<usize>,
    pub(super) block_of: Vec<usize>,
    pub(super) blocks: usize,
}

impl Blocks {
    /// One threshold for everything; `sizes` are the elements of each slot.
    ///
    /// # Errors
    /// [`Error::Step`] when there is no slot, an empty one, or more than 2³⁶ elements.
    pub fn flat(sizes: Vec<usize>) -> Result<Self> {
        let all = (0..sizes.len()).collect();
        Self::by_pair(sizes, &[all])
    }

    /// One threshold for the slots of each of `pairs`, such as those of a LoRA adapter.
    ///
    /// # Errors
    /// As [`Blocks::flat`]; and when a slot is in no pair, or in two.
    pub fn by_pair(sizes: Vec<usize>, pairs: &[Vec<usize>]) -> Result<Self> {
        let elements = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size));
        if sizes.is_empty() || sizes.contains(&0) || elements.is_none_or(|e| e > MOST_ELEMENTS) {
            return Err(Error::Step(
                "a gradient must have tensors, none of them empty, of at most 2^36 elements".into(),
            ));
        }
        let mut block_of = vec![usize::MAX; sizes.len()];
        for (block, slots) in pairs.iter().enumerate() {
            for &slot in slots {
                match block_of.get_mut(slot) {
                    Some(of) if *of == usize::MAX => *of = block,
                    Some(_) => return Err(Error::Step(format!("slot {slot} is in two pairs"))),
                    None => return Err(Error::Step(format!("there is no slot {slot}"))),
                }
            }
            if slots.is_empty() {
                return Err(Error::Step(format!("pair {block} is empty")));
            }
        }
        if let Some(slot) = block_of.iter().position(|&of| of == usize::MAX) {
            return Err(Error::Step(format!("slot {slot} is in no pair: it would not be clipped")));
        }
        Ok(Self { sizes, block_of, blocks: pairs.len() })
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Never: there is at least one block.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Elements of each slot.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The block of a slot.
    pub fn block_of(&self, slot: usize) -> usize {
        self.block_of[slot]
    }

    /// Elements of each block.
    pub fn dims(&self) -> Vec<usize> {
        let mut dims = vec![0; self.blocks];
        self.sizes.iter().zip(&self.block_of).for_each(|(size, &block)| dims[block] += size);
        dims
    }

    /// Slot and place of an element of a block, whose slots follow one another in their order.
    pub fn place(&self, block: usize, mut element: usize) -> Option<(usize, usize)> {
        let own = (0..self.sizes.len()).filter(|&slot| self.block_of[slot] == block);
        for slot in own {
            match element.checked_sub(self.sizes[slot]) {
                None => return Some((slot, element)),
                Some(rest) => element = rest,
            }
        }
        None
    }
}
