//! Attention of one layer: projections, positions, and the operator, over a whole batch or over
//! a cache.

use tercet_tensor::{Mask, Tape, Tensor, Var, ops};

use crate::cache::{LayerCache, NsaNew};
use crate::decode_graph::Branches;
use crate::decoder::Site;
use crate::layout::{
    AttentionSlots, DenseSlots, KvSlots, LayerSlots, LinearSlots, NsaSlots, PhiSlots,
};
use crate::{Model, Result};

impl Model {
    /// Normed x `[T, C]` to the output projection `[T, C]`.
    pub(crate) fn attention(&self, tape: &mut Tape, x: &Var, site: Site) -> Result<Var> {
        let slots = &self.slots.layers[site.layer];
        let dims = self.config().dims();
        let dropout = site.dropout;
        let out = match &slots.attention {
            AttentionSlots::Dense(dense) => self.dense(tape, dense, x, site)?,
            AttentionSlots::Nsa(nsa) => self.nsa(tape, nsa, x, site)?,
        };
        let out = out.reshape(&[x.shape()[0], dims.heads * dims.value_dim])?;
        self.linear(tape, &slots.o, &out, dropout)
    }

    /// A projection split in heads: `[T, heads, dim]`.
    fn heads(
        &self,
        tape: &mut Tape,
        slots: &LinearSlots,
        x: &Var,
        [heads, dim]: [usize; 2],
        dropout: Option<u64>,
    ) -> Result<Var> {
        Ok(self.linear(tape, slots, x, dropout)?.reshape(&[x.shape()[0], heads, dim])?)
    }

    fn queries(&self, tape: &mut Tape, x: &Var, site: &Site) -> Result<Var> {
        let (slots, dims) = (&self.slots.layers[site.layer].q, self.config().dims());
        self.heads(tape, slots, x, [dims.heads, dims.key_dim], site.dropout)
    }

    fn keys(&self, tape: &mut Tape, slots: &KvSlots, x: &Var, site: &Site) -> Result<Var> {
        let dims = self.config().dims();
        self.heads(tape, &slots.k, x, [dims.kv_heads, dims.key_dim], site.dropout)
    }

    fn values(&self, tape: &mut Tape, slots: &KvSlots, x: &Var, site: &Site) -> Result<Var> {
        let dims = self.config().dims();
        self.heads(tape, &slots.v, x, [dims.kv_heads, dims.value_dim], site.dropout)
    }

    /// Rotates heads at `positions`; learned positions were added to the embedding instead.
    pub(crate) fn rotate(&self, tape: &mut Tape, x: Var, positions: &Tensor) -> Result<Var> {
        match &self.rope {
            None => Ok(x),
            Some(table) => Ok(ops::rope(tape, &x, positions, table)?),
        }
    }

    fn dense(&self, tape: &mut Tape, slots: &DenseSlots, x: &Var, site: Site) -> Result<Var> {
        let positions = &site.inputs.positions;
        let normed = |tape: &mut Tape, x: Var, norm: Option<usize>| match norm {
            None => Ok(x),
            Some(slot) => {
                let norm = self.param(tape, slot);
                ops::rms_norm(tape, &x, &norm, self.config().norm_eps as f32)
            }
        };
        let branches = Branches::begin(self, site.step.is_some())?;
        let q = self.queries(tape, x, &site)?;
        let q = normed(tape, q, slots.qk_norm.map(|norms| norms.0))?;
        let q = self.rotate(tape, q, positions)?;
        branches.next()?;
        let k = self.keys(tape, &slots.kv, x, &site)?;
        let k = normed(tape, k, slots.qk_norm.map(|norms| norms.1))?;
        let k = self.rotate(tape, k, positions)?;
        branches.next()?;
        let v = self.values(tape, &slots.kv, x, &site)?;
        branches.join()?;
        if let ([cache], Some(places)) = (&*site.caches, site.step) {
            let out = cache.step_dense(places, [q.value(), k.value(), v.value()])?;
            return Ok(tape.leaf(out));
        }
        if !site.caches.is_empty() {
            let new = [q.value(), k.value(), v.value()];
            let out = LayerCache::extend_dense(site.caches, site.sequence, self.config(), new)?;
            return Ok(tape.leaf(out));
        }
        let mask = self.mask(site.layer);
        Ok(ops::attention_dense(tape, &q, &k, &v, &site.inputs.cu_seqlens, mask)?)
    }

    /// Which keys a dense layer's queries see.
    pub(crate) fn mask(&self, layer: usize) -> Mask {
        self.config().window(layer).map_or(Mask::Causal, Mask::Window)
    }

