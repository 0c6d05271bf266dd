//! The pages of all layers' caches: one account of who holds which on the host, one table a kind
//! on the device.
//!
//! A page has the same number in every layer, so that what a sequence holds is found once, and a
//! captured step finds tables that grew after the capture. There are two kinds: pages of tokens,
//! and of compressed blocks where there is a spec.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tercet_cuda::{Buffer, Gpu, Label};

use super::super::Slice;
use super::book::{Book, PAGE};
use crate::{Error, NsaSpec, Result};

/// What stands in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Tokens,
    Blocks,
}

const KINDS: [Kind; 2] = [Kind::Tokens, Kind::Blocks];

/// How many pages there are, and how many a sequence may hold; each of tokens and of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    pages: [usize; 2],
    width: [usize; 2],
}

/// The partly filled pages of a copy, which every layer copies: from, to. Of tokens, of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Partial([Option<[u32; 2]>; 2]);

impl Partial {
    pub(super) fn of(self, kind: Kind) -> Option<[u32; 2]> {
        self.0[kind as usize]
    }
}

/// Pages that some sequences share; clones are the same pages.
#[derive(Clone)]
pub struct Pages(Arc<Inner>);

struct Inner {
    spec: Option<NsaSpec>,
    sizes: Sizes,
    /// i32 `[sequences, width]`: stale beyond what a sequence holds.
    tables: [Buffer; 2],
    books: Mutex<[Book; 2]>,
}

impl Pages {
    /// Tokens, or compressed blocks, of a page.
    pub const ROWS: usize = PAGE;

    /// `tokens` free pages of tokens, and as many of compressed blocks as sequences that share
    /// those can need; for `sequences` sequences of at most `capacity` tokens. Errors when there is
    /// no page, or more than 2^31 − 1.
    pub fn new(
        gpu: &Gpu,
        spec: Option<&NsaSpec>,
        [sequences, capacity]: [usize; 2],
        tokens: usize,
    ) -> Result<Self> {
        let sizes = Sizes::new(spec, [sequences, capacity], tokens);
        let [tokens, blocks] = sizes.pages;
        let (Ok(tokens), Ok(blocks)) = (i32::try_from(tokens), i32::try_from(blocks)) else {
            return Err(Error::Pages(format!("{tokens} pages; most is 2^31 - 1")));
        };
        if tokens == 0 || sequences == 0 {
            let text = format!("{tokens} pages for {sequences} sequences, expected at least 1");
            return Err(Error::Pages(text));
        }
        let table = |kind: Kind| {
            let shape = [sequences, sizes.width[kind as usize]];
            let bytes = shape.iter().product::<usize>() * size_of::<i32>();
            let table = gpu.alloc_for(bytes, Label::shaped("a page table", &shape))?;
            table.fill(0)?;
            Ok::<_, Error>(table)
        };
        Ok(Self(Arc::new(Inner {
            spec: spec.cloned(),
            sizes,
            tables: [table(Kind::Tokens)?, table(Kind::Blocks)?],
            books: Mutex::new([tokens, blocks].map(|n| Book::new(sequences, n.unsigned_abs()))),
        })))
    }

    /// How many pages of tokens and of compressed blocks [`Pages::new`] makes.
    pub fn counts(spec: Option<&NsaSpec>, sequences: [usize; 2], tokens: usize) -> [usize; 2] {
        Sizes::new(spec, sequences, tokens).pages
    }

    /// Bytes of its tables, for `sequences` sequences of at most `capacity` tokens.
    pub fn table_bytes(spec: Option<&NsaSpec>, [sequences, capacity]: [usize; 2]) -> usize {
        let width = Sizes::new(spec, [sequences, capacity], 1).width;
        width.iter().sum::<usize>() * sequences * size_of::<i32>()
    }

    /// Bytes of its tables.
    pub fn bytes(&self) -> usize {
        self.0.tables.iter().map(Buffer::bytes).sum()
    }

    /// Pages of tokens that no sequence holds.
    pub fn free(&self) -> usize {
        self.books()[0].free()
    }

