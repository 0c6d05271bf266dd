//! The whole operator: compressed, selected and window branches, gated.

use tercet_cuda::{Buffer, Label};

use super::attend::{Blend, Branch, Grads, Outputs, Upstream, Visible, attend, attend_grads};
use super::batch::NsaBatch;
use super::gate::gate_backward;
use super::hopper;
use super::select::select;
use super::selected::{selected, selected_grads};
use super::{Plan, Slice};
use crate::cpu::Mask;
use crate::shape::{check_len, check_scale};
use crate::{Dims, Result};

/// Inputs of the operator; see [`crate::cpu::NsaInput`].
#[derive(Clone, Copy)]
pub struct NsaInput<'a> {
    /// Device, dims, storage.
    pub plan: &'a Plan,
    /// Spec and sequences.
    pub batch: &'a NsaBatch,
    /// Softmax scale, usually [`Dims::scale`].
    pub scale: f32,
    /// Queries `[T, H, D]`.
    pub q: Slice,
    /// Compressed keys `[N, K, D]`.
    pub k_cmp: Slice,
    /// Compressed values `[N, K, V]`.
    pub v_cmp: Slice,
    /// Keys of the selected branch `[T, K, D]`.
    pub k_slc: Slice,
    /// Values of the selected branch `[T, K, V]`.
    pub v_slc: Slice,
    /// Keys of the window branch `[T, K, D]`.
    pub k_win: Slice,
    /// Values of the window branch `[T, K, V]`.
    pub v_win: Slice,
    /// Gates after the sigmoid `[T, H, 3]`: cmp, slc, win.
    pub gate: Slice,
}

/// What the backward pass needs of the forward pass, in memory of whoever calls.
#[derive(Clone, Copy, Debug)]
pub struct NsaState {
    /// Outputs of the branches cmp, slc, win, each `[T, H, V]` in the storage type.
    pub outs: [Slice; 3],
    /// Natural-log sums of exponentials, each f32 `[T, H]`; −∞ where nothing is visible.
    pub lses: [Slice; 3],
    /// Selected blocks `[T, K, S]`, i32, ascending, −1 padded.
    pub indices: Slice,
}

/// [`NsaState`] in memory of its own.
pub struct NsaSaved {
    outs: [Buffer; 3],
    lses: [Buffer; 3],
    indices: Buffer,
    bytes: usize,
}

/// Where the gradients go; layouts of [`NsaInput`], overwritten.
#[derive(Clone, Copy)]
pub struct NsaGrads {
    /// `[T, H, D]`.
    pub q: Slice,
    /// `[N, K, D]`.
    pub k_cmp: Slice,
    /// `[N, K, V]`.
    pub v_cmp: Slice,
    /// `[T, K, D]`.
    pub k_slc: Slice,
    /// `[T, K, V]`.
    pub v_slc: Slice,
    /// `[T, K, D]`.
    pub k_win: Slice,
    /// `[T, K, V]`.
    pub v_win: Slice,
    /// `[T, H, 3]`.
    pub gate: Slice,
}

impl NsaSaved {
    /// Memory for the state of one call.
    pub fn new(plan: &Plan, batch: &NsaBatch) -> Result<Self> {
        let Dims { heads, kv_heads, value_dim, .. } = plan.dims;
        let (tokens, count) = (batch.tokens(), batch.spec.select_count);
        let bytes = plan.number.bytes();
        let alloc = |what, shape: &[usize], bytes: usize| {
            let total = shape.iter().product::<usize>() * bytes;
            plan.gpu.alloc_for(total, Label::shaped(what, shape))
        };
        let out = || alloc("a saved branch", &[tokens, heads, value_dim], bytes);
        let lse = || alloc("saved log-sum-exps", &[tokens, heads], 4);
        Ok(NsaSaved {
            outs: [out()?, out()?, out()?],
            lses: [lse()?, lse()?, lse()?],
            indices: alloc("selected blocks", &[tokens, kv_heads, count], 4)?,
            bytes,
        })
    }

    /// What to pass to [`nsa_backward`]; it lives as long as this does.
    pub fn state(&self) -> NsaState {
        NsaState {
            outs: self.outs.each_ref().map(|buffer| Slice::whole(buffer, self.bytes)),
            lses: self.lses.each_ref().map(|buffer| Slice::whole(buffer, 4)),
            indices: Slice::whole(&self.indices, 4),
        }
    }

    /// The selected blocks `[T, K, S]`, i32.
    pub fn indices(&self) -> &Buffer {
        &self.indices
    }

