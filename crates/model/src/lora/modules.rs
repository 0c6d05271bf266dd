//! The modules of a model that may carry an adapter, under the names they have in its files.

use crate::config::{Family, ModelConfig};
use crate::layout::{AttentionSlots, DecoderSlots, FeedForwardSlots, LinearSlots, ParamSpec};
use crate::stored::Stored;
use crate::{Error, Model, Result};

/// How many tensors that do not fit an error names.
const NAMED: usize = 4;

/// A linear of the file: one of the decoder's, or, as GPT-2's `c_attn`, three with one input.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// Its dotted name.
    pub name: String,
    /// Slots of the base's weights, each `[outputs / weights.len(), inputs]`.
    pub weights: Vec<usize>,
    pub inputs: usize,
    pub outputs: usize,
}

/// A module of products that takes no adapter.
pub(super) struct Refused {
    pub name: String,
    pub what: &'static str,
}

/// The linears of a decoder, in its order.
fn linears(slots: &DecoderSlots) -> Vec<LinearSlots> {
    let mut all = Vec::new();
    for layer in &slots.layers {
        all.push(layer.q);
        match &layer.attention {
            AttentionSlots::Dense(dense) => all.extend([dense.kv.k, dense.kv.v]),
            AttentionSlots::Nsa(nsa) => {
                all.extend([nsa.cmp, nsa.slc, nsa.win].iter().flat_map(|kv| [kv.k, kv.v]));
                all.push(nsa.gate);
            }
        }
        all.push(layer.o);
        match &layer.feed_forward {
            FeedForwardSlots::SwiGlu(mlp) => all.extend([mlp.gate, mlp.up, mlp.down]),
            FeedForwardSlots::Gelu { up, down, .. } => all.extend([*up, *down]),
            FeedForwardSlots::Moe { shared, .. } => {
                all.extend(shared.iter().flat_map(|mlp| [mlp.gate, mlp.up, mlp.down]));
            }
        }
    }
    all
}

/// A model's weights by name and shape, which its configuration says.
pub(super) struct Plan<'a> {
    config: &'a ModelConfig,
    slots: &'a DecoderSlots,
    specs: &'a [ParamSpec],
}

impl<'a> Plan<'a> {
    pub fn of(model: &'a Model) -> Self {
        Self { config: model.config(), slots: &model.slots, specs: model.params().specs() }
    }

    pub fn new(
        config: &'a ModelConfig,
        (slots, specs): (&'a DecoderSlots, &'a [ParamSpec]),
    ) -> Self {
        Self { config, slots, specs }
    }

    /// The name of the module that a weight stands in, in the file.
    fn name(&self, weight: usize) -> String {
        let stored = Stored::of(self.config, &self.specs[weight].name).name;
        stored.strip_suffix(".weight").unwrap_or(&stored).to_owned()
    }
}

/// What may carry an adapter.
pub(super) fn modules(plan: &Plan) -> Vec<Module> {
    let mut all: Vec<Module> = Vec::new();
    for LinearSlots { weight, .. } in linears(plan.slots) {
        let name = plan.name(weight);
        let shape = &plan.specs[weight].shape;
        match all.last_mut() {
            Some(fused) if fused.name == name => {
                fused.weights.push(weight);
                fused.outputs += shape[0];
            }
            _ => {
                let (outputs, inputs) = (shape[0], shape[1]);
                all.push(Module { name, weights: vec![weight], inputs, outputs });
            }
        }
    }
    all
}

/// What multiplies too and may not.
pub(super) fn refused(plan: &Plan) -> Vec<Refused> {
    let slots = plan.slots;
    let refuse = |weight, what| Refused { name: plan.name(weight), what };
    let mut all = vec![refuse(slots.embed, "the embedding")];
    all.extend(slots.positions.map(|slot| refuse(slot, "the table of positions")));
    all.push(Refused { name: "lm_head".into(), what: "the output head" });
    for layer in &slots.layers {
        let FeedForwardSlots::Moe { router, experts, .. } = &layer.feed_forward else { continue };
        all.push(refuse(*router, "a router"));
        for expert in experts {
            let weights = [expert.gate, expert.up, expert.down];
            all.extend(weights.map(|linear| refuse(linear.weight, "a routed expert")));
        }
    }
    all
}

/// Whether the family's files hold transposed matrices.
pub(super) fn transposed(model: &Model) -> bool {
    model.config().model_type == Family::Gpt2
}

/// Refuses tensors that are not those of an adapter of rank `r` for `modules`: module names with
/// the shapes of their A and B.
pub(super) fn refuse_misfits<'a>(
    modules: &[Module],
    r: usize,
    found: impl Iterator<Item = (&'a str, [&'a [usize]; 2])>,
) -> Result<()> {
    let mut wrong = Vec::new();
    for (name, shapes) in found {
        let Some(module) = modules.iter().find(|module| module.name == name) else {
            wrong.push(format!("{name} is no linear of this model that takes an adapter"));
            continue;
        };
        let expected = [[r, module.inputs], [module.outputs, r]];
        for ((which, got), expected) in ["A", "B"].iter().zip(shapes).zip(expected) {
            if got != expected {
                wrong.push(format!("{name}.lora_{which}.weight is {got:?}, expected {expected:?}"));
            }
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let more = match wrong.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("; and {more} more do not fit"),
    };
    wrong.truncate(NAMED);
    Err(Error::Adapter(format!(
        "it was made for another base, or with another r than {r}: {}{more}",
        wrong.join("; ")
    )))
}
