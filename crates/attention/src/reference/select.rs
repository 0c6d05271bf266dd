//! Eq. 11–12: the blocks whose importance ranks within `select_count`.

use crate::NsaSpec;

/// The blocks that position `p` of its sequence reads: ascending, padded with −1 to
/// `select_count`. `importance` holds the scores of blocks 0..=c, c the block of `p`.
///
/// Forced blocks count towards `select_count` and are never ranked; the others go by score,
/// highest first, the lower index first among equals, NaN last.
pub fn select(spec: &NsaSpec, p: usize, importance: &[f64]) -> Vec<i32> {
    let current = p / spec.select_block;
    let forced = |j: usize| j < spec.select_initial || j + spec.select_local > current;
    let score = |j: usize| match importance[j] {
        score if score.is_nan() => f64::NEG_INFINITY,
        score => score,
    };
    let (mut chosen, mut free): (Vec<usize>, Vec<usize>) = (0..=current).partition(|&j| forced(j));
    free.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    let room = spec.select_count - chosen.len();
    chosen.extend(free.into_iter().take(room));
    chosen.sort_unstable();
    let mut indices: Vec<i32> = chosen.into_iter().map(|j| j as i32).collect();
    indices.resize(spec.select_count, -1);
    indices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(count: usize, initial: usize, local: usize) -> NsaSpec {
        NsaSpec {
            compress_block: 4,
            compress_stride: 4,
            select_block: 4,
            select_count: count,
            select_initial: initial,
            select_local: local,
            ..NsaSpec::default()
        }
    }

    #[test]
    fn forced_blocks_are_inside_the_count_and_never_ranked() {
        let scores = [0.0, 9.0, 1.0, 5.0, 2.0, 0.0, 0.0];
        assert_eq!(select(&spec(4, 1, 2), 27, &scores), [0, 1, 5, 6]);
        assert_eq!(select(&spec(5, 1, 2), 27, &scores), [0, 1, 3, 5, 6]);
        assert_eq!(select(&spec(3, 1, 2), 27, &scores), [0, 5, 6]);
        assert_eq!(select(&spec(2, 0, 0), 27, &scores), [1, 3]);
    }

    #[test]
    fn ties_go_to_the_lower_index_and_nan_comes_last() {
        let nan = f64::NAN;
        assert_eq!(select(&spec(4, 1, 1), 27, &[0.0; 7]), [0, 1, 2, 6]);
        let scores = [nan, nan, 0.0, nan, 0.0, 0.0, nan];
        assert_eq!(select(&spec(5, 1, 1), 27, &scores), [0, 2, 4, 5, 6]);
        assert_eq!(select(&spec(6, 1, 1), 27, &scores), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn fewer_blocks_than_the_count_are_all_chosen_and_padded() {
        assert_eq!(select(&spec(5, 1, 2), 8, &[1.0; 3]), [0, 1, 2, -1, -1]);
        assert_eq!(select(&spec(5, 3, 2), 1, &[1.0]), [0, -1, -1, -1, -1]);
    }
}