    /// Gives each of some sequences, all different, the pages for so many tokens: what is appended
    /// up to there has a place. All or none: an error says what is lacking, and changes nothing.
    /// Not while a graph is captured.
    pub fn reserve(&self, wants: &[(usize, usize)]) -> Result<()> {
        let mut books = self.books();
        for kind in KINDS {
            let (book, width) = (&books[kind as usize], self.0.sizes.width[kind as usize]);
            let mut lacking = 0;
            for &(sequence, tokens) in wants {
                self.check(book, sequence)?;
                let (rows, most) = (self.rows(kind, tokens), width * PAGE);
                if rows > most {
                    let text = format!("{rows} rows of sequence {sequence}; most is {most}");
                    return Err(Error::Pages(text));
                }
                lacking += book.lacks(sequence, rows);
            }
            if lacking > book.free() {
                return Err(none_left(book, lacking));
            }
        }
        for kind in KINDS {
            let book = &mut books[kind as usize];
            for &(sequence, tokens) in wants {
                let Some(new) = book.grow(sequence, self.rows(kind, tokens)) else {
                    return Err(none_left(book, 1));
                };
                self.write(kind, book, sequence, new.start)?;
            }
        }
        Ok(())
    }

    /// Whether a sequence has the pages for so many tokens.
    pub(super) fn covers(&self, sequence: usize, tokens: usize) -> Result<()> {
        let books = self.books();
        for kind in KINDS {
            let book = &books[kind as usize];
            self.check(book, sequence)?;
            let lacking = book.lacks(sequence, self.rows(kind, tokens));
            if lacking > 0 {
                return Err(Error::Pages(format!(
                    "sequence {sequence} lacks {lacking} pages for {tokens} tokens; reserve them \
                     first"
                )));
            }
        }
        Ok(())
    }

    /// Sequence `to` gives up what it holds and becomes a copy of the `tokens` tokens of `from`:
    /// full pages are shared, of the partly filled ones every layer's cache has to copy the rows.
    /// An error changes nothing. Not while a graph is captured.
    pub fn copy(&self, from: usize, to: usize, tokens: usize) -> Result<Partial> {
        let mut books = self.books();
        for kind in KINDS {
            let book = &books[kind as usize];
            self.check(book, from)?;
            self.check(book, to)?;
            let rows = self.rows(kind, tokens);
            if from != to && book.lacks(from, rows) > 0 {
                return Err(Error::Pages(format!("sequence {from} does not hold {tokens} tokens")));
            }
            if from != to && !book.can_fork(to, rows) {
                return Err(none_left(book, 1));
            }
        }
        let mut partial = Partial::default();
        if from == to {
            return Ok(partial);
        }
        for kind in KINDS {
            let book = &mut books[kind as usize];
            let Some(pair) = book.fork(from, to, self.rows(kind, tokens)) else {
                return Err(none_left(book, 1));
            };
            partial.0[kind as usize] = pair;
            self.write(kind, book, to, 0)?;
        }
        Ok(partial)
    }

    /// Takes a sequence's pages back.
    pub fn clear(&self, sequence: usize) -> Result<()> {
        let mut books = self.books();
        self.check(&books[0], sequence)?;
        books.iter_mut().for_each(|book| book.clear(sequence));
        Ok(())
    }

    /// The table of a kind and its width. It is as old as the pages are: kept by whoever keeps
    /// them.
    pub(super) fn table(&self, kind: Kind) -> (Slice, usize) {
        (Slice::whole(&self.0.tables[kind as usize], size_of::<i32>()), self.width(kind))
    }

    /// Pages that one sequence may hold.
    pub(super) fn width(&self, kind: Kind) -> usize {
        self.0.sizes.width[kind as usize]
    }

    /// Pages of a kind.
    pub(super) fn count(&self, kind: Kind) -> usize {
        self.0.sizes.pages[kind as usize]
    }

    /// Sequences there are.
    pub(super) fn sequences(&self) -> usize {
        self.books()[0].sequences()
    }

    fn rows(&self, kind: Kind, tokens: usize) -> usize {
        rows(self.0.spec.as_ref(), kind, tokens)
    }

    fn books(&self) -> MutexGuard<'_, [Book; 2]> {
        // Books are whole between statements that can panic: none can.
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, book: &Book, sequence: usize) -> Result<()> {
        if sequence < book.sequences() {
            return Ok(());
        }
        let text = format!("sequence {sequence} of pages for {}", book.sequences());
        Err(Error::Pages(text))
    }

    /// Writes a sequence's row of a table, from its page `first` on.
    fn write(&self, kind: Kind, book: &Book, sequence: usize, first: usize) -> Result<()> {
        let at = (sequence * self.width(kind) + first) * size_of::<i32>();
        Ok(self.0.tables[kind as usize].write(at, &book.held(sequence)[first..])?)
    }
}

