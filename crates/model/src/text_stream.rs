//! Tokens to text one at a time: a character that is split over tokens comes out whole.

use crate::{Result, Tokenizer};

/// What decoders write for bytes that are not (yet) a character.
const BROKEN: char = '\u{fffd}';

/// An unfinished character has at most three bytes, so at most three replacement characters at
/// the end can still change.
const UNSETTLED: usize = 3;

/// Tokens kept while the text does not settle. Byte sequences of a model that writes no valid
/// UTF-8 would otherwise pile up and be decoded again with every token.
const LONGEST_WINDOW: usize = 64;

/// Decodes a sequence id by id. Pieces returned never change afterwards, and end at characters.
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// Ids that are decoded together: decoders look at neighbours (a leading space is dropped
    /// at the start of a text only), so the last settled ones stay as context.
    window: Vec<u32>,
    /// How many ids of the window are fully written.
    settled: usize,
    /// Bytes of the window's text that are written.
    written: usize,
    /// Whether special tokens are written too.
    special: bool,
}

impl<'t> TextStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, special: bool) -> Self {
        Self { tokenizer, window: Vec::new(), settled: 0, written: 0, special }
    }

    /// Takes the next id; returns the text that is certain now, often one token's, sometimes
    /// none, sometimes several tokens'.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        let text = self.decode()?;
        let certain = without_unsettled(&text);
        let piece = certain.get(self.written..).unwrap_or("").to_owned();
        self.written += piece.len();
        if certain.len() == text.len() || self.window.len() >= LONGEST_WINDOW {
            let rest = text.get(self.written..).unwrap_or("");
            let piece = piece + rest;
            self.slide()?;
            return Ok(piece);
        }
        Ok(piece)
    }

    /// The rest, when no id will follow: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.decode()?;
        let piece = text.get(self.written..).unwrap_or("").to_owned();
        self.written = text.len();
        Ok(piece)
    }

    /// Forgets ids that no longer matter: those before the last settled ones.
    fn slide(&mut self) -> Result<()> {
        self.window.drain(..self.settled);
        self.settled = self.window.len();
        self.written = self.decode()?.len();
        Ok(())
    }

    fn decode(&self) -> Result<String> {
        match self.special {
            false => self.tokenizer.decode(&self.window),
            true => self.tokenizer.decode_all(&self.window),
        }
    }
}

/// The text without up to three replacement characters at its end.
fn without_unsettled(text: &str) -> &str {
    let mut certain = text;
    for _ in 0..UNSETTLED {
        certain = certain.strip_suffix(BROKEN).unwrap_or(certain);
    }
    certain
}
