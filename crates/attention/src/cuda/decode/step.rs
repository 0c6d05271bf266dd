//! One attention step of one layer for a batch of query tokens over caches.

use tercet_cuda::{Args, Kernel, Label, Source};

use super::super::plain::int;
use super::super::{Plan, Slice};
use super::shape::{Global, Load, Shape, choose};
use super::view::{CacheView, RawCache};
use crate::cpu::Mask;
use crate::shape::{check_len, check_scale};
use crate::{Dims, Error, NsaSpec, Result};

const HEADERS: &[(&str, &str)] = &[
    ("decode.cuh", include_str!("decode.cuh")),
    ("cluster.cuh", include_str!("cluster.cuh")),
    ("select.cuh", include_str!("select.cuh")),
];
pub(super) static STEP: Source =
    Source { name: "decode_step", text: include_str!("step.cu"), headers: HEADERS };
pub(super) static PLAIN: Source =
    Source { name: "decode_plain", text: include_str!("plain.cu"), headers: HEADERS };

/// Threads of the plain kernel.
const PLAIN_THREADS: u32 = 256;

/// Query tokens, each of any sequence at any position.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Device, dims, storage.
    pub plan: &'a Plan,
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[R, H, D]`.
    pub q: Slice,
    /// Each row's position, i32 `[R]`; −1: an idle row, whose output is 0.
    pub positions: Slice,
    /// Each row's sequence, i32 `[R]`; `None`: row i is of sequence i.
    pub sequences: Option<Slice>,
    /// Sequences in the caches.
    pub count: usize,
    /// More than any row's position.
    pub longest: usize,
}

/// What the sparse operator reads besides.
#[derive(Clone, Copy)]
pub struct NsaCaches<'a> {
    /// Blocks, counts and window.
    pub spec: &'a NsaSpec,
    /// Gates after the sigmoid `[R, H, 3]`: cmp, slc, win.
    pub gate: Slice,
    /// Compressed keys and values, a block in a token's place.
    pub cmp: CacheView,
    /// Keys and values of the selected branch.
    pub slc: CacheView,
    /// Keys and values of the window branch.
    pub win: CacheView,
}

/// The kernels' `Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    q: u64,
    gate: u64,
    out: u64,
    indices: u64,
    positions: u64,
    sequences: u64,
    cmp: RawCache,
    slc: RawCache,
    win: RawCache,
    scratch: u64,
    rows: i32,
    kv_heads: i32,
    slice: i32,
    blocks: i32,
    scale: f32,
    padding: i32,
}

impl Rows<'_> {
    fn count(&self) -> usize {
        self.positions.len()
    }

    fn check(&self, out: Slice) -> Result<()> {
        check_scale(self.scale)?;
        let Dims { heads, key_dim, value_dim, .. } = self.plan.dims;
        let rows = self.count();
        check_len("q", self.q.len(), &[('R', rows), ('H', heads), ('D', key_dim)])?;
        check_len("out", out.len(), &[('R', rows), ('H', heads), ('V', value_dim)])?;
        if let Some(sequences) = self.sequences {
            check_len("sequences", sequences.len(), &[('R', rows)])?;
        } else if rows > self.count {
            let text = format!("{rows} rows of {} sequences, one each", self.count);
            return Err(Error::Dims(text));
        }
        if self.longest > i32::MAX as usize {
            return Err(Error::Dims(format!(
                "sequences of {} tokens; most is 2^31 - 1",
                self.longest
            )));
        }
        Ok(())
    }

    fn params(&self, out: Slice) -> Params {
        Params {
            q: self.q.ptr(),
            gate: 0,
            out: out.ptr(),
            indices: 0,
            positions: self.positions.ptr(),
            sequences: self.sequences.map_or(0, Slice::ptr),
            cmp: RawCache::default(),
            slc: RawCache::default(),
            win: RawCache::default(),
            scratch: 0,
            rows: int(self.count()),
            kv_heads: int(self.plan.dims.kv_heads),
            slice: 0,
            blocks: 0,
            scale: self.scale,
            padding: 0,
        }
    }
}

/// Writes `out` `[R, H, V]` and, when asked for, the selected blocks `indices` i32 `[R, K, S]`.
/// The caches hold every token up to the rows' own, a window ring at least the last `w` before
/// each row's.
pub fn nsa_rows(rows: &Rows, caches: &NsaCaches, out: Slice, indices: Option<Slice>) -> Result<()> {
    rows.check(out)?;
    let spec = caches.spec;
    spec.validate()?;
    let Dims { heads, kv_heads, .. } = rows.plan.dims;
    check_len("gate", caches.gate.len(), &[('R', rows.count()), ('H', heads), ('3', 3)])?;
    if let Some(indices) = indices {
        let layout = [('R', rows.count()), ('K', kv_heads), ('S', spec.select_count)];
        check_len("indices", indices.len(), &layout)?;
    }
    let blocks = spec.compressed_blocks(rows.longest);
    caches.cmp.check("cmp", rows.count, blocks)?;
    caches.slc.check("slc", rows.count, rows.longest)?;
    caches.win.check("win", rows.count, spec.window.min(rows.longest))?;
    let mut params = rows.params(out);
    params.gate = caches.gate.ptr();
    params.indices = indices.map_or(0, Slice::ptr);
    (params.cmp, params.slc) = (caches.cmp.raw(), caches.slc.raw());
    params.win = caches.win.raw();
    params.blocks = int(spec.selection_blocks(rows.longest));
    launch(rows, Some(spec), spec.window, [&caches.cmp, &caches.slc, &caches.win], params)
}

