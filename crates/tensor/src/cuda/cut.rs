//! How rows are cut into vectors and vectors among threads: the constants of `rows.cuh` and
//! `gathers.cuh`.

use tercet_cuda::Gpu;

use crate::DType;

/// Threads of a block where rows are short, and in loops over gathered rows.
const THREADS: usize = 128;

/// Threads of a multiprocessor that a backward's registers leave room for; `rows.cuh` has it too.
const RESIDENT: usize = 768;

/// The most numbers of `dtype` that one access moves such that it divides a row of `width`.
pub(super) fn vector(width: usize, dtype: DType) -> usize {
    let mut numbers = 16 / dtype.bytes();
    while !width.is_multiple_of(numbers) {
        numbers /= 2;
    }
    numbers
}

/// Grid and block of a loop with a thread for each of `threads`.
pub(super) fn threads(threads: usize) -> ([u32; 3], [u32; 3]) {
    ([threads.div_ceil(THREADS) as u32, 1, 1], [THREADS as u32, 1, 1])
}

/// How groups of threads hold a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    width: usize,
    vector: usize,
    lanes: usize,
    threads: usize,
}

impl Cut {
    /// A warp a row where it holds at most 256 bytes in each lane: many loads on their way, no
    /// barrier.
    pub(super) fn forward(width: usize, dtype: DType) -> Self {
        let vector = vector(width, dtype);
        let pieces = width / vector;
        let most = 256 / (vector * dtype.bytes());
        let lanes = if pieces <= 32 * most {
            (pieces.next_power_of_two() / 2).clamp(1, 32)
        } else {
            pieces.div_ceil(most).next_power_of_two().clamp(64, 1024)
        };
        Self::new(width, vector, lanes)
    }

    /// Eight numbers a thread, which leaves registers for the sums over rows; sixteen where a
    /// block has the registers of a whole multiprocessor.
    pub(super) fn backward(width: usize, dtype: DType) -> Self {
        let vector = vector(width, dtype);
        let lanes = width.div_ceil(8).next_power_of_two();
        let lanes = lanes.min((width / vector).next_power_of_two()).clamp(1, 512);
        Self::new(width, vector, lanes)
    }

    fn new(width: usize, vector: usize, lanes: usize) -> Self {
        Cut { width, vector, lanes, threads: if lanes > 32 { lanes } else { THREADS } }
    }

    pub(super) fn defines(&self) -> [(&'static str, String); 5] {
        let chunks = (self.width / self.vector).div_ceil(self.lanes);
        [
            ("WIDTH", self.width),
            ("VEC", self.vector),
            ("LANES", self.lanes),
            ("THREADS", self.threads),
            ("CHUNKS", chunks),
        ]
        .map(|(name, value)| (name, value.to_string()))
    }

    /// Rows that a block holds at once.
    fn groups(&self) -> usize {
        self.threads / self.lanes
    }

    pub(super) fn block(&self) -> [u32; 3] {
        [self.threads as u32, 1, 1]
    }

    /// Grid of a kernel whose groups have one row each.
    pub(super) fn grid(&self, rows: usize) -> [u32; 3] {
        [rows.div_ceil(self.groups()) as u32, 1, 1]
    }

    /// Parts that `rows` are summed in, and rows of a part: as many blocks as run at once.
    pub(super) fn parts(&self, gpu: &Gpu, rows: usize) -> (usize, usize) {
        let resident = (RESIDENT / self.threads).max(1) * gpu.multiprocessors() as usize;
        let per = rows.div_ceil(resident.min(rows.div_ceil(self.groups())).max(1)).max(1);
        (rows.div_ceil(per), per)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_covers_its_row_with_whole_vectors() {
        for dtype in [DType::F32, DType::BF16] {
            for width in (1..300).chain([512, 768, 1001, 2048, 4096, 12288, 20000, 1 << 17]) {
                for cut in [Cut::forward(width, dtype), Cut::backward(width, dtype)] {
                    let chunks: usize = cut.defines()[4].1.parse().unwrap();
                    assert!(width.is_multiple_of(cut.vector), "{cut:?}");
                    assert!(cut.vector * dtype.bytes() <= 16, "{cut:?}");
                    assert!(chunks * cut.lanes * cut.vector >= width, "{cut:?}");
                    assert!(cut.lanes.is_power_of_two() && cut.threads <= 1024, "{cut:?}");
                    assert!(cut.threads.is_multiple_of(32.max(cut.lanes)), "{cut:?}");
                }
            }
        }
    }
}
