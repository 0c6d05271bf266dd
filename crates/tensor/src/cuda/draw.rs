//! Launches of `draw.cu`: see [`crate::Draws`].

use tercet_cuda::{Args, Buffer, Gpu, Label, Source};

use super::at;
use crate::{DType, Draw, Result, Tensor};

const SOURCE: Source = Source::new("draw", include_str!("draw.cu"));

/// Words of an ask, `Ask` in draw.cu: temperature, whether anything is asked, the two of the place.
const ASK: usize = 4;

/// Threads of a block, as in draw.cu.
const THREADS: u32 = 1024;

/// The kernel for one vocabulary, and what it reads and writes but for the logits.
pub(crate) struct Kernel {
    kernel: tercet_cuda::Kernel,
    asks: Buffer,
    drawn: Buffer,
    vocab: usize,
}

impl Kernel {
    /// Tokens of a run, as in draw.cu.
    pub(crate) const RUN: usize = 1024;
    /// Runs of a row; their sums lie in 32 KiB of shared memory.
    pub(crate) const RUNS: usize = 8192;

    pub(crate) fn new(gpu: &Gpu, rows: usize, vocab: usize) -> Result<Self> {
        let runs = vocab.div_ceil(Self::RUN).to_string();
        let kernel = super::kernel(gpu, &SOURCE, "draw", DType::F32, &[("RUNS", runs)])?;
        let asks = gpu.alloc_for(rows * ASK * 4, Label::new("draws"))?;
        let drawn = gpu.alloc_for(rows * 2 * 4, Label::new("tokens drawn"))?;
        Ok(Self { kernel, asks, drawn, vocab })
    }

    /// Draws from the first rows of f32 logits `[n, vocab]`: at least as many as there are asks, of
    /// which there are no more than rows were made for.
    pub(crate) fn launch(&self, logits: &Tensor, asks: &[Option<Draw>]) -> Result<()> {
        let words = |ask: &Option<Draw>| match ask {
            None => [0; ASK],
            Some(Draw { temperature, at }) => {
                let place = at.to_bits();
                [temperature.to_bits(), 1, place as u32, (place >> 32) as u32]
            }
        };
        let words: Vec<u32> = asks.iter().flat_map(words).collect();
        self.asks.write(0, &words)?;
        let args =
            Args::new().ptr(at(logits)?).ptr(self.asks.ptr()).ptr(self.drawn.ptr()).len(self.vocab);
        let grid = [asks.len() as u32, 1, 1];
        // SAFETY: there are logits, an ask and a place for a token for each block.
        Ok(unsafe { self.kernel.launch(grid, [THREADS, 1, 1], 0, args) }?)
    }

    /// By row the token's words, `Drawn` in draw.cu.
    pub(crate) fn drawn(&self) -> &Buffer {
        &self.drawn
    }
}
