//! For each KV head and block, the queries that chose it: what dK and dV gather by.

use tercet_cuda::{Args, Buffer, Label};

use super::Slice;
use super::attend::Branch;
use super::plain::{self, INVERSE, int, items};
use crate::{NsaSpec, Result};

/// Most chunks that tokens are cut into, and fewest tokens of one: the histograms of all chunks
/// stay a fraction of the indices.
const CHUNKS: usize = 256;
const CHUNK: usize = 256;

/// Lists on the device.
pub(super) struct Inverse {
    /// i64 `[K · J + 1]`.
    pub starts: Buffer,
    /// i32, counted from the first query of their sequence.
    pub queries: Buffer,
    /// J, the numbers that blocks of all sequences together go by.
    pub blocks: usize,
}

impl Inverse {
    /// From `indices` `[T, K, S]`, of which only entries count that are one of their query's
    /// blocks, for the first time. Nothing is made where `wanted` (a flag on the device, or 0) is
    /// not set.
    pub fn new(branch: &Branch, spec: &NsaSpec, indices: Slice, wanted: u64) -> Result<Self> {
        let (plan, batch) = (branch.plan, branch.batch);
        let (gpu, kv_heads) = (&plan.gpu, plan.dims.kv_heads);
        let blocks = items(batch.tokens, spec.select_block, batch.count());
        let entries = kv_heads * blocks;
        let chunk = batch.tokens.div_ceil(CHUNKS).max(CHUNK);
        let chunks = batch.tokens.div_ceil(chunk);
        let label = |what| Label::shaped(what, &[kv_heads, blocks]);
        let counts = gpu.alloc_for(chunks * entries * 4, label("histograms of chosen blocks"))?;
        counts.fill(0)?;
        let starts = gpu.alloc_for((entries + 1) * 8, label("starts of the inverse index"))?;
        let queries = gpu.alloc_for(indices.len() * 4, label("inverse index"))?;

        let kernel = |entry| plain::flat_kernel(plan, &INVERSE, entry);
        let shape = |args: Args| {
            let args = args.ptr(batch.table.ptr()).i32(int(batch.count())).i32(int(batch.tokens));
            let args = args.i32(int(chunk)).i32(int(kv_heads)).i32(int(spec.select_count));
            args.i32(int(spec.select_block)).i32(int(blocks)).ptr(wanted)
        };
        let lists = Args::new().ptr(indices.ptr()).ptr(counts.ptr());
        let lists = shape(lists);
        // SAFETY: the kernels' arguments; the buffers were sized above, the indices checked.
        unsafe {
            plain::launch(&kernel("count")?, chunks * kv_heads, 256, 0, lists)?;
            let args = Args::new().ptr(counts.ptr()).ptr(starts.ptr());
            let args = args.i32(int(chunks)).i32(int(entries)).ptr(wanted);
            plain::launch(&kernel("offsets")?, entries.div_ceil(256), 256, 0, args)?;
            let args = Args::new().ptr(starts.ptr()).i32(int(entries)).ptr(wanted);
            plain::launch(&kernel("scan")?, 1, 1024, 1024 * 8, args)?;
            let args = Args::new().ptr(indices.ptr()).ptr(counts.ptr());
            let args = shape(args.ptr(starts.ptr()).ptr(queries.ptr()));
            plain::launch(&kernel("fill")?, chunks * kv_heads, 32, 0, args)?;
        }
        Ok(Inverse { starts, queries, blocks })
    }
}
