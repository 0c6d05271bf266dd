//! What sequences cost, and how much of it is left.
//!
//! A page is what [`PAGE`] tokens add to a sequence for good: their selected keys and values and
//! their share of the compressed ones (all layers), or the dense ones. What a sequence needs
//! whatever its length, the rings of its windows, is counted as whole pages too; but a GPU has it
//! reserved for every place, and what is left is pages.

use tercet_model::ModelConfig;
use tercet_tensor::DType;

use super::handle::Limits;

pub(super) use tercet_model::slots::PAGE;

/// Beginnings of prompts that may be kept, if there are pages for them.
const KEPT: usize = 64;

/// The price of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Costs {
    /// Bytes that one more token costs in the long run.
    pub bytes_per_token: f64,
    /// Bytes of a page.
    pub page_bytes: usize,
    /// Pages that stand for the rings.
    pub fixed: usize,
    /// Whether more tokens need more pages; not where every layer has a window.
    grows: bool,
}

impl Costs {
    /// As [`ModelConfig::cache_bytes`] counts them, which is what `tercet plan` prints.
    pub fn new(config: &ModelConfig, stored: DType) -> Self {
        // From here on every window is full, and a whole number of compressed blocks is added.
        let stride = config.nsa.as_ref().map_or(1, |spec| spec.compress_stride);
        let windows = (0..config.num_hidden_layers).filter_map(|layer| match &config.nsa {
            Some(spec) => Some(spec.window.max(spec.compress_block)),
            None => config.window(layer),
        });
        let full = windows.max().unwrap_or(0).min(config.max_position_embeddings);
        let more = PAGE.saturating_mul(stride);
        let bytes = |tokens: usize| config.cache_bytes(tokens, stored);
        let added = bytes(full.saturating_add(more)) - bytes(full);
        let bytes_per_token = added as f64 / more as f64;
        let rings = (bytes(full) as f64 - bytes_per_token * full as f64).max(0.0).ceil() as usize;
        if added == 0 {
            return Self { bytes_per_token, page_bytes: rings.max(1), fixed: 1, grows: false };
        }
        let page_bytes = (bytes_per_token * PAGE as f64).ceil() as usize;
        Self { bytes_per_token, page_bytes, fixed: rings.div_ceil(page_bytes), grows: true }
    }

    /// Pages of a sequence of `tokens`.
    pub fn pages(&self, tokens: usize) -> usize {
        self.fixed + if self.grows { tokens.div_ceil(PAGE) } else { 0 }
    }

    /// Tokens of a sequence that has `pages`; nothing when they do not hold the rings.
    pub fn tokens(&self, pages: usize) -> usize {
        match pages.checked_sub(self.fixed) {
            None => 0,
            Some(_) if !self.grows => usize::MAX,
            Some(pages) => pages.saturating_mul(PAGE),
        }
    }
}

/// How the memory is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Division {
    pub costs: Costs,
    /// Of running sequences and kept prefixes together.
    pub pages: usize,
    /// Places of running sequences.
    pub running: usize,
    /// Places of kept prefixes.
    pub kept: usize,
    /// Tokens of prompt and answer.
    pub context: usize,
    /// Bytes that places take whatever they hold.
    pub reserved: usize,
}

impl Division {
    /// Where a place takes memory as it is filled.
    pub fn as_filled(config: &ModelConfig, stored: DType, limits: &Limits) -> Self {
        let costs = Costs::new(config, stored);
        let pages = limits.cache_bytes / costs.page_bytes;
        let (running, kept) = (limits.running, limits.kept());
        let context = limits.longest(config).min(costs.tokens(pages));
        Self { costs, pages, running, kept, context, reserved: 0 }
    }

    /// Where all memory is taken at once: what every place has whatever it holds, of which there
    /// are fewer than asked for when that would be more than half of it, and pages. What
    /// [`ModelConfig::slots_bytes`] counts of these places and pages is at most the limit.
    pub fn reserved(config: &ModelConfig, stored: DType, limits: &Limits) -> Self {
        let longest = limits.longest(config);
        let costs = Costs::new(config, stored);
        let bytes = |places: usize, pages: usize| {
            let bytes = config.slots_bytes([places, longest], pages, stored);
            usize::try_from(bytes).unwrap_or(usize::MAX)
        };
        // A place has its rings, and only pages are left to be counted.
        let costs = match costs.grows {
            true => Costs { fixed: 0, ..costs },
            false => Costs { page_bytes: bytes(1, 0).max(1), ..costs },
        };
        let most = if costs.grows { limits.cache_bytes / 2 } else { limits.cache_bytes };
        let (running, kept) = (limits.running, limits.kept());
        let fits = |&places: &usize| places == 1 || bytes(places, 0) <= most;
        let places = (1..=running + kept).rev().find(fits).unwrap_or(1);
        let kept = if places < running + kept { kept.min(places / 4) } else { kept };
        let running = running.min(places - kept);
        let places = running + kept;
        let pages = if costs.grows {
            let left = limits.cache_bytes.saturating_sub(bytes(places, 0));
            let pages = (left / costs.page_bytes).min(places * longest.div_ceil(PAGE));
            // One page of blocks may be only partly used.
            (0..=pages).rev().find(|&n| bytes(places, n) <= limits.cache_bytes).unwrap_or(0)
        } else {
            usize::from(bytes(1, 0) <= most) * places
        };
        let context = longest.min(costs.tokens(pages));
        let context = if pages == 0 { 0 } else { context };
        Self { costs, pages, running, kept, context, reserved: bytes(places, 0) }
    }
}

