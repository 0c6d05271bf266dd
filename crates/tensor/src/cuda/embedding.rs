//! Launches of `embedding.cu`: see `ops/embedding.rs`.

use tercet_cuda::{Args, Gpu, Source};

use super::cut::vector;
use super::sort::sort;
use super::{GATHERS, at, kernel, stale};
use crate::{Result, Tensor};

const SOURCE: Source =
    Source { name: "embedding", text: include_str!("embedding.cu"), headers: &[GATHERS] };

/// Threads of a block.
const THREADS: usize = 256;

/// What `embedding.cu` has, too: vectors of a thread where a row has few tokens; vectors that a
/// block takes elsewhere; tokens above which a row is said to have many, and above which most.
const EACH: usize = 4;
const LANES: usize = 32;
const FEW: usize = 32;
const MANY: usize = 1024;

fn defines(width: usize, vector: usize) -> [(&'static str, String); 2] {
    [("WIDTH", width.to_string()), ("VEC", vector.to_string())]
}

fn blocks(threads: usize) -> [u32; 3] {
    [threads.div_ceil(THREADS) as u32, 1, 1]
}

/// Rows of `table` picked by `ids`, those of ids outside it NaN.
pub(crate) fn forward(gpu: &Gpu, table: &Tensor, ids: &Tensor, width: usize) -> Result<Tensor> {
    let out = stale(gpu, table.dtype(), &[ids.len(), width])?;
    if out.is_empty() {
        return Ok(out);
    }
    let vector = vector(width, table.dtype());
    let defines = defines(width, vector);
    let kernel = kernel(gpu, &SOURCE, "embedding_forward", table.dtype(), &defines)?;
    let args = Args::new().ptr(at(table)?).ptr(at(ids)?).ptr(at(&out)?);
    let args = args.len(ids.len()).len(table.len() / width);
    // SAFETY: out holds a row for every id, and ids outside the table are not followed.
    unsafe { kernel.launch(blocks(out.len() / vector), [THREADS as u32, 1, 1], 0, args)? };
    Ok(out)
}

/// `sum` `[vocab, width]` f32 gets, on top of what it holds when `add`, each row's gradients in
/// the order of the tokens.
pub(crate) fn backward(
    gpu: &Gpu,
    (sum, add): (u64, bool),
    ids: &Tensor,
    grad: &Tensor,
    [vocab, width]: [usize; 2],
) -> Result<()> {
    let (tokens, dy) = (ids.len(), at(grad)?);
    if width == 0 || vocab == 0 {
        return Ok(());
    }
    let sorted = sort(gpu, at(ids)?, tokens, vocab, 0)?;
    // Four numbers a thread: 16 bytes of the f32 sum.
    let vector = vector(width, grad.dtype()).min(4);
    let pieces = width / vector;
    let defines = defines(width, vector);
    let get = |entry| kernel(gpu, &SOURCE, entry, grad.dtype(), &defines);
    let (order, starts) = (sorted.places.ptr(), sorted.starts.ptr());
    let end = |args: Args| args.ptr(order).ptr(starts).ptr(sum).len(vocab).i32(add.into());
    let keyed = || end(Args::new().ptr(dy).ptr(sorted.keys.ptr()));
    let marks = |above: usize| [tokens.div_ceil(above) as u32, pieces.div_ceil(LANES) as u32, 1];
    let few = blocks(vocab * pieces.div_ceil(EACH));
    // SAFETY: the gradient holds a row of `width` for every token, `sum` one for every id, and
    // the sorted ids name tokens.
    unsafe {
        let block = [THREADS as u32, 1, 1];
        get("embedding_few")?.launch(few, block, 0, end(Args::new().ptr(dy)))?;
        get("embedding_many")?.launch(marks(FEW), block, 0, keyed())?;
        get("embedding_most")?.launch(marks(MANY), [1024, 1, 1], 0, keyed())?;
    }
    Ok(())
}
