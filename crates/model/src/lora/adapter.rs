//! One adapter: its tensors, and what they add to a product.

use rayon::prelude::*;
use tercet_tensor::{Tape, Tensor, Var, ops};

use super::config::LoraConfig;
use super::modules::{self, Module};
use crate::init::fresh;
use crate::layout::{Init, ParamSpec};
use crate::params::Params;
use crate::{Error, Model, Result};

/// A LoRA adapter: its configuration and its tensors, for a base of certain shapes. Clones share
/// the tensors until one side writes.
///
/// A module M of the base gives the parameters `M.lora_A.weight` `[r, in]` and `M.lora_B.weight`
/// `[out, r]`; GPT-2's fused `c_attn`, whose q, k and v share one A, gives `M.lora_B.0.weight`,
/// `.1` and `.2`, each `[out/3, r]`.
#[derive(Clone, Debug)]
pub struct Adapter {
    pub(super) config: LoraConfig,
    pub(crate) params: Params,
    pub(super) modules: Vec<Adapted>,
    /// The base's matrices are transposed in its file: what PEFT calls `fan_in_fan_out`.
    pub(super) transposed: bool,
    /// By slot of a base's weight; filled when a model takes the adapter.
    places: Vec<Option<Place>>,
}

/// A module with its parameters: A, and one B for each weight it stands for.
#[derive(Clone, Debug)]
pub(super) struct Adapted {
    pub name: String,
    pub a: usize,
    pub b: Vec<usize>,
}

/// Slots of the parameters that belong to one weight of the base.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub a: usize,
    pub b: usize,
}

impl Adapter {
    /// A fresh adapter for a model, in its storage type and on its device: B is zero, so that it
    /// changes nothing yet, and A uniform within ±1/√in, which is PEFT's start (Kaiming with
    /// a = √5). The same seed gives the same bits.
    pub fn new(model: &Model, config: LoraConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        let modules = modules::modules(&modules::Plan::of(model));
        let chosen = config.choose(&modules, &modules::refused(&modules::Plan::of(model)))?;
        let most = chosen.iter().map(|m| m.inputs.min(m.outputs)).max().unwrap_or(0);
        if config.r > most {
            return Err(Error::Adapter(format!(
                "r is {}, but no update of these modules has a rank above {most}; choose a smaller r",
                config.r
            )));
        }
        let specs = specs(&chosen, config.r);
        let dtype = model.params().dtype();
        let tensors: Result<Vec<Tensor>> =
            specs.par_iter().map(|spec| fresh(spec, seed, dtype)).collect();
        let mut adapter = Self::assemble(config, &chosen, Params::new(specs, tensors?), model);
        adapter.params.move_to(&model.device())?;
        Ok(adapter)
    }

    /// Params in the order of [`specs`].
    pub(super) fn assemble(
        config: LoraConfig,
        chosen: &[&Module],
        params: Params,
        model: &Model,
    ) -> Self {
        let mut next = 0;
        let adapted = chosen.iter().map(|module| {
            let a = next;
            let b: Vec<usize> = (a + 1..=a + module.weights.len()).collect();
            next += 1 + b.len();
            Adapted { name: module.name.clone(), a, b }
        });
        let modules = adapted.collect();
        let transposed = modules::transposed(model);
        Self { config, params, modules, transposed, places: Vec::new() }
    }

    /// Rank, scale, dropout and targets.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The tensors by name and slot.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Dotted names of the base's modules that are adapted, as in its file.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|module| module.name.as_str())
    }

    /// The slots of each module's parameters, A before its Bs, with the module's name: what changes
    /// one product, and is measured and clipped together where persons' gradients are.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.modules.iter().map(|module| {
            let slots = std::iter::once(module.a).chain(module.b.iter().copied());
            (module.name.as_str(), slots.collect())
        })
    }

    /// Checks that the adapter fits a model, takes its storage type and device, and finds its
    /// weights.
    pub(super) fn seat(&mut self, model: &Model) -> Result<()> {
        let modules = modules::modules(&modules::Plan::of(model));
        let shapes: Vec<[Vec<usize>; 2]> = self.modules.iter().map(|m| self.shapes(m)).collect();
        let found = self.modules.iter().zip(&shapes);
        let found = found.map(|(module, [a, b])| (module.name.as_str(), [&a[..], &b[..]]));
        modules::refuse_misfits(&modules, self.config.r, found)?;
        let dtype = model.params().dtype();
        for tensor in self.params.tensors_mut() {
            *tensor = tensor.to_dtype(dtype)?;
        }
        self.params.move_to(&model.device())?;
        self.places = vec![None; model.params().len()];
        for adapted in &self.modules {
            let Some(module) = modules.iter().find(|m| m.name == adapted.name) else { continue };
            for (&weight, &b) in module.weights.iter().zip(&adapted.b) {
                self.places[weight] = Some(Place { a: adapted.a, b });
            }
        }
        Ok(())
    }

    /// The shapes of a module's A and of its B, as they stand in a file.
    pub(super) fn shapes(&self, module: &Adapted) -> [Vec<usize>; 2] {
        let shape = |slot: usize| self.params.tensor(slot).shape();
        let outputs = module.b.iter().map(|&b| shape(b)[0]).sum();
        [shape(module.a).to_vec(), vec![outputs, self.config.r]]
    }

    /// Where the parameters for a weight of the base are.
    pub(super) fn place(&self, weight: usize) -> Option<Place> {
        self.places.get(weight).copied().flatten()
    }

    /// All weights of the base that are adapted, and where.
    pub(super) fn seats(&self) -> impl Iterator<Item = (usize, Place)> {
        let place = |(weight, place): (usize, &Option<Place>)| Some((weight, (*place)?));
        self.places.iter().enumerate().filter_map(place)
    }

    /// `s·(dropout(x)·Aᵀ)·Bᵀ`.
    pub(crate) fn update(
        &self,
        tape: &mut Tape,
        place: Place,
        x: &Var,
        dropout: Option<u64>,
    ) -> Result<Var> {
        let [a, b] =
            [place.a, place.b].map(|slot| tape.param(self.params.tensor(slot).clone(), slot));
        let hidden = match dropout {
            None => ops::linear(tape, x, &a, None)?,
            Some(seed) => {
                let seed = site_seed(seed, place.a);
                let x = ops::dropout(tape, x, self.config.dropout, seed)?;
                ops::linear(tape, &x, &a, None)?
            }
        };
        // The thin side is the cheap one to scale.
        let hidden = ops::scale(tape, &hidden, self.config.scale() as f32)?;
        Ok(ops::linear(tape, &hidden, &b, None)?)
    }
}

/// A seed for each A, so that modules drop independently; the op mixes it.
fn site_seed(seed: u64, slot: usize) -> u64 {
    seed.rotate_left(32) ^ slot as u64
}

/// The parameters of an adapter: for each module A, then its Bs.
pub(super) fn specs(chosen: &[&Module], r: usize) -> Vec<ParamSpec> {
    let mut all = Vec::new();
    for module in chosen {
        let mut add = |name: &str, shape: [usize; 2], init| {
            let name = format!("{}.{name}.weight", module.name);
            all.push(ParamSpec { name, shape: shape.to_vec(), init });
        };
        let bound = 1.0 / (module.inputs as f64).sqrt();
        add("lora_A", [r, module.inputs], Init::Uniform(bound));
        match module.weights.len() {
            1 => add("lora_B", [module.outputs, r], Init::Zeros),
            parts => {
                for part in 0..parts {
                    add(&format!("lora_B.{part}"), [module.outputs / parts, r], Init::Zeros);
                }
            }
        }
    }
    all
}