    /// Outputs of cmp, slc, win `[T, H, V]` in the storage type.
    pub fn outs(&self) -> &[Buffer; 3] {
        &self.outs
    }

    /// Log-sum-exps of cmp, slc, win `[T, H]`, f32.
    pub fn lses(&self) -> &[Buffer; 3] {
        &self.lses
    }
}

impl<'a> NsaInput<'a> {
    /// Checks everything.
    pub(super) fn check(&self) -> Result<()> {
        check_scale(self.scale)?;
        let Dims { heads, kv_heads, key_dim, value_dim } = self.plan.dims;
        let (tokens, blocks) = (self.batch.tokens(), self.batch.blocks);
        check_len("q", self.q.len(), &[('T', tokens), ('H', heads), ('D', key_dim)])?;
        for (name, k) in [("k_slc", self.k_slc), ("k_win", self.k_win)] {
            check_len(name, k.len(), &[('T', tokens), ('K', kv_heads), ('D', key_dim)])?;
        }
        for (name, v) in [("v_slc", self.v_slc), ("v_win", self.v_win)] {
            check_len(name, v.len(), &[('T', tokens), ('K', kv_heads), ('V', value_dim)])?;
        }
        check_len("gate", self.gate.len(), &[('T', tokens), ('H', heads), ('3', 3)])?;
        let layout = |dim| [('N', blocks), ('K', kv_heads), dim];
        check_len("k_cmp", self.k_cmp.len(), &layout(('D', key_dim)))?;
        check_len("v_cmp", self.v_cmp.len(), &layout(('V', value_dim)))
    }

    pub(super) fn branch(&self, k: Slice, v: Slice) -> Branch<'a> {
        let (plan, batch) = (self.plan, &self.batch.batch);
        Branch { plan, batch, scale: self.scale, q: self.q, k, v }
    }

    pub(super) fn cmp(&self) -> Branch<'a> {
        self.branch(self.k_cmp, self.v_cmp)
    }

    pub(super) fn slc(&self) -> Branch<'a> {
        self.branch(self.k_slc, self.v_slc)
    }

    pub(super) fn win(&self) -> Branch<'a> {
        self.branch(self.k_win, self.v_win)
    }

    pub(super) fn window(&self) -> Visible<'static> {
        Visible::Mask(Mask::Window(self.batch.spec.window))
    }

    pub(super) fn check_rows(&self, name: &'static str, rows: Slice) -> Result<()> {
        let Dims { heads, value_dim, .. } = self.plan.dims;
        let layout = [('T', self.batch.tokens()), ('H', heads), ('V', value_dim)];
        check_len(name, rows.len(), &layout)
    }

    pub(super) fn check_lse(&self, name: &'static str, lse: Slice) -> Result<()> {
        let layout = [('T', self.batch.tokens()), ('H', self.plan.dims.heads)];
        check_len(name, lse.len(), &layout)
    }

    pub(super) fn check_indices(&self, indices: Slice) -> Result<()> {
        let (kv_heads, count) = (self.plan.dims.kv_heads, self.batch.spec.select_count);
        let layout = [('T', self.batch.tokens()), ('K', kv_heads), ('S', count)];
        check_len("saved indices", indices.len(), &layout)
    }

    fn check_state(&self, state: &NsaState) -> Result<()> {
        for (i, name) in ["saved cmp", "saved slc", "saved win"].into_iter().enumerate() {
            self.check_rows(name, state.outs[i])?;
            self.check_lse(name, state.lses[i])?;
        }
        self.check_indices(state.indices)
    }
}

/// Writes `out` `[T, H, V]`. With `save` returns what [`nsa_backward`] needs; without, nothing of
/// size `[T, H, V]` is allocated.
pub fn nsa_forward(input: &NsaInput, out: Slice, save: bool) -> Result<Option<NsaSaved>> {
    input.check()?;
    input.check_rows("out", out)?;
    if save {
        let saved = NsaSaved::new(input.plan, input.batch)?;
        nsa_forward_into(input, out, &saved.state())?;
        return Ok(Some(saved));
    }
    nsa_forward_choosing(input, out, None)?;
    Ok(None)
}

