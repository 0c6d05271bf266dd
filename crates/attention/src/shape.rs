//! Head counts, sequence offsets, and the checks every entry point makes first.

use std::ops::Range;

use crate::{Error, NsaSpec, Result};

/// Most query heads; keeps products with any dimension far inside 64 bits.
const MAX_HEADS: usize = 1 << 16;

/// Largest key or value dimension.
pub const MAX_HEAD_DIM: usize = 256;

/// Heads and their dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Query heads (H).
    pub heads: usize,
    /// Key/value heads (K); divides H.
    pub kv_heads: usize,
    /// Key dimension (D), 1 to [`MAX_HEAD_DIM`].
    pub key_dim: usize,
    /// Value dimension (V), 1 to [`MAX_HEAD_DIM`].
    pub value_dim: usize,
}

impl Dims {
    /// Query heads per KV head (G).
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The usual softmax scale, 1/√D.
    pub fn scale(&self) -> f32 {
        1.0 / (self.key_dim as f32).sqrt()
    }

    /// Checks counts and dimensions.
    pub fn validate(&self) -> Result<()> {
        let Self { heads, kv_heads, key_dim, value_dim } = *self;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::Dims(format!(
                "{heads} query heads cannot be shared by {kv_heads} key/value heads; \
                 the first must be a positive multiple of the second"
            )));
        }
        if heads > MAX_HEADS {
            return Err(Error::Dims(format!("{heads} query heads, expected at most {MAX_HEADS}")));
        }
        for (name, dim) in [("key", key_dim), ("value", value_dim)] {
            if dim == 0 || dim > MAX_HEAD_DIM {
                return Err(Error::Dims(format!(
                    "{name} dimension {dim} is outside 1..={MAX_HEAD_DIM}"
                )));
            }
        }
        Ok(())
    }
}

/// The token range of each sequence. `cu_seqlens` holds B+1 offsets that start at 0, never
/// decrease and end at `tokens`; a sequence may be empty.
pub fn sequences(cu_seqlens: &[i32], tokens: usize) -> Result<Vec<Range<usize>>> {
    let fail = |text: String| Err(Error::CuSeqlens(text));
    let (Some(&first), Some(&last)) = (cu_seqlens.first(), cu_seqlens.last()) else {
        return fail("is empty; a single sequence of T tokens is [0, T]".into());
    };
    if first != 0 {
        return fail(format!("starts at {first}, expected 0"));
    }
    if let Some(i) = cu_seqlens.windows(2).position(|w| w[1] < w[0]) {
        let (a, b) = (cu_seqlens[i], cu_seqlens[i + 1]);
        return fail(format!("decreases from {a} to {b} at index {}", i + 1));
    }
    if last as usize != tokens {
        return fail(format!("ends at {last}, expected the number of tokens, {tokens}"));
    }
    Ok(cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize).collect())
}

/// The tokens that `cu_seqlens` speaks of: its last entry.
pub(crate) fn total_tokens(cu_seqlens: &[i32]) -> usize {
    cu_seqlens.last().map_or(0, |&last| last.max(0) as usize)
}

/// Offsets of each sequence's compressed blocks in the concatenated `[N, K, _]` layout: B+1
/// numbers, the last is N.
pub fn cu_compressed(spec: &NsaSpec, sequences: &[Range<usize>]) -> Vec<usize> {
    let mut offsets = Vec::with_capacity(sequences.len() + 1);
    offsets.push(0);
    let mut total = 0;
    for sequence in sequences {
        total += spec.compressed_blocks(sequence.len());
        offsets.push(total);
    }
    offsets
}

/// Refuses a softmax scale that is not a positive, finite number.
pub(crate) fn check_scale(scale: f32) -> Result<()> {
    if scale > 0.0 && scale.is_finite() {
        return Ok(());
    }
    Err(Error::Dims(format!("softmax scale {scale} is not a positive, finite number")))
}

/// Refuses a slice whose length is not the product of `layout`'s numbers.
pub(crate) fn check_len(name: &'static str, got: usize, layout: &[(char, usize)]) -> Result<()> {
    let expected = layout.iter().try_fold(1usize, |n, &(_, d)| n.checked_mul(d));
    if expected == Some(got) {
        return Ok(());
    }
    let parts: Vec<String> = layout.iter().map(|(c, d)| format!("{c} {d}")).collect();
    Err(Error::Length {
        name,
        got,
        expected: expected.unwrap_or(usize::MAX),
        layout: format!("[{}]", parts.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cu_seqlens_that_decrease_or_miss_the_end_are_refused() {
        for (cu, word) in [
            (&[][..], "empty"),
            (&[1, 4], "starts at 1"),
            (&[0, 3, 2, 4], "decreases from 3 to 2 at index 2"),
            (&[0, 3], "ends at 3, expected the number of tokens, 4"),
            (&[0, -1], "decreases"),
        ] {
            let text = sequences(cu, 4).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(sequences(&[0, 0, 4, 4], 4).unwrap(), vec![0..0, 0..4, 4..4]);
    }

    #[test]
    fn heads_that_do_not_divide_and_wide_dims_are_refused() {
        let dims = Dims { heads: 6, kv_heads: 4, key_dim: 8, value_dim: 8 };
        assert!(dims.validate().is_err());
        let dims = Dims { heads: 6, kv_heads: 2, key_dim: 257, value_dim: 8 };
        assert!(dims.validate().unwrap_err().to_string().contains("257"));
    }
}