    /// Three branches with their own keys and values. Keys of the selected and window branches
    /// are rotated at their position; compressed keys after φ, at their block's first token.
    /// Values are never rotated. One rotated q serves all three.
    fn nsa(&self, tape: &mut Tape, slots: &NsaSlots, x: &Var, site: Site) -> Result<Var> {
        let (inputs, spec) = (site.inputs, &slots.spec);
        let branches = Branches::begin(self, site.step.is_some())?;
        let q = self.queries(tape, x, &site)?;
        let q = self.rotate(tape, q, &inputs.positions)?;
        branches.next()?;
        let k_raw = self.keys(tape, &slots.cmp, x, &site)?;
        branches.next()?;
        let v_raw = self.values(tape, &slots.cmp, x, &site)?;
        branches.next()?;
        let k_slc = self.keys(tape, &slots.slc, x, &site)?;
        let k_slc = self.rotate(tape, k_slc, &inputs.positions)?;
        branches.next()?;
        let v_slc = self.values(tape, &slots.slc, x, &site)?;
        branches.next()?;
        let k_win = self.keys(tape, &slots.win, x, &site)?;
        let k_win = self.rotate(tape, k_win, &inputs.positions)?;
        branches.next()?;
        let v_win = self.values(tape, &slots.win, x, &site)?;
        branches.next()?;
        let gate = self.linear(tape, &slots.gate, x, site.dropout)?;
        let heads = self.config().num_attention_heads;
        let gate = ops::sigmoid(tape, &gate)?.reshape(&[x.shape()[0], heads, 3])?;
        branches.join()?;
        let (phi_k, phi_v) = (self.phi(tape, &slots.phi_k), self.phi(tape, &slots.phi_v));

        if site.caches.is_empty() {
            let k_cmp = ops::compress(tape, &k_raw, &phi_k, spec, &inputs.cu_seqlens)?;
            let v_cmp = ops::compress(tape, &v_raw, &phi_v, spec, &inputs.cu_seqlens)?;
            let k_cmp = self.rotate(tape, k_cmp, &inputs.block_positions)?;
            let vars = ops::NsaVars { q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate };
            return Ok(ops::attention_nsa(tape, &vars, spec, &inputs.cu_seqlens)?);
        }
        let new = [&q, &k_raw, &v_raw, &k_slc, &v_slc, &k_win, &v_win, &gate].map(Var::value);
        let phi = [&phi_k, &phi_v];
        if let ([cache], Some(places)) = (&*site.caches, site.step) {
            let out = self.step_nsa(tape, cache, &NsaNew::of(new), phi, (site.layer, places))?;
            return Ok(tape.leaf(out));
        }
        let out = self.extend_nsa(tape, (site.caches, site.sequence), NsaNew::of(new), phi)?;
        Ok(tape.leaf(out))
    }

    /// Appends tokens whose compression rows are raw; returns their output `[T, H, V]`.
    fn extend_nsa(
        &self,
        tape: &mut Tape,
        (caches, sequence): (&mut [&mut LayerCache], usize),
        raw: NsaNew,
        phi: [&ops::Phi; 2],
    ) -> Result<Tensor> {
        let config = self.config();
        let blocks = LayerCache::compress(caches, sequence, config, [raw.k_cmp, raw.v_cmp], phi)?;
        let k_cmp = tape.leaf(blocks.k);
        let k_cmp = self.rotate(tape, k_cmp, &blocks.starts)?;
        let new = NsaNew { k_cmp: k_cmp.value(), v_cmp: &blocks.v, ..raw };
        LayerCache::extend_nsa(caches, sequence, config, &new, &blocks.counts)
    }

    /// Of each NSA layer, what its φ of keys and of values add whatever the block.
    pub(crate) fn shifts(&self) -> Result<Vec<[Option<Tensor>; 2]>> {
        let tape = &Tape::inference();
        let shift = |slots: &PhiSlots| ops::compress_shift(&self.phi(tape, slots));
        let of = |layer: &LayerSlots| match &layer.attention {
            AttentionSlots::Nsa(nsa) => Ok([shift(&nsa.phi_k)?, shift(&nsa.phi_v)?]),
            AttentionSlots::Dense(_) => Ok([None, None]),
        };
        self.slots.layers.iter().map(of).collect()
    }

    fn phi(&self, tape: &Tape, slots: &PhiSlots) -> ops::Phi {
        let param = |slot: usize| self.param(tape, slot);
        match *slots {
            PhiSlots::Mean => ops::Phi::Mean,
            PhiSlots::Linear { weight, pe } => {
                ops::Phi::Linear { weight: param(weight), pe: param(pe) }
            }
            PhiSlots::Mlp { weight1, bias1, weight2, bias2, pe } => ops::Phi::Mlp {
                weight1: param(weight1),
                bias1: param(bias1),
                weight2: param(weight2),
                bias2: param(bias2),
                pe: param(pe),
            },
        }
    }
}