/// [`nsa_forward`] that saves nothing but, when asked for, the selected blocks i32 `[T, K, S]`.
pub(super) fn nsa_forward_choosing(
    input: &NsaInput,
    out: Slice,
    indices: Option<Slice>,
) -> Result<()> {
    input.check()?;
    input.check_rows("out", out)?;
    let Dims { heads, kv_heads, .. } = input.plan.dims;
    let (tokens, count) = (input.batch.tokens(), input.batch.spec.select_count);
    let alloc = |what, shape: &[usize]| {
        let bytes = shape.iter().product::<usize>() * size_of::<i32>();
        input.plan.gpu.alloc_for(bytes, Label::shaped(what, shape))
    };
    let lse = alloc("log-sum-exps", &[tokens, heads])?;
    let own;
    let indices = match indices {
        Some(indices) => {
            input.check_indices(indices)?;
            indices
        }
        None => {
            own = alloc("selected blocks", &[tokens, kv_heads, count])?;
            Slice::whole(&own, 4)
        }
    };
    forward(input, out, [None; 3], [Some(Slice::whole(&lse, 4)), None, None], indices)
}

/// [`nsa_forward`] with the state in memory of the caller's.
pub fn nsa_forward_into(input: &NsaInput, out: Slice, state: &NsaState) -> Result<()> {
    input.check()?;
    input.check_rows("out", out)?;
    input.check_state(state)?;
    forward(input, out, state.outs.map(Some), state.lses.map(Some), state.indices)
}

/// `lses[0]` is always there: ranking needs it.
fn forward(
    input: &NsaInput,
    out: Slice,
    outs: [Option<Slice>; 3],
    lses: [Option<Slice>; 3],
    indices: Slice,
) -> Result<()> {
    let spec = &input.batch.spec;
    let to = |index: usize| {
        let blend = Blend { out, gate: input.gate, index, add: index > 0 };
        Outputs { branch: outs[index], lse: lses[index], blend: Some(blend) }
    };
    attend(&input.cmp(), Visible::Compressed(spec), to(0))?;
    if let Some(lse) = lses[0] {
        select(&input.cmp(), spec, lse, indices)?;
    }
    selected(&input.slc(), spec, indices, to(1))?;
    attend(&input.win(), input.window(), to(2))
}

/// Gradients from `d_out` `[T, H, V]`. No gradient flows through the choice of blocks.
pub fn nsa_backward(
    input: &NsaInput,
    state: &NsaState,
    d_out: Slice,
    grads: NsaGrads,
) -> Result<()> {
    input.check()?;
    input.check_state(state)?;
    input.check_rows("d_out", d_out)?;
    for (name, got, like) in [
        ("d_q", grads.q, input.q),
        ("d_k_cmp", grads.k_cmp, input.k_cmp),
        ("d_v_cmp", grads.v_cmp, input.v_cmp),
        ("d_k_slc", grads.k_slc, input.k_slc),
        ("d_v_slc", grads.v_slc, input.v_slc),
        ("d_k_win", grads.k_win, input.k_win),
        ("d_v_win", grads.v_win, input.v_win),
        ("d_gate", grads.gate, input.gate),
    ] {
        check_len(name, got.len(), &[('n', like.len())])?;
    }
    let (plan, tokens) = (input.plan, input.batch.tokens());
    if tokens == 0 {
        return Ok(());
    }
    let Dims { heads, key_dim, .. } = plan.dims;
    let rows = tokens * heads;
    let label = Label::shaped("softmax corrections", &[3, tokens, heads]);
    let deltas = plan.gpu.alloc_for(3 * rows * 4, label)?;
    gate_backward(plan, input.gate, state.outs, d_out, grads.gate, deltas.ptr(), rows)?;
    // Hopper's kernels add up in dQ itself: half the memory and traffic, one rounding a branch.
    let label = Label::shaped("the query's gradient in f32", &[tokens, heads, key_dim]);
    let in_place = hopper::attend_backward::knows(plan);
    let bytes = if in_place { 0 } else { rows * key_dim * 4 };
    let sum = plan.gpu.alloc_for(bytes, label)?;
    let up = |index: usize| Upstream {
        d_out,
        gate: Some((input.gate, index)),
        lse: state.lses[index],
        delta: deltas.ptr() + (index * rows * 4) as u64,
    };
    let to = |index: usize, k, v| {
        let (first, last) = (index == 0, index == 2);
        Grads { q: grads.q, sum: sum.ptr(), first, last, k, v }
    };
    let spec = &input.batch.spec;
    let cmp = to(0, grads.k_cmp, grads.v_cmp);
    attend_grads(&input.cmp(), Visible::Compressed(spec), input.batch.blocks, up(0), cmp)?;
    let slc = to(1, grads.k_slc, grads.v_slc);
    selected_grads(&input.slc(), spec, state.indices, up(1), slc)?;
    let win = to(2, grads.k_win, grads.v_win);
    attend_grads(&input.win(), input.window(), tokens, up(2), win)
}
