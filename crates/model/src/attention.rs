//! Attention of one layer: projections, positions, and the operator, over a whole batch or over
//! a cache.

use tercet_tensor::{Mask, Tape, Tensor, Var, ops};

use crate::cache::{LayerCache, NsaNew};
use crate::decoder::Site;
use crate::layout::{AttentionSlots, DenseSlots, KvSlots, LinearSlots, NsaSlots, PhiSlots};
use crate::{Model, Result};

impl Model {
    /// Normed x `[T, C]` to the output projection `[T, C]`.
    pub(crate) fn attention(&self, tape: &mut Tape, x: &Var, site: Site) -> Result<Var> {
        let slots = &self.slots.layers[site.layer];
        let dims = self.config().dims();
        let dropout = site.dropout;
        let q = self.heads(tape, &slots.q, x, [dims.heads, dims.key_dim], dropout)?;
        let out = match &slots.attention {
            AttentionSlots::Dense(dense) => self.dense(tape, dense, q, x, site)?,
            AttentionSlots::Nsa(nsa) => self.nsa(tape, nsa, q, x, site)?,
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

    fn keys_values(
        &self,
        tape: &mut Tape,
        slots: &KvSlots,
        x: &Var,
        dropout: Option<u64>,
    ) -> Result<(Var, Var)> {
        let dims = self.config().dims();
        let k = self.heads(tape, &slots.k, x, [dims.kv_heads, dims.key_dim], dropout)?;
        let v = self.heads(tape, &slots.v, x, [dims.kv_heads, dims.value_dim], dropout)?;
        Ok((k, v))
    }

    /// Rotates heads at `positions`; learned positions were added to the embedding instead.
    pub(crate) fn rotate(&self, tape: &mut Tape, x: Var, positions: &Tensor) -> Result<Var> {
        match &self.rope {
            None => Ok(x),
            Some(table) => Ok(ops::rope(tape, &x, positions, table)?),
        }
    }

    fn dense(
        &self,
        tape: &mut Tape,
        slots: &DenseSlots,
        mut q: Var,
        x: &Var,
        site: Site,
    ) -> Result<Var> {
        let (mut k, v) = self.keys_values(tape, &slots.kv, x, site.dropout)?;
        if let Some((q_norm, k_norm)) = slots.qk_norm {
            let eps = self.config().norm_eps as f32;
            let (q_norm, k_norm) = (self.param(tape, q_norm), self.param(tape, k_norm));
            q = ops::rms_norm(tape, &q, &q_norm, eps)?;
            k = ops::rms_norm(tape, &k, &k_norm, eps)?;
        }
        let positions = &site.inputs.positions;
        let q = self.rotate(tape, q, positions)?;
        let k = self.rotate(tape, k, positions)?;
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
    fn nsa(&self, tape: &mut Tape, slots: &NsaSlots, q: Var, x: &Var, site: Site) -> Result<Var> {
        let (inputs, spec) = (site.inputs, &slots.spec);
        let q = self.rotate(tape, q, &inputs.positions)?;
        let (k_raw, v_raw) = self.keys_values(tape, &slots.cmp, x, site.dropout)?;
        let (k_slc, v_slc) = self.keys_values(tape, &slots.slc, x, site.dropout)?;
        let (k_win, v_win) = self.keys_values(tape, &slots.win, x, site.dropout)?;
        let k_slc = self.rotate(tape, k_slc, &inputs.positions)?;
        let k_win = self.rotate(tape, k_win, &inputs.positions)?;
        let gate = self.linear(tape, &slots.gate, x, site.dropout)?;
        let heads = self.config().num_attention_heads;
        let gate = ops::sigmoid(tape, &gate)?.reshape(&[x.shape()[0], heads, 3])?;
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
            let out = self.step_nsa(tape, cache, &NsaNew::of(new), phi, places)?;
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
