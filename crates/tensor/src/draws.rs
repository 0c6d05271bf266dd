//! Tokens chosen on the device where their logits are: what is read back of a row is a token instead
//! of a vocabulary.

use tercet_cuda::{Gpu, Pinned};

use crate::cuda::draw::Kernel;
use crate::{DType, Error, Result, Tensor};

/// How the token of a row is chosen from all of the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the highest, the first of equals.
    pub temperature: f32,
    /// Where in the distribution, 0 to 1 (excluded), in the order of the tokens: see
    /// [`crate::exp_quantile`], whose place it is but for roundings of exponentials.
    pub at: f64,
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// `None` where a logit is NaN or +∞, or all are −∞.
    pub token: Option<u32>,
    /// `ln p` of it under the logits as they are, in nats.
    pub log_prob: f32,
}

/// Draws from rows of logits. What a row gives depends on its own logits and draw alone.
pub struct Draws {
    kernel: Kernel,
    host: Pinned,
    rows: usize,
    vocab: usize,
}

impl Draws {
    /// Tokens that a vocabulary may have.
    pub const VOCAB: usize = Kernel::RUN * Kernel::RUNS;

    /// For up to `rows` rows of `vocab` logits.
    ///
    /// # Errors
    /// [`Error::Value`] for no rows, or a vocabulary of none or more than [`Draws::VOCAB`]; the
    /// device's.
    pub fn new(gpu: &Gpu, rows: usize, vocab: usize) -> Result<Self> {
        if rows == 0 || vocab == 0 || vocab > Self::VOCAB {
            let text =
                format!("{rows} rows of {vocab} logits; at most {} are drawn from", Self::VOCAB);
            return Err(Error::value("draws", text));
        }
        let kernel = Kernel::new(gpu, rows, vocab)?;
        let host = gpu.pinned(rows * 2 * size_of::<u32>())?;
        Ok(Self { kernel, host, rows, vocab })
    }

    /// Chooses in the first rows of logits f32 `[n, vocab]` for which something is asked, and waits.
    ///
    /// # Errors
    /// [`Error::Shape`] for other logits, or more asks than rows; the device's.
    pub fn run(&mut self, logits: &Tensor, asks: &[Option<Draw>]) -> Result<Vec<Option<Drawn>>> {
        let fits = logits.shape().len() == 2
            && logits.shape()[1] == self.vocab
            && logits.dtype() == DType::F32;
        let rows = logits.shape().first().map_or(0, |&rows| rows.min(self.rows));
        if !fits || asks.len() > rows {
            let expected = format!("f32 [{} or more, {}]", asks.len(), self.vocab);
            return Err(Error::shape("draws", "the logits", expected, logits.shape()));
        }
        if asks.iter().all(Option::is_none) {
            return Ok(vec![None; asks.len()]);
        }
        self.kernel.launch(logits, asks)?;
        let words = self.host.read::<u32>(self.kernel.drawn(), asks.len() * 2)?;
        let row = |(ask, words): (&Option<Draw>, &[u32])| {
            ask.map(|_| Drawn {
                token: (words[0] != u32::MAX).then_some(words[0]),
                log_prob: f32::from_bits(words[1]),
            })
        };
        Ok(asks.iter().zip(words.chunks_exact(2)).map(row).collect())
    }
}
