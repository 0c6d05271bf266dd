//! φ on a device: see `ops/compress.rs`; the average by kernels of its own, the other kinds by
//! products of flattened blocks (`compress_phi.rs`).

use std::cell::OnceCell;

use tercet_cuda::{Args, Buffer, Gpu, Source};

use super::cut::{threads, vector};
use super::{at, kernel, stale};
use crate::{DType, NsaSpec, Result, Tensor};

const SOURCE: Source = Source::new("compress", include_str!("compress.cu"));

/// Rows and tokens that a thread of the average takes; `compress.cu` has them too.
const RUN: usize = 4;
const TOKENS: usize = 16;

/// Where blocks and tokens are: what every kernel of `compress.cu` takes.
pub(crate) struct Blocks<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) dtype: DType,
    pub(super) block: usize,
    pub(super) stride: usize,
    pub(super) heads: usize,
    pub(super) dim: usize,
    pub(super) tokens: usize,
    vector: usize,
    /// Offsets of the sequences' tokens and compressed rows, here and on the device.
    cu_seqlens: &'a [i32],
    cu_rows: &'a [usize],
    uploaded: OnceCell<[Buffer; 2]>,
}

impl<'a> Blocks<'a> {
    /// Of x `[T, K, C]`; `cu_rows` are the B+1 offsets of the compressed rows.
    pub(crate) fn new(
        gpu: &'a Gpu,
        x: &Tensor,
        spec: &NsaSpec,
        cu_seqlens: &'a [i32],
        cu_rows: &'a [usize],
    ) -> Result<Self> {
        let &[tokens, heads, dim] = x.shape() else {
            return Err(crate::Error::shape("compress", "x", "[T, K, C]", x.shape()));
        };
        Ok(Blocks {
            gpu,
            dtype: x.dtype(),
            block: spec.compress_block,
            stride: spec.compress_stride,
            heads,
            dim,
            tokens,
            vector: vector(dim, x.dtype()),
            cu_seqlens,
            cu_rows,
            uploaded: OnceCell::new(),
        })
    }

    pub(super) fn rows(&self) -> usize {
        self.cu_rows.last().copied().unwrap_or(0)
    }

    /// First token of a row's block; for the number of rows, the end of the tokens.
    fn first_token(&self, row: usize) -> usize {
        if row >= self.rows() {
            return self.tokens;
        }
        let sequence = self.cu_rows.partition_point(|&at| at <= row) - 1;
        self.cu_seqlens[sequence] as usize + (row - self.cu_rows[sequence]) * self.stride
    }

    /// The offsets as arguments.
    fn offsets(&self, args: Args) -> Result<Args> {
        let [tokens_at, rows_at] = match self.uploaded.get() {
            Some(uploaded) => uploaded,
            None => {
                let rows_at: Vec<i32> = self.cu_rows.iter().map(|&row| row as i32).collect();
                let uploaded = [self.gpu.upload(self.cu_seqlens)?, self.gpu.upload(&rows_at)?];
                self.uploaded.get_or_init(|| uploaded)
            }
        };
        Ok(args.ptr(tokens_at.ptr()).ptr(rows_at.ptr()).i32(self.cu_rows.len() as i32 - 1))
    }

    /// Launches `entry` with a thread for each vector of `items` tokens or rows of every head;
    /// heads that are `apart` are counted by the grid.
    fn launch(&self, entry: &str, items: usize, apart: bool, args: Args) -> Result<()> {
        if items == 0 {
            return Ok(());
        }
        let defines = [
            ("BLOCK", self.block),
            ("STRIDE", self.stride),
            ("HEADS", self.heads),
            ("DIM", self.dim),
            ("VEC", self.vector),
        ]
        .map(|(name, value)| (name, value.to_string()));
        let kernel = kernel(self.gpu, &SOURCE, entry, self.dtype, &defines)?;
        let (inside, outside) = if apart { (1, self.heads) } else { (self.heads, 1) };
        let ([blocks, ..], block) = threads(items * inside * (self.dim / self.vector));
        let grid = [blocks, outside as u32, 1];
        // SAFETY: the callers pass tensors of the shapes that the entries name.
        Ok(unsafe { kernel.launch(grid, block, 0, args) }?)
    }

    /// The averages `[N, K, C]` of x.
    pub(crate) fn mean(&self, x: &Tensor) -> Result<Tensor> {
        let out = stale(self.gpu, self.dtype, &[self.rows(), self.heads, self.dim])?;
        let args = self.offsets(Args::new().ptr(at(x)?).ptr(at(&out)?))?.len(self.rows());
        let runs = self.rows().div_ceil(RUN);
        self.launch("compress_mean_forward", runs, false, args)?;
        Ok(out)
    }

    /// The gradient of x from that of the averages.
    pub(crate) fn mean_grad(&self, grad: &Tensor) -> Result<Tensor> {
        let out = stale(self.gpu, self.dtype, &[self.tokens, self.heads, self.dim])?;
        let args = self.offsets(Args::new().ptr(at(grad)?).ptr(at(&out)?))?.len(self.tokens);
        let runs = self.tokens.div_ceil(TOKENS);
        self.launch("compress_mean_backward", runs, false, args)?;
        Ok(out)
    }

    /// Writes the flattened blocks of `count` rows from `first` on, `[K, count, l·C]`. One sequence
    /// needs no offsets on the device, so that nothing is uploaded where a graph is captured.
    pub(super) fn gather(&self, x: &Tensor, to: u64, first: usize, count: usize) -> Result<()> {
        let args = Args::new().ptr(at(x)?).ptr(to);
        let args =
            if self.cu_rows.len() == 2 { args.ptr(0).ptr(0).i32(1) } else { self.offsets(args)? };
        let args = args.len(first).len(count);
        self.launch("compress_gather", count * self.block, true, args)
    }

    /// Adds up the gradients of flattened blocks, f32 `[K, count, l·C]` from row `lead` on, into
    /// those of the tokens `range` of `d_x`.
    pub(super) fn scatter(
        &self,
        d_blocks: u64,
        (lead, count): (usize, usize),
        d_x: &Tensor,
        range: std::ops::Range<usize>,
    ) -> Result<()> {
        let args = self.offsets(Args::new().ptr(d_blocks).ptr(at(d_x)?))?.len(lead).len(count);
        let args = args.len(range.start).len(range.end);
        self.launch("compress_scatter", range.len(), true, args)
    }

    /// Writes `count` rows from `first` on of `out` `[N, K, C]`: y, f32 `[K, count, C]`, plus
    /// shift, f32 `[K, C]`.
    pub(super) fn finish(
        &self,
        (y, shift): (u64, u64),
        out: &Tensor,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let args = Args::new().ptr(y).ptr(shift).ptr(at(out)?).len(first).len(count);
        self.launch("compress_finish", count, true, args)
    }

    /// The tokens whose last covering row is in `first..last`: with the other ranges of rows,
    /// all tokens once.
    pub(super) fn own_tokens(&self, first: usize, last: usize) -> std::ops::Range<usize> {
        let from = if first == 0 { 0 } else { self.first_token(first) };
        from..self.first_token(last)
    }
}