/// Dense or window attention: writes `out` `[R, H, V]`. A window's cache may be a ring.
pub fn dense_rows(rows: &Rows, mask: Mask, cache: &CacheView, out: Slice) -> Result<()> {
    rows.check(out)?;
    let window = match mask {
        Mask::Causal => 0,
        Mask::Window(0) => {
            return Err(Error::Dims("a window of 0 keys, expected at least 1".into()));
        }
        Mask::Window(window) => window,
    };
    let held = if cache.ring { window.min(rows.longest) } else { rows.longest };
    cache.check("dense", rows.count, held)?;
    let mut params = rows.params(out);
    params.slc = cache.raw();
    launch(rows, None, window, [cache; 3], params)
}

fn launch(
    rows: &Rows,
    spec: Option<&NsaSpec>,
    window: usize,
    caches: [&CacheView; 3],
    mut params: Params,
) -> Result<()> {
    let plan = rows.plan;
    let mut args = Args::new();
    let pairs = rows.count() * plan.dims.kv_heads;
    if pairs == 0 {
        return Ok(());
    }
    let load = Load { plan, spec, pairs, longest: rows.longest };
    let (kernel, blocks, threads, shared, floats) = match choose(&load) {
        Some(shape) => {
            params.slice = int(shape.slice(&load));
            for cache in caches {
                let [k, v] = cache.maps(plan, shape.tile)?;
                args = args.map(k).map(v);
            }
            let kernel = fast(plan, spec, window, &shape)?;
            let shared = shape.shared(&load);
            (kernel, pairs * shape.cluster(), shape.threads(&load), shared, shape.scratch(&load))
        }
        None => {
            let slice = match spec {
                None => rows.longest,
                Some(spec) => {
                    let selected = spec.select_count * spec.select_block;
                    let window = spec.window.min(rows.longest);
                    spec.compressed_blocks(rows.longest).max(selected).max(window)
                }
            };
            params.slice = int(slice);
            let row = spec.map_or(slice, |spec| {
                let output = plan.dims.group() * plan.dims.value_dim;
                2 * slice + params.blocks as usize + spec.select_count + output
            });
            (plain(plan, spec, window)?, pairs, PLAIN_THREADS, 0, pairs * row)
        }
    };
    let scratch =
        plan.gpu.alloc_for(floats * 4, Label::shaped("decode logits", &[pairs, floats / pairs]))?;
    params.scratch = scratch.ptr();
    let Some(blocks) = u32::try_from(blocks).ok().filter(|&n| n <= i32::MAX as u32) else {
        return Err(Error::Dims(format!(
            "{blocks} thread blocks; a launch takes at most 2^31 - 1"
        )));
    };
    // SAFETY: the kernel's parameters; lengths were checked and addresses are the caller's promise.
    unsafe {
        kernel.launch([blocks, 1, 1], [threads, 1, 1], shared as u32, args.value(params))?;
    }
    Ok(())
}

/// The constants that a kernel and its plan share.
fn constants(plan: &Plan, spec: Option<&NsaSpec>, window: usize) -> Vec<(&'static str, String)> {
    let mut defines = vec![
        ("GROUP", plan.dims.group()),
        ("D", plan.dims.key_dim),
        ("V", plan.dims.value_dim),
        // A window as long as any sequence sees as much as a longer one.
        ("WINDOW", window.min(i32::MAX as usize)),
    ];
    match spec {
        None => defines.push(("DENSE", 1)),
        Some(spec) => defines.extend([
            ("COMPRESS_BLOCK", spec.compress_block),
            ("COMPRESS_STRIDE", spec.compress_stride),
            ("SELECT_BLOCK", spec.select_block),
            ("SELECT_COUNT", spec.select_count),
            ("SELECT_INITIAL", spec.select_initial),
            ("SELECT_LOCAL", spec.select_local),
        ]),
    }
    let defines = defines.into_iter().map(|(name, value)| (name, value.to_string()));
    std::iter::once(plan.number.define()).chain(defines).collect()
}

fn fast(plan: &Plan, spec: Option<&NsaSpec>, window: usize, shape: &Shape) -> Result<Kernel> {
    let mut defines = constants(plan, spec, window);
    let own = [
        ("SPLITS", shape.splits),
        ("SLOTS", shape.slots),
        ("TILE", shape.tile),
        ("CHOOSERS", shape.choosers as usize),
        ("RESIDENT", shape.resident),
    ];
    defines.extend(own.map(|(name, value)| (name, value.to_string())));
    if shape.global >= Global::Logits {
        defines.push(("LOGITS_GLOBAL", "1".into()));
    }
    if shape.global == Global::All {
        defines.push(("IMPORTANCE_GLOBAL", "1".into()));
    }
    let kernel = plan.gpu.kernel(&STEP, "decode_step", &defines)?;
    // Clusters of more than eight blocks must be asked for.
    kernel.allow_large_clusters()?;
    Ok(kernel)
}

fn plain(plan: &Plan, spec: Option<&NsaSpec>, window: usize) -> Result<Kernel> {
    Ok(plan.gpu.kernel(&PLAIN, "decode_plain", &constants(plan, spec, window))?)
}
