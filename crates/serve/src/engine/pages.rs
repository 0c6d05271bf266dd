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

    pub fn total(&self) -> usize {
        self.total
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
