//! The shape of native sparse attention: block sizes, counts and the window.
//!
//! Names follow the paper (arXiv 2502.11089): `compress_block` is l, `compress_stride` d,
//! `select_block` l', `select_count` n and `window` w.

use serde::{Deserialize, Serialize};

/// Largest block or count a spec may name; keeps every product of two of them far inside 64 bits.
const LARGEST: usize = 1 << 24;

/// Most blocks a query may select; the list of choices is this long for every token.
const MOST_SELECTED: usize = 4096;

/// How a block of `compress_block` tokens becomes one key (and one value): φ of Eq. 7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compressor {
    /// The average of the block's tokens; no parameters.
    #[default]
    Mean,
    /// One matrix per KV head over the flattened block, with an intra-block position encoding.
    Linear,
    /// Two layers with a GELU between them, with an intra-block position encoding.
    Mlp,
}

/// A native-sparse-attention specification. Defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NsaSpec {
    /// Tokens in one compressed block (l).
    pub compress_block: usize,
    /// Tokens between the starts of neighbouring compressed blocks (d).
    pub compress_stride: usize,
    /// Tokens in one selection block (l').
    pub select_block: usize,
    /// Selected blocks per query and KV head, the forced ones included (n).
    pub select_count: usize,
    /// Blocks at the start of the sequence that are always selected.
    pub select_initial: usize,
    /// Blocks ending with the query's own that are always selected.
    pub select_local: usize,
    /// Keys the window branch sees, the query's own included (w).
    pub window: usize,
    /// How blocks are compressed (φ).
    pub compressor: Compressor,
}

impl Default for NsaSpec {
    fn default() -> Self {
        Self {
            compress_block: 32,
            compress_stride: 16,
            select_block: 64,
            select_count: 16,
            select_initial: 1,
            select_local: 2,
            window: 512,
            compressor: Compressor::Mean,
        }
    }
}

/// A field of [`NsaSpec`] that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nsa spec: {field} = {value} {rule}")]
pub struct SpecError {
    /// The field's name.
    pub field: &'static str,
    /// Its value.
    pub value: usize,
    /// The rule it breaks, worded to follow the value.
    pub rule: String,
}

impl NsaSpec {
    /// Checks every rule; the error names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), SpecError> {
        let Self { compress_block, compress_stride, select_block, select_count, .. } = *self;
        let fail = |field, value, rule: String| Err(SpecError { field, value, rule });
        for (field, value) in [
            ("compress_block", compress_block),
            ("compress_stride", compress_stride),
            ("select_block", select_block),
            ("select_count", select_count),
            ("window", self.window),
        ] {
            if value == 0 {
                return fail(field, value, "must be at least 1".into());
            }
        }
        for (field, value) in [
            ("compress_block", compress_block),
            ("select_block", select_block),
            ("select_initial", self.select_initial),
            ("select_local", self.select_local),
        ] {
            if value > LARGEST {
                return fail(field, value, format!("must be at most {LARGEST}"));
            }
        }
        if select_count > MOST_SELECTED {
            let rule = format!("must be at most {MOST_SELECTED}");
            return fail("select_count", select_count, rule);
        }
        if !compress_block.is_multiple_of(compress_stride) {
            let rule = format!("must divide compress_block = {compress_block}");
            return fail("compress_stride", compress_stride, rule);
        }
        if !select_block.is_multiple_of(compress_stride) {
            let rule = format!("must divide select_block = {select_block}");
            return fail("compress_stride", compress_stride, rule);
        }
        if compress_block > select_block {
            let rule = format!("must be at most select_block = {select_block}");
            return fail("compress_block", compress_block, rule);
        }
        if self.select_initial + self.select_local > select_count {
            let rule = format!(
                "must be at least select_initial + select_local = {} + {}",
                self.select_initial, self.select_local
            );
            return fail("select_count", select_count, rule);
        }
        Ok(())
    }

    /// Compressed blocks of a sequence of `len` tokens; a tail shorter than l is dropped.
    pub fn compressed_blocks(&self, len: usize) -> usize {
        if len < self.compress_block {
            0
        } else {
            (len - self.compress_block) / self.compress_stride + 1
        }
    }

    /// Selection blocks of a sequence of `len` tokens; the last may be partial.
    pub fn selection_blocks(&self, len: usize) -> usize {
        len.div_ceil(self.select_block)
    }

    /// Compressed blocks visible to position `p` (0-based): those with i·d + l ≤ p + 1.
    pub fn visible_compressed(&self, p: usize) -> usize {
        self.compressed_blocks(p + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(change: impl Fn(&mut NsaSpec)) -> SpecError {
        let mut spec = NsaSpec::default();
        change(&mut spec);
        spec.validate().expect_err("the spec should be refused")
    }

    #[test]
    fn the_default_is_the_papers_and_valid() {
        let spec = NsaSpec::default();
        spec.validate().unwrap();
        assert_eq!((spec.compress_block, spec.compress_stride), (32, 16));
        assert_eq!((spec.select_block, spec.select_count, spec.window), (64, 16, 512));
    }

    #[test]
    fn errors_name_field_value_and_rule() {
        assert_eq!(
            broken(|s| s.compress_stride = 7).to_string(),
            "nsa spec: compress_stride = 7 must divide compress_block = 32"
        );
        assert_eq!(broken(|s| s.compress_block = 128).field, "compress_block");
        assert_eq!(broken(|s| s.select_count = 1 << 20).field, "select_count");
        assert_eq!(broken(|s| s.select_count = 2).field, "select_count");
        assert_eq!(broken(|s| s.window = 0).field, "window");
        assert_eq!(broken(|s| s.select_local = usize::MAX).field, "select_local");
        assert_eq!(broken(|s| s.select_block = 72).field, "compress_stride");
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<NsaSpec>(r#"{"windwo": 3}"#).is_err());
    }

    #[test]
    fn compressed_counts_follow_the_visibility_rule() {
        let spec = NsaSpec::default();
        let by_rule = |p: usize| (0..).take_while(|i| i * 16 + 32 <= p + 1).count();
        for p in 0..200 {
            assert_eq!(spec.visible_compressed(p), by_rule(p), "p = {p}");
        }
        assert_eq!(spec.compressed_blocks(0), 0);
    }
}
