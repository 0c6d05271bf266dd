//! φ with parameters as matrix products: blocks are flattened a chunk at a time, so that the
//! copies stay small however long the sequence.

use tercet_cuda::{Args, Buffer, Gpu, Matmul, Number, Source};

use super::compress::Blocks;
use super::cut::threads;
use super::sum_parts::column_sums;
use super::{at, kernel, number, stale};
use crate::{DType, Device, Result, Tensor};

const SOURCE: Source = Source::new("compress_phi", include_str!("compress_phi.cu"));

/// Bytes of flattened blocks that exist at once.
const CHUNK: usize = 64 << 20;

/// Columns of a block of `compress_shift`.
const COLUMNS: usize = 32;

const F32: usize = size_of::<f32>();

/// A layer of φ: weight `[K, inner, outer]`, bias `[K, outer]` if it has one.
struct Layer<'p> {
    weight: &'p Tensor,
    bias: Option<&'p Tensor>,
    inner: usize,
    outer: usize,
}

/// φ with one layer, or two with a GELU between.
pub(crate) struct Phi<'a, 'p> {
    blocks: Blocks<'a>,
    layers: Vec<Layer<'p>>,
    /// `[K, l·C]`.
    pe: &'p Tensor,
}

/// Rows `first..last` of a chunk, and how many before them reach into its tokens.
#[derive(Clone, Copy)]
struct Chunk {
    first: usize,
    last: usize,
    lead: usize,
}

impl Chunk {
    fn own(self) -> usize {
        self.last - self.first
    }

    fn all(self) -> usize {
        self.lead + self.own()
    }
}

/// What is added to the first layer's outputs, `pe · W₁ (+ bias₁)`, f32 `[K, outer]`.
pub(crate) fn shift(
    gpu: &Gpu,
    pe: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [heads, inner, outer]: [usize; 3],
) -> Result<Tensor> {
    let shift = stale(gpu, DType::F32, &[heads, outer])?;
    let kernel = kernel(gpu, &SOURCE, "compress_shift", weight.dtype(), &[])?;
    let grid = [outer.div_ceil(COLUMNS) as u32, heads as u32, 1];
    let args = Args::new().ptr(at(pe)?).ptr(at(weight)?);
    let args = args.ptr(bias.map_or(Ok(0), at)?).ptr(at(&shift)?).len(inner).i32(outer as i32);
    // SAFETY: all have the shapes that the sizes name.
    unsafe { kernel.launch(grid, [COLUMNS as u32, COLUMNS as u32, 1], 0, args)? };
    Ok(shift)
}

impl<'a, 'p> Phi<'a, 'p> {
    /// `params` in the order of the fields of `ops::Phi`.
    pub(crate) fn new(blocks: Blocks<'a>, params: &'p [Tensor], hidden: usize) -> Result<Self> {
        let (wide, dim) = (blocks.block * blocks.dim, blocks.dim);
        let (layers, pe) = match params {
            [weight, pe] => (vec![Layer { weight, bias: None, inner: wide, outer: dim }], pe),
            [weight1, bias1, weight2, bias2, pe] => {
                let first =
                    Layer { weight: weight1, bias: Some(bias1), inner: wide, outer: hidden };
                let second =
                    Layer { weight: weight2, bias: Some(bias2), inner: hidden, outer: dim };
                (vec![first, second], pe)
            }
            _ => {
                let text = format!("φ has 2 or 5 parameters, got {}", params.len());
                return Err(crate::Error::value("compress", text));
            }
        };
        Ok(Phi { blocks, layers, pe })
    }

