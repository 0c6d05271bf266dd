//! What sequences cost, and how much of it is left.
//!
//! A page is what [`PAGE`] tokens add to a sequence for good: their selected keys and values and
//! their share of the compressed ones (all layers), or the dense ones. What a sequence needs
//! whatever its length, the rings of its windows, is counted as whole pages too.

use tercet_model::ModelConfig;
use tercet_tensor::DType;

/// Tokens of a page.
pub(super) const PAGE: usize = 64;

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
