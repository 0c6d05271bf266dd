//! Which sequence holds which page: plain bookkeeping, without a device.
//!
//! A page holds [`PAGE`] rows of a sequence, which are only ever appended. A fork shares the full
//! pages of what it is a copy of, and gets a page of its own for the rows of the last, partly
//! filled one. So a page that more than one sequence holds is full, and nobody writes to it.

use std::ops::Range;

use super::view::TILE;

/// Rows of a page.
pub(super) const PAGE: usize = TILE;

/// The pages of some sequences.
#[derive(Debug)]
pub(super) struct Book {
    /// Pages of each sequence, in the order of its rows.
    held: Vec<Vec<u32>>,
    /// How many sequences hold each page.
    holders: Vec<u32>,
    free: Vec<u32>,
}

impl Book {
    /// `pages` free pages, and sequences that hold none.
    pub fn new(sequences: usize, pages: u32) -> Self {
        Self {
            held: vec![Vec::new(); sequences],
            holders: vec![0; pages as usize],
            free: (0..pages).rev().collect(),
        }
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages there are.
    pub fn pages(&self) -> usize {
        self.holders.len()
    }

    pub fn sequences(&self) -> usize {
        self.held.len()
    }

    /// The pages of a sequence.
    pub fn held(&self, sequence: usize) -> &[u32] {
        &self.held[sequence]
    }

    /// Pages that a sequence lacks to hold `rows` rows.
    pub fn lacks(&self, sequence: usize, rows: usize) -> usize {
        rows.div_ceil(PAGE).saturating_sub(self.held[sequence].len())
    }

    /// Gives a sequence the pages that it lacks; returns which of its pages are new. `None`: there
    /// are not enough, and nothing has changed.
    pub fn grow(&mut self, sequence: usize, rows: usize) -> Option<Range<usize>> {
        let left = self.free().checked_sub(self.lacks(sequence, rows))?;
        let new = self.free.split_off(left);
        new.iter().for_each(|&page| self.holders[page as usize] = 1);
        let held = &mut self.held[sequence];
        let from = held.len();
        held.extend(new.into_iter().rev());
        Some(from..held.len())
    }

    /// Whether there are pages for `to` to become a copy of `rows` rows of another sequence; those
    /// that only `to` holds until then count.
    pub fn can_fork(&self, to: usize, rows: usize) -> bool {
        let own = |&page: &u32| self.holders[page as usize] == 1;
        rows.is_multiple_of(PAGE) || self.free() > 0 || self.held[to].iter().any(own)
    }

    /// `to` becomes a copy of the first `rows` rows of `from`, another sequence, which holds them.
    /// Returns the numbers of the partly filled page, if there is one, and of that which its rows
    /// have to be copied to. `None`: there is no page, and nothing has changed.
    pub fn fork(&mut self, from: usize, to: usize, rows: usize) -> Option<Option<[u32; 2]>> {
        if !self.can_fork(to, rows) {
            return None;
        }
        let mut pages = self.held[from][..rows / PAGE].to_vec();
        pages.iter().for_each(|&page| self.holders[page as usize] += 1);
        self.clear(to);
        let mut partial = None;
        if !rows.is_multiple_of(PAGE) {
            let own = self.free.pop()?;
            self.holders[own as usize] = 1;
            pages.push(own);
            partial = Some([self.held[from][rows / PAGE], own]);
        }
        self.held[to] = pages;
        Some(partial)
    }

    /// Takes back what a sequence holds.
    pub fn clear(&mut self, sequence: usize) {
        for page in std::mem::take(&mut self.held[sequence]).into_iter().rev() {
            let holders = &mut self.holders[page as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    /// Sequences as a book's owner sees them, with the memory that the pages stand for.
    struct World {
        book: Book,
        lens: Vec<usize>,
        /// What each sequence should read, row by row.
        want: Vec<Vec<u32>>,
        /// What lies in the pages.
        memory: Vec<[u32; PAGE]>,
        clock: u32,
    }

    impl World {
        fn new(sequences: usize, pages: u32) -> Self {
            Self {
                book: Book::new(sequences, pages),
                lens: vec![0; sequences],
                want: vec![Vec::new(); sequences],
                memory: vec![[u32::MAX; PAGE]; pages as usize],
                clock: 0,
            }
        }

        /// Appends rows; whether there were pages.
        fn append(&mut self, sequence: usize, rows: usize) -> bool {
            let len = self.lens[sequence];
            if self.book.grow(sequence, len + rows).is_none() {
                return false;
            }
            for row in len..len + rows {
                let page = self.book.held[sequence][row / PAGE];
                assert_eq!(self.book.holders[page as usize], 1, "a shared page is written to");
                self.clock += 1;
                self.memory[page as usize][row % PAGE] = self.clock;
                self.want[sequence].push(self.clock);
            }
            self.lens[sequence] += rows;
            true
        }

        fn fork(&mut self, from: usize, to: usize) -> bool {
            let rows = self.lens[from];
            if from == to {
                return false;
            }
            let Some(partial) = self.book.fork(from, to, rows) else { return false };
            if let Some([old, new]) = partial {
                assert_ne!(old, new);
                self.memory[new as usize] = self.memory[old as usize];
            }
            (self.lens[to], self.want[to]) = (rows, self.want[from].clone());
            true
        }

        fn clear(&mut self, sequence: usize) {
            self.book.clear(sequence);
            (self.lens[sequence], self.want[sequence]) = (0, Vec::new());
        }

        fn check(&self) {
            let mut holders = vec![0; self.memory.len()];
            for (sequence, held) in self.book.held.iter().enumerate() {
                let len = self.lens[sequence];
                assert!(held.len() >= len.div_ceil(PAGE), "rows without a page");
                for (at, &page) in held.iter().enumerate() {
                    holders[page as usize] += 1;
                    let full = (at + 1) * PAGE <= len;
                    assert!(full || self.book.holders[page as usize] == 1, "shared, not full");
                }
                let read = (0..len).map(|row| self.memory[held[row / PAGE] as usize][row % PAGE]);
                assert!(read.eq(self.want[sequence].iter().copied()), "sequence {sequence}");
            }
            assert_eq!(holders, self.book.holders);
            let mut free = self.book.free.clone();
            free.sort_unstable();
            let idle = (0..).zip(&holders).filter(|(_, n)| **n == 0).map(|(page, _)| page);
            assert!(free.into_iter().eq(idle), "a page is lost, or free twice");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]
        /// Chunks, steps, copies and clears in any order: every sequence reads what was written to
        /// it, a page is shared only when it is full, and none is lost.
        #[test]
        fn pages_are_shared_only_full_and_all_come_back(
            pages in 1u32..30,
            acts in prop::collection::vec((0usize..9, 0usize..5, 0usize..5, 1usize..200), 1..120),
        ) {
            let mut world = World::new(5, pages);
            for (act, a, b, rows) in acts {
                match act {
                    0 | 1 => drop(world.append(a, rows)),
                    2..=4 => drop((0..rows % 70).all(|_| world.append(a, 1))),
                    5 | 6 => drop(world.fork(a, b)),
                    // Reserved, and then not used.
                    7 => drop(world.book.grow(a, world.lens[a] + rows)),
                    _ => world.clear(a),
                }
                world.check();
            }
            (0..5).for_each(|sequence| world.clear(sequence));
            world.check();
            prop_assert_eq!(world.book.free(), pages as usize);
        }
    }

    #[test]
    fn a_fork_of_a_long_sequence_costs_one_page() {
        let mut world = World::new(3, 12);
        assert!(world.append(0, 10 * PAGE + 5));
        assert!(world.fork(0, 1));
        assert_eq!(world.book.free(), 0);
        assert_eq!(world.book.held(0)[..10], world.book.held(1)[..10]);
        assert!(!world.fork(0, 2), "no page for its last rows");
        assert_eq!(world.book.held(2), [0; 0], "nothing was changed");
        // What only the place of the copy held is free for it.
        assert!(world.fork(0, 1));
        world.check();
        assert!(!world.append(2, 1) && world.append(1, PAGE - 5));
        world.clear(0);
        assert_eq!(world.book.free(), 1, "the others are still read");
        world.clear(1);
        assert_eq!(world.book.free(), 12);
    }

    #[test]
    fn a_fork_at_a_page_boundary_costs_nothing() {
        let mut world = World::new(2, 3);
        assert!(world.append(0, 2 * PAGE) && world.fork(0, 1));
        assert_eq!(world.book.free(), 1);
        assert!(world.append(0, 1) && !world.append(1, 1));
        world.check();
    }
}