    fn gpu(&self) -> &'a Gpu {
        self.blocks.gpu
    }

    fn dtype(&self) -> DType {
        self.blocks.dtype
    }

    /// Ranges of rows whose flattened blocks fit into [`CHUNK`].
    fn chunks(&self) -> impl Iterator<Item = Chunk> {
        let row = self.layers[0].inner * self.blocks.heads * self.dtype().bytes();
        let (per, rows) = ((CHUNK / row.max(1)).max(64), self.blocks.rows());
        let reach = self.blocks.block / self.blocks.stride;
        (0..rows).step_by(per).map(move |first| {
            let lead = (reach - 1).min(first);
            Chunk { first, last: (first + per).min(rows), lead }
        })
    }

    fn shift(&self) -> Result<Tensor> {
        let (first, heads) = (&self.layers[0], self.blocks.heads);
        let sizes = [heads, first.inner, first.outer];
        shift(self.gpu(), self.pe, first.weight, first.bias, sizes)
    }

    /// One product a head: `[m, n, k]`, the addresses of a, b and c, and elements between heads.
    fn products(&self, sizes: [usize; 3], places: [u64; 3], apart: [usize; 3]) -> Matmul {
        let [a, b, c] = places;
        let product = Matmul::new(sizes, number(self.dtype()), a, b, c);
        Matmul { output: Number::F32, batch: (self.blocks.heads, apart), ..product }
    }

    /// `y = x · W`, x `[K, rows, inner]`, y f32 `[K, rows, outer]`.
    fn forward_product(&self, layer: &Layer, x: u64, y: u64, rows: usize) -> Result<()> {
        let Layer { inner, outer, .. } = *layer;
        let apart = [rows * inner, inner * outer, rows * outer];
        let product = self.products([rows, outer, inner], [x, at(layer.weight)?, y], apart);
        // SAFETY: the places hold as much.
        Ok(unsafe { self.gpu().matmul(&product) }?)
    }

    /// The GELU between the layers: z and shift to activations; with `d_active`, which becomes the
    /// gradient of z, its gradient.
    fn hidden(
        &self,
        z: &Buffer,
        shift: &Tensor,
        d_active: Option<&Buffer>,
        to: &Buffer,
        rows: usize,
    ) -> Result<()> {
        let width = self.layers[0].outer;
        let args = Args::new().ptr(z.ptr()).ptr(at(shift)?);
        let (entry, args) = match d_active {
            None => ("compress_hidden_forward", args),
            Some(d_active) => ("compress_hidden_backward", args.ptr(d_active.ptr())),
        };
        let kernel = kernel(self.gpu(), &SOURCE, entry, self.dtype(), &[])?;
        let ([blocks, ..], block) = threads(rows * width);
        let args = args.ptr(to.ptr()).len(rows).i32(width as i32);
        // SAFETY: all hold `rows` rows of the hidden width for every head.
        Ok(unsafe { kernel.launch([blocks, self.blocks.heads as u32, 1], block, 0, args) }?)
    }

    fn wide(&self, rows: usize, width: usize) -> Result<Buffer> {
        Ok(self.gpu().alloc(self.blocks.heads * rows * width * F32)?)
    }

    fn narrow(&self, rows: usize, width: usize) -> Result<Buffer> {
        Ok(self.gpu().alloc(self.blocks.heads * rows * width * self.dtype().bytes())?)
    }

    /// The second layer's bias in f32, which [`Blocks::finish`] adds.
    fn last_bias(&self) -> Result<Option<Tensor>> {
        let last = self.layers.get(1).and_then(|layer| layer.bias);
        last.map(|bias| bias.to_dtype(DType::F32)).transpose()
    }

    /// `[N, K, C]`; `known` is what [`shift`] says, if somebody has asked before.
    pub(crate) fn forward(&self, x: &Tensor, known: Option<&Tensor>) -> Result<Tensor> {
        let (blocks, first) = (&self.blocks, &self.layers[0]);
        let out = stale(self.gpu(), self.dtype(), &[blocks.rows(), blocks.heads, blocks.dim])?;
        let bias = self.last_bias()?;
        let shift = known.map_or_else(|| self.shift(), |known| Ok(known.clone()))?;
        for chunk in self.chunks() {
            let rows = chunk.own();
            let flat = self.narrow(rows, first.inner)?;
            blocks.gather(x, flat.ptr(), chunk.first, rows)?;
            let z = self.wide(rows, first.outer)?;
            self.forward_product(first, flat.ptr(), z.ptr(), rows)?;
            let Some((second, bias)) = self.layers.get(1).zip(bias.as_ref()) else {
                blocks.finish((z.ptr(), at(&shift)?), &out, chunk.first, rows)?;
                continue;
            };
            let active = self.narrow(rows, first.outer)?;
            self.hidden(&z, &shift, None, &active, rows)?;
            let y = self.wide(rows, second.outer)?;
            self.forward_product(second, active.ptr(), y.ptr(), rows)?;
            blocks.finish((y.ptr(), at(bias)?), &out, chunk.first, rows)?;
        }
        Ok(out)
    }

    /// The gradient of x and, in f32, of the parameters in their order.
    pub(crate) fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let (blocks, device) = (&self.blocks, Device::Cuda(self.gpu().clone()));
        let zeros = |dtype, shape: &[usize]| Tensor::zeros_on(&device, dtype, shape);
        let d_x = zeros(self.dtype(), &[blocks.tokens, blocks.heads, blocks.dim])?;
        let d_weights = self.layers.iter().map(|l| zeros(DType::F32, l.weight.shape()));
        let d_weights = d_weights.collect::<Result<Vec<Tensor>>>()?;
        // The columns of the gradients of both layers' outputs: what their biases get.
        let sums = self.layers.iter().map(|l| zeros(DType::F32, &[blocks.heads, l.outer]));
        let sums = sums.collect::<Result<Vec<Tensor>>>()?;
        let last = sums.len() - 1;
        let sizes = [blocks.rows(), blocks.heads * blocks.dim];
        column_sums(self.gpu(), self.dtype(), at(grad)?, at(&sums[last])?, sizes, false)?;
        // With one layer the backward does not look at its outputs.
        let shift = if last > 0 { self.shift()? } else { zeros(DType::F32, &[0])? };
        for chunk in self.chunks() {
            let sums = (&d_weights[..], &sums[0]);
            self.chunk_backward(x, grad, &shift, chunk, sums)?.scatter(blocks, &d_x)?;
        }
        let d_pe = zeros(DType::F32, self.pe.shape())?;
        self.pe_grads(&sums[0], &d_weights[0], &d_pe)?;
        let mut d_params = Vec::new();
        for ((layer, d_weight), sum) in self.layers.iter().zip(d_weights).zip(sums) {
            d_params.push(d_weight);
            if layer.bias.is_some() {
                d_params.push(sum);
            }
        }
        d_params.push(d_pe);
        Ok((d_x, d_params))
    }

    /// Adds a chunk to the gradients of the weights and, with two layers, to the first one's
    /// `columns`; returns the gradients of the flattened blocks.
    fn chunk_backward(
        &self,
        x: &Tensor,
        grad: &Tensor,
        shift: &Tensor,
        chunk: Chunk,
        (d_weights, columns): (&[Tensor], &Tensor),
    ) -> Result<BlockGrads> {
        let (blocks, gpu, first) = (&self.blocks, self.gpu(), &self.layers[0]);
        let (bytes, rows, wide) = (self.dtype().bytes(), chunk.all(), first.inner);
        let skip = |width: usize| (chunk.lead * width * bytes) as u64;
        let begin = chunk.first - chunk.lead;
        let flat = self.narrow(rows, wide)?;
        blocks.gather(x, flat.ptr(), begin, rows)?;
        // The gradient [N, K, C] as a matrix a head: rows K·C apart, heads C apart.
        let across = blocks.heads * blocks.dim;
        let dy = at(grad)? + (begin * across * bytes) as u64;
        let own_dy = dy + skip(across);
        let d_blocks = self.wide(rows, wide)?;
        let add = chunk.first > 0;
        let Some(second) = self.layers.get(1) else {
            let places = [flat.ptr() + skip(wide), own_dy, at(&d_weights[0])?];
            let apart = [rows * wide, blocks.dim, wide * blocks.dim];
            let product = self.products([wide, blocks.dim, chunk.own()], places, apart);
            let d_weight = Matmul { trans_a: true, add, rows_apart: [0, across, 0], ..product };
            let places = [dy, at(first.weight)?, d_blocks.ptr()];
            let apart = [blocks.dim, wide * blocks.dim, rows * wide];
            let product = self.products([rows, wide, blocks.dim], places, apart);
            let back = Matmul { trans_b: true, rows_apart: [across, 0, 0], ..product };
            // SAFETY: the rows of the chunk lie inside all of these.
            unsafe {
                gpu.matmul(&d_weight)?;
                gpu.matmul(&back)?;
            }
            return Ok(BlockGrads { d_blocks, chunk });
        };
        let hidden = first.outer;
        let z = self.wide(rows, hidden)?;
        self.forward_product(first, flat.ptr(), z.ptr(), rows)?;
        let active = self.narrow(rows, hidden)?;
        self.hidden(&z, shift, None, &active, rows)?;
        let places = [active.ptr() + skip(hidden), own_dy, at(&d_weights[1])?];
        let apart = [rows * hidden, blocks.dim, hidden * blocks.dim];
        let product = self.products([hidden, blocks.dim, chunk.own()], places, apart);
        let d_weight2 = Matmul { trans_a: true, add, rows_apart: [0, across, 0], ..product };
        let d_active = self.wide(rows, hidden)?;
        let places = [dy, at(second.weight)?, d_active.ptr()];
        let apart = [blocks.dim, hidden * blocks.dim, rows * hidden];
        let product = self.products([rows, hidden, blocks.dim], places, apart);
        let back2 = Matmul { trans_b: true, rows_apart: [across, 0, 0], ..product };
        // SAFETY: as above.
        unsafe {
            gpu.matmul(&d_weight2)?;
            gpu.matmul(&back2)?;
        }
        // The activations have been used; their place takes the gradient before the GELU.
        let d_hidden = active;
        self.hidden(&z, shift, Some(&d_active), &d_hidden, rows)?;
        for head in 0..blocks.heads {
            let from = d_active.ptr() + ((head * rows + chunk.lead) * hidden * F32) as u64;
            let to = at(columns)? + (head * hidden * F32) as u64;
            column_sums(gpu, DType::F32, from, to, [chunk.own(), hidden], add)?;
        }
        let places = [flat.ptr() + skip(wide), d_hidden.ptr() + skip(hidden), at(&d_weights[0])?];
        let apart = [rows * wide, rows * hidden, wide * hidden];
        let product = self.products([wide, hidden, chunk.own()], places, apart);
        let d_weight1 = Matmul { trans_a: true, add, ..product };
        let places = [d_hidden.ptr(), at(first.weight)?, d_blocks.ptr()];
        let apart = [rows * hidden, wide * hidden, rows * wide];
        let product = self.products([rows, wide, hidden], places, apart);
        // SAFETY: as above.
        unsafe {
            gpu.matmul(&d_weight1)?;
            gpu.matmul(&Matmul { trans_b: true, ..product })?;
        }
        Ok(BlockGrads { d_blocks, chunk })
    }

    /// The position encoding is added to every block: what it gets, and what it adds to the
    /// gradient of the first weight.
    fn pe_grads(&self, columns: &Tensor, d_weight: &Tensor, d_pe: &Tensor) -> Result<()> {
        let first = &self.layers[0];
        let kernel = kernel(self.gpu(), &SOURCE, "compress_pe_grads", self.dtype(), &[])?;
        let ([blocks, ..], block) = threads(first.inner * 32);
        let args = Args::new().ptr(at(self.pe)?).ptr(at(first.weight)?).ptr(at(columns)?);
        let args = args.ptr(at(d_weight)?).ptr(at(d_pe)?);
        let args = args.len(first.inner).i32(first.outer as i32);
        // SAFETY: all have the shapes of φ's first layer, the sums a row for each head.
        Ok(unsafe { kernel.launch([blocks, self.blocks.heads as u32, 1], block, 0, args) }?)
    }
}

/// The gradients of a chunk's flattened blocks, f32 `[K, all, l·C]`.
struct BlockGrads {
    d_blocks: Buffer,
    chunk: Chunk,
}

impl BlockGrads {
    fn scatter(&self, blocks: &Blocks, d_x: &Tensor) -> Result<()> {
        let Chunk { first, last, lead } = self.chunk;
        let (range, rows) = (blocks.own_tokens(first, last), (first - lead, self.chunk.all()));
        blocks.scatter(self.d_blocks.ptr(), rows, d_x, range)
    }
}