impl Limits {
    /// Beginnings of prompts that may be kept.
    fn kept(&self) -> usize {
        if self.prefix_cache { KEPT } else { 0 }
    }

    /// Tokens of prompt and answer, if there is memory for them.
    fn longest(&self, config: &ModelConfig) -> usize {
        config.max_position_embeddings.min(self.context.unwrap_or(usize::MAX))
    }
}

/// Pages by who holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pages {
    total: usize,
    used: usize,
    cached: usize,
}

impl Pages {
    pub fn new(total: usize) -> Self {
        Self { total, used: 0, cached: 0 }
    }

    /// Held by running sequences.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Held by kept prefixes.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Held by nobody.
    pub fn free(&self) -> usize {
        self.total - self.used - self.cached
    }

    /// Takes pages for a sequence, all or none.
    #[must_use]
    pub fn take(&mut self, pages: usize) -> bool {
        let fits = pages <= self.free();
        if fits {
            self.used += pages;
        }
        fits
    }

    /// Takes pages for a kept prefix, all or none.
    #[must_use]
    pub fn keep(&mut self, pages: usize) -> bool {
        let fits = pages <= self.free();
        if fits {
            self.cached += pages;
        }
        fits
    }

    /// Gives a sequence's pages back.
    pub fn give(&mut self, pages: usize) {
        debug_assert!(pages <= self.used, "{pages} of {self:?}");
        self.used = self.used.saturating_sub(pages);
    }

