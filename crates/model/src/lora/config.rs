//! What an adapter is to be, and which modules it is for.

use serde::{Deserialize, Serialize};

use super::modules::{self, Module, Plan, Refused};
use crate::config::ModelConfig;
use crate::layout::layout;
use crate::{Error, Result};

/// The target that stands for every linear of the decoder but the output head, routers and routed
/// experts.
pub(super) const ALL_LINEAR: &str = "all-linear";

/// Shape and targets of a LoRA adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank: rows of A and columns of B.
    pub r: usize,
    /// Numerator α of the update's scale.
    pub alpha: f64,
    /// Share of the inputs of A that is dropped in training, from 0, below 1.
    pub dropout: f64,
    /// Modules, as PEFT's `target_modules`: one whose dotted name (that of the file: `c_attn` in
    /// GPT-2) is the target or ends with a dot and it; with `*`, one whose whole name is like that;
    /// `all-linear` means every linear of the decoder but the output head, routers and routed
    /// experts.
    pub targets: Vec<String>,
    /// Scale by `α/√r` (rank-stabilized LoRA, arXiv 2312.03732) and not by `α/r`.
    pub rslora: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        let targets = vec![ALL_LINEAR.to_owned()];
        Self { r: 16, alpha: 32.0, dropout: 0.0, targets, rslora: false }
    }
}

impl LoraConfig {
    /// What the update is multiplied by: `α/r`, or `α/√r`.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }

    /// Refuses numbers out of range and an empty list of targets.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Adapter(text));
        if self.r == 0 {
            return fail("r is 0; a rank is at least 1".into());
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return fail(format!("alpha is {}, expected a number above 0", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail(format!(
                "dropout is {}, expected a number from 0 that is below 1",
                self.dropout
            ));
        }
        if self.targets.is_empty() {
            return fail("there is no target; name modules, or \"all-linear\"".into());
        }
        Ok(())
    }

    /// Refuses what could be no adapter for models of a configuration, such as a target that means
    /// none of their modules; nothing of a model is needed.
    ///
    /// # Errors
    /// [`Error::Adapter`].
    pub fn check_for(&self, model: &ModelConfig) -> Result<()> {
        self.validate()?;
        let (slots, specs) = layout(model);
        let plan = Plan::new(model, (&slots, &specs));
        self.choose(&modules::modules(&plan), &modules::refused(&plan)).map(drop)
    }

    /// The modules that the targets mean, in the decoder's order. A target that means none, or one
    /// that takes no adapter, is an error.
    pub(super) fn choose<'m>(
        &self,
        modules: &'m [Module],
        refused: &[Refused],
    ) -> Result<Vec<&'m Module>> {
        let mut chosen = vec![false; modules.len()];
        for target in &self.targets {
            if target == ALL_LINEAR {
                chosen.fill(true);
                continue;
            }
            if let Some(module) = refused.iter().find(|module| means(target, &module.name)) {
                return Err(Error::Adapter(format!(
                    "the target {target:?} means {} too, {}, which takes no adapter here; give more \
                     of the names of those you mean, such as {:?}",
                    module.name,
                    module.what,
                    modules.first().map_or("", |module| module.name.as_str()),
                )));
            }
            let mut found = false;
            for (chosen, module) in chosen.iter_mut().zip(modules) {
                if means(target, &module.name) {
                    (*chosen, found) = (true, true);
                }
            }
            if !found {
                let mut ends: Vec<&str> = Vec::new();
                for module in modules {
                    let end = module.name.rsplit('.').next().unwrap_or_default();
                    if !ends.contains(&end) {
                        ends.push(end);
                    }
                }
                return Err(Error::Adapter(format!(
                    "the target {target:?} means no module of this model; its linears are {}",
                    ends.join(", ")
                )));
            }
        }
        Ok(modules.iter().zip(chosen).filter_map(|(module, is)| is.then_some(module)).collect())
    }
}

/// Whether a target means the module of a dotted name.
pub(super) fn means(target: &str, name: &str) -> bool {
    if target.contains('*') {
        return is_like(target, name);
    }
    name == target
        || name.strip_suffix(target).is_some_and(|rest| !target.is_empty() && rest.ends_with('.'))
}

/// Whether a whole name fits a pattern in which `*` stands for any text.
fn is_like(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        // The first place leaves the most for the parts that follow.
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_means_whole_components_and_a_star_any_text() {
        let name = "model.layers.11.self_attn.q_proj";
        for target in
            ["q_proj", "self_attn.q_proj", name, "*q_proj", "model.*.1*.q_proj", "*", "**", "m*j"]
        {
            assert!(means(target, name), "{target}");
        }
        for target in
            ["proj", "_proj", "", ".q_proj", "q_pro", "self_attn", "*.1.*", "*q_pro", "x*", "*o*m*"]
        {
            assert!(!means(target, name), "{target}");
        }
    }

    #[test]
    fn the_scale_is_that_of_the_papers() {
        let config = LoraConfig { r: 4, alpha: 6.0, ..LoraConfig::default() };
        assert_eq!(config.scale(), 1.5);
        assert_eq!(LoraConfig { rslora: true, ..config }.scale(), 3.0);
    }
}
