//! Keys and values packed for the kernels, in pages of a fixed number of tokens.
//!
//! A page holds, for each KV head, its keys transposed `[D, w]` and its values by row `[w, V]`,
//! both f32 and padded to whole vectors. Prefill packs a sequence once; the decode caches *are*
//! such pages, so both run the same loops over the same layout and give the same bits.

use rayon::prelude::*;

use super::simd::pad;
use crate::Element;

/// Pages of one sequence, all KV heads.
#[derive(Clone)]
pub(super) struct Pages {
    /// Tokens in a page.
    pub tokens: usize,
    /// Tokens in a page, padded to whole vectors.
    pub width: usize,
    /// KV heads.
    heads: usize,
    /// Dimension of the transposed operand (keys).
    pub key_dim: usize,
    /// Dimension of the row operand (values).
    value_dim: usize,
    /// `value_dim` padded to whole vectors.
    pub value_width: usize,
    /// Tokens appended since the start, those a ring has dropped included.
    len: usize,
    /// With a ring only this many pages are kept; the page of token t is in slot (t / w) mod ring.
    ring: Option<usize>,
    slots: Vec<Page>,
}

#[derive(Clone)]
struct Page {
    data: Vec<f32>,
    /// A masked key weighs 0, and 0 · NaN is NaN: such pages take the careful path.
    non_finite: bool,
}

impl Pages {
    /// No tokens yet.
    pub fn new(tokens: usize, heads: usize, key_dim: usize, value_dim: usize) -> Self {
        let (width, value_width) = (pad(tokens), pad(value_dim));
        let (len, ring, slots) = (0, None, Vec::new());
        Self { tokens, width, heads, key_dim, value_dim, value_width, len, ring, slots }
    }

    /// Keeps only the pages that the last `window` tokens of any token of the newest page touch.
    pub fn ring(mut self, window: usize) -> Self {
        self.ring = Some(window.div_ceil(self.tokens).saturating_add(1));
        self
    }

    /// Packs `keys` `[t, K, D]` and `values` `[t, K, V]` at once.
    pub fn pack<E: Element>(mut self, keys: &[E], values: &[E], count: usize) -> Self {
        self.slots = (0..count.div_ceil(self.tokens))
            .into_par_iter()
            .map(|page| {
                let first = page * self.tokens;
                let last = (first + self.tokens).min(count);
                let mut slot = self.blank();
                self.write(&mut slot, keys, values, first..last, 0);
                slot
            })
            .collect();
        self.len = count;
        self
    }

    /// Appends `count` tokens.
    pub fn append<E: Element>(&mut self, keys: &[E], values: &[E], count: usize) {
        let mut taken = 0;
        while taken < count {
            let (page, column) = (self.len / self.tokens, self.len % self.tokens);
            let slot = self.slot(page);
            if column == 0 {
                let blank = self.blank();
                match self.slots.get_mut(slot) {
                    Some(old) => *old = blank,
                    None => self.slots.push(blank),
                }
            }
            let n = (self.tokens - column).min(count - taken);
            let mut target = std::mem::replace(
                &mut self.slots[slot],
                Page { data: Vec::new(), non_finite: false },
            );
            self.write(&mut target, keys, values, taken..taken + n, column);
            self.slots[slot] = target;
            self.len += n;
            taken += n;
        }
    }

    /// Tokens appended so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|page| page.data.len() * size_of::<f32>()).sum()
    }

    /// Kᵀ of a page and head: `[D, width]`.
    pub fn keys(&self, page: usize, head: usize) -> &[f32] {
        let at = head * self.head_size();
        &self.slots[self.slot(page)].data[at..at + self.key_dim * self.width]
    }

    /// V of a page and head: `[width, value_width]`.
    pub fn values(&self, page: usize, head: usize) -> &[f32] {
        let at = head * self.head_size() + self.key_dim * self.width;
        &self.slots[self.slot(page)].data[at..at + self.width * self.value_width]
    }

    /// Whether a page has a NaN or an infinity among its values.
    pub fn non_finite(&self, page: usize) -> bool {
        self.slots[self.slot(page)].non_finite
    }

    fn slot(&self, page: usize) -> usize {
        self.ring.map_or(page, |ring| page % ring)
    }

    fn head_size(&self) -> usize {
        self.key_dim * self.width + self.width * self.value_width
    }

    fn blank(&self) -> Page {
        Page { data: vec![0.0; self.heads * self.head_size()], non_finite: false }
    }

    /// Writes tokens `range` of the sources into a page from `column` on.
    fn write<E: Element>(
        &self,
        page: &mut Page,
        keys: &[E],
        values: &[E],
        range: std::ops::Range<usize>,
        column: usize,
    ) {
        let (k_dim, v_dim) = (self.key_dim, self.value_dim);
        let mut zero_if_finite = 0.0f32;
        for head in 0..self.heads {
            let at = head * self.head_size();
            let (k_t, v_rows) =
                page.data[at..at + self.head_size()].split_at_mut(k_dim * self.width);
            for (i, t) in range.clone().enumerate() {
                let source = &keys[(t * self.heads + head) * k_dim..][..k_dim];
                for (d, x) in source.iter().enumerate() {
                    k_t[d * self.width + column + i] = x.to_f32();
                }
                let source = &values[(t * self.heads + head) * v_dim..][..v_dim];
                let row = &mut v_rows[(column + i) * self.value_width..][..v_dim];
                for (y, x) in row.iter_mut().zip(source) {
                    *y = x.to_f32();
                    zero_if_finite += *y * 0.0;
                }
            }
        }
        // x·0 is 0 for finite x and NaN otherwise.
        page.non_finite |= zero_if_finite.is_nan();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: usize, width: usize) -> Vec<f32> {
        (0..n * width).map(|i| i as f32).collect()
    }

    #[test]
    fn appending_in_pieces_equals_packing_at_once() {
        let (k, v) = (tokens(11, 2 * 3), tokens(11, 2 * 5));
        let whole = Pages::new(4, 2, 3, 5).pack(&k, &v, 11);
        let mut pieces = Pages::new(4, 2, 3, 5);
        let mut at = 0;
        for n in [1, 6, 0, 3, 1] {
            pieces.append(&k[at * 6..], &v[at * 10..], n);
            at += n;
        }
        for page in 0..3 {
            for head in 0..2 {
                assert_eq!(whole.keys(page, head), pieces.keys(page, head));
                assert_eq!(whole.values(page, head), pieces.values(page, head));
            }
        }
    }

    #[test]
    fn a_ring_keeps_the_window_and_forgets_the_rest() {
        let (k, v) = (tokens(100, 1), tokens(100, 1));
        let mut ring = Pages::new(4, 1, 1, 1).ring(6);
        for t in 0..100 {
            ring.append(&k[t..], &v[t..], 1);
            for seen in t.saturating_sub(5)..=t {
                assert_eq!(ring.keys(seen / 4, 0)[seen % 4], seen as f32);
            }
        }
        assert_eq!(ring.slots.len(), 3);
    }

    #[test]
    fn a_nan_value_marks_its_page_until_the_page_is_reused() {
        let mut ring = Pages::new(2, 1, 1, 1).ring(2);
        ring.append(&[1.0f32; 2], &[f32::NAN, 1.0], 2);
        assert!(ring.non_finite(0));
        ring.append(&[1.0f32; 4], &[1.0f32; 4], 4);
        assert!(!ring.non_finite(2), "page 2 lives in page 0's slot");
    }
}