impl Sizes {
    fn new(spec: Option<&NsaSpec>, [sequences, capacity]: [usize; 2], tokens: usize) -> Self {
        // Steps see whole pages of tokens.
        let capacity = capacity.next_multiple_of(PAGE);
        let width = KINDS.map(|kind| rows(spec, kind, capacity).div_ceil(PAGE).max(1));
        let all = |kind: Kind| sequences.saturating_mul(width[kind as usize]);
        let tokens = tokens.min(all(Kind::Tokens));
        let blocks = spec.map_or(1, |spec| {
            // A sequence that has t pages of tokens that no other one has, has fewer than
            // t/d + 2 + 1/64 pages of blocks to itself: its blocks are at most one a stride more,
            // its first page of them may be only partly shared, and its last partly filled.
            let most =
                tokens.div_ceil(spec.compress_stride) + 2 * sequences + sequences.div_ceil(PAGE);
            most.min(all(Kind::Blocks))
        });
        Self { pages: [tokens, blocks], width }
    }
}

/// Rows that so many tokens are.
fn rows(spec: Option<&NsaSpec>, kind: Kind, tokens: usize) -> usize {
    match kind {
        Kind::Tokens => tokens,
        Kind::Blocks => spec.map_or(0, |spec| spec.compressed_blocks(tokens)),
    }
}

fn none_left(book: &Book, lacking: usize) -> Error {
    Error::Pages(format!(
        "lacking {lacking} of {PAGE} rows: {} of {} are free; clear a sequence, or make room for \
         more",
        book.free(),
        book.pages()
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    fn spec(compress_block: usize, compress_stride: usize) -> NsaSpec {
        NsaSpec { compress_block, compress_stride, ..NsaSpec::default() }
    }

    /// By hand: 130 tokens are 3 pages; blocks of 32 with a stride of 16 are 7 of them, 1 page.
    #[test]
    fn sizes_are_those_of_counting() {
        let spec = spec(32, 16);
        let sizes = Sizes::new(Some(&spec), [5, 130], 9);
        assert_eq!(sizes, Sizes { pages: [9, 5], width: [3, 1] });
        // No more than all sequences can hold.
        assert_eq!(Pages::counts(Some(&spec), [5, 130], 1000), [15, 5]);
        assert_eq!(Pages::table_bytes(Some(&spec), [5, 130]), (3 + 1) * 5 * 4);
        // 65,536 tokens are 1024 pages and 4095 blocks: 64 pages. Of 4096 pages of tokens at most
        // 256 pages of blocks come, and two and a bit for each of ten sequences.
        assert_eq!(Pages::counts(Some(&spec), [10, 65_536], 4096), [4096, 256 + 20 + 1]);
        assert_eq!(Pages::counts(None, [10, 65_536], 4096), [4096, 1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, rng_seed: RngSeed::Fixed(2), ..ProptestConfig::default() })]
        /// However sequences grow, are copied and cleared: while there are pages of tokens there
        /// are pages of blocks.
        #[test]
        fn blocks_never_run_out_before_tokens(
            (block, stride) in prop_oneof![
                Just((32usize, 16usize)), Just((8, 8)), Just((64, 16)), Just((16, 2)), Just((4, 1)),
            ],
            tokens in 10usize..400,
            acts in prop::collection::vec((0usize..10, 0usize..6, 0usize..6, 1usize..3000), 1..80),
        ) {
            let spec = spec(block, stride);
            let capacity = 20_000;
            let sizes = Sizes::new(Some(&spec), [6, capacity], tokens);
            let mut books = sizes.pages.map(|pages| Book::new(6, pages as u32));
            let mut lens = [0; 6];
            for (act, a, b, count) in acts {
                let rows = |len: usize| KINDS.map(|kind| rows(Some(&spec), kind, len));
                match act {
                    0..=5 if lens[a] + count <= capacity => {
                        let [tokens, blocks] = rows(lens[a] + count);
                        if books[0].grow(a, tokens).is_some() {
                            prop_assert!(books[1].grow(a, blocks).is_some());
                            lens[a] += count;
                        }
                    }
                    6..=8 if a != b => {
                        let [tokens, blocks] = rows(lens[a]);
                        if books[0].fork(a, b, tokens).is_some() {
                            prop_assert!(books[1].fork(a, b, blocks).is_some());
                            lens[b] = lens[a];
                        }
                    }
                    9 => {
                        books.iter_mut().for_each(|book| book.clear(a));
                        lens[a] = 0;
                    }
                    _ => {}
                }
            }
        }
    }
}