    /// Gives a kept prefix's pages back.
    pub fn drop_kept(&mut self, pages: usize) {
        debug_assert!(pages <= self.cached, "{pages} of {self:?}");
        self.cached = self.cached.saturating_sub(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(fields: serde_json::Value) -> ModelConfig {
        let mut base = serde_json::json!({
            "model_type": "tercet", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 65536,
        });
        fields.as_object().unwrap().iter().for_each(|(k, v)| base[k] = v.clone());
        serde_json::from_value(base).unwrap()
    }

    fn kinds() -> Vec<ModelConfig> {
        let nsa = |block, stride, window| {
            config(serde_json::json!({ "v_head_dim": 4, "nsa": {
                "compress_block": block, "compress_stride": stride, "select_block": 64,
                "select_count": 16, "window": window,
            }}))
        };
        vec![
            nsa(32, 16, 512),
            nsa(8, 4, 12),
            nsa(64, 64, 4096),
            config(serde_json::json!({})),
            config(serde_json::json!({ "sliding_window": 100 })),
        ]
    }

    /// The budget is kept when no sequence needs more than its pages, and it is not wasted when
    /// they are at most the rings, one page, and what a ring lacks of its window, more.
    #[test]
    fn pages_hold_what_the_plan_counts() {
        for config in kinds() {
            for dtype in [DType::F32, DType::BF16] {
                let costs = Costs::new(&config, dtype);
                for tokens in (1..400).chain([511, 512, 513, 4096, 4097, 30_000, 65_536]) {
                    let have = (costs.pages(tokens) * costs.page_bytes) as u64;
                    let need = config.cache_bytes(tokens, dtype);
                    assert!(have >= need, "{tokens} tokens: {have} < {need}: {costs:?}");
                    if tokens >= 4096 {
                        let most = need + 3 * costs.page_bytes as u64;
                        assert!(have <= most, "{tokens} tokens: {have} > {most}: {costs:?}");
                    }
                    assert!(costs.tokens(costs.pages(tokens)) >= tokens);
                }
                assert_eq!(costs.tokens(costs.fixed.saturating_sub(1)), 0, "{costs:?}");
            }
        }
    }

    /// A CPU's caches are as large as what is paid for, but that the rings and the compressed keys
    /// are rounded up to 64 rows, a ring with 64 more: 128 rows a layer at most.
    #[test]
    fn a_cache_takes_what_was_paid_for() {
        for (config, rows) in kinds().into_iter().zip([128, 128, 128, 0, 128]) {
            let wide = serde_json::json!({ "head_dim": 32, "hidden_size": 128, "v_head_dim": 32 });
            let mut fields = serde_json::to_value(&config).unwrap();
            wide.as_object().unwrap().iter().for_each(|(k, v)| fields[k] = v.clone());
            let config: ModelConfig = serde_json::from_value(fields).unwrap();
            let costs = Costs::new(&config, DType::F32);
            let slack = config.num_hidden_layers * rows * 2 * (32 + 32) * size_of::<f32>();
            let model = tercet_model::Model::new(config, 1, DType::F32).unwrap();
            let mut slots = model.slots(1, 3000).unwrap();
            for chunk in [1, 63, 1, 64, 300, 571, 1000] {
                slots.read(&model, 0, &vec![5; chunk]).unwrap();
                let (have, paid) = (slots.bytes(), costs.pages(slots.len(0)) * costs.page_bytes);
                assert!(have <= paid + slack, "{}: {have} > {paid} + {slack}", slots.len(0));
            }
        }
    }

    #[test]
    fn bytes_per_token_are_those_of_the_plan() {
        for config in kinds() {
            let costs = Costs::new(&config, DType::BF16);
            let [short, long] =
                [8192, 65_536].map(|tokens| config.cache_bytes(tokens, DType::BF16));
            // Both are whole numbers of compressed blocks after full windows.
            assert_eq!(costs.bytes_per_token, (long - short) as f64 / (65_536 - 8192) as f64);
        }
        // By hand: 3 layers of 2 heads of 8 + 4 numbers, once a token and once a stride of 16.
        let costs = Costs::new(&kinds()[0], DType::F32);
        assert_eq!(costs.bytes_per_token, (3 * 2 * 12 * 4) as f64 * (1.0 + 1.0 / 16.0));
    }

    /// What a GPU is asked for is never more than it may be, and little less where sequences are
    /// long enough to use it; whatever the scheduler lets in then has its pages.
    #[test]
    fn a_division_keeps_to_its_limit_and_wastes_little() {
        for config in kinds() {
            for gib in [0.001, 0.01, 0.1, 1.0] {
                for (running, prefix_cache) in [(1, false), (8, true), (512, true)] {
                    let cache_bytes = (gib * f64::from(1 << 30)) as usize;
                    let limits = Limits { running, prefix_cache, cache_bytes, ..Limits::default() };
                    let own = Division::reserved(&config, DType::BF16, &limits);
                    let Division { costs, pages, running, kept, context, .. } = own;
                    if pages == 0 {
                        assert_eq!(context, 0);
                        continue;
                    }
                    let shape = [running + kept, 65_536];
                    let pool = if costs.grows { pages } else { 1 };
                    let bytes = config.slots_bytes(shape, pool, DType::BF16) as usize;
                    assert!(bytes <= cache_bytes, "{bytes} of {cache_bytes}: {own:?}");
                    let full = !costs.grows || pages == (running + kept) * (65_536 / PAGE);
                    let wasted = cache_bytes - bytes;
                    let more = if costs.grows { 3 } else { 1 } * costs.page_bytes;
                    assert!(
                        full && running == limits.running || wasted < more + cache_bytes / 8,
                        "{wasted} of {cache_bytes}: {own:?}"
                    );
                    assert!(context <= costs.tokens(pages) && running >= 1);
                    assert_eq!(costs.pages(1), 1, "rings are paid for");
                }
            }
        }
    }

    #[test]
    fn many_more_places_than_whole_contexts_fit() {
        let nsa = &kinds()[0];
        let limits = Limits { cache_bytes: 64 << 20, ..Limits::default() };
        let own = Division::reserved(nsa, DType::BF16, &limits);
        assert_eq!((own.running, own.kept), (64, 64));
        assert!(own.pages < 5 * own.costs.pages(65_536), "five contexts, {own:?}");
        assert!(own.reserved < limits.cache_bytes / 2);
    }

    #[test]
    fn pages_are_taken_whole_or_not_at_all() {
        let mut pages = Pages::new(10);
        assert!(pages.take(6) && pages.keep(3));
        assert!(!pages.take(2) && !pages.keep(2));
        assert_eq!((pages.used(), pages.cached(), pages.free()), (6, 3, 1));
        pages.drop_kept(3);
        pages.give(6);
        assert_eq!(pages, Pages::new(10));
    }
}
