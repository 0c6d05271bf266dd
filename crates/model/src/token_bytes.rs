//! What each token stands for, in bytes: for grammars, which decide byte by byte, and for tokens
//! that are no text on their own.

use std::collections::HashMap;

use serde_json::Value;

/// A token's bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenBytes {
    /// The bytes; none for an id that is no token. Of a special token, its name.
    pub bytes: Vec<u8>,
    /// Whether the token is a mark and no text: decoders leave it out.
    pub special: bool,
}

/// How a decoder turns tokens to bytes.
enum Spelling {
    /// GPT-2's: every character of a token is one byte.
    ByteLevel(HashMap<char, u8>),
    /// SentencePiece's: `<0xE6>` is a byte, one character stands for a space.
    ByteFallback(String),
    /// The token as it is written.
    Plain,
}

/// The bytes of ids below `size`.
pub(crate) fn of(tokenizer: &tokenizers::Tokenizer, size: usize) -> Vec<TokenBytes> {
    let added = tokenizer.get_added_tokens_decoder();
    let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_value(d).ok());
    let spelling = spelling(&decoder.unwrap_or_default());
    let one = |id| match (added.get(&id), tokenizer.id_to_token(id)) {
        (Some(added), _) => {
            TokenBytes { bytes: added.content.clone().into_bytes(), special: added.special }
        }
        (None, Some(token)) => TokenBytes { bytes: spelling.bytes(&token), special: false },
        (None, None) => TokenBytes::default(),
    };
    (0..size).map(|id| one(id as u32)).collect()
}

fn spelling(decoder: &Value) -> Spelling {
    let is = |part: &Value, name: &str| part["type"].as_str() == Some(name);
    let parts = match decoder["decoders"].as_array() {
        Some(parts) => parts.as_slice(),
        None => std::slice::from_ref(decoder),
    };
    if parts.iter().any(|p| is(p, "ByteLevel")) {
        return Spelling::ByteLevel(byte_level());
    }
    // The character that is replaced by a space is U+2581 wherever it is not said.
    let replaced = parts.iter().find(|p| is(p, "Replace") && p["content"] == " ");
    let space = replaced.and_then(|p| p["pattern"]["String"].as_str()).unwrap_or("\u{2581}");
    if replaced.is_some() || parts.iter().any(|p| is(p, "ByteFallback") || is(p, "Metaspace")) {
        return Spelling::ByteFallback(space.to_owned());
    }
    Spelling::Plain
}

/// The byte of each letter: printable bytes stand for themselves, the others are numbered from
/// U+0100 (`bytes_to_unicode` of GPT-2's encoder.py).
fn byte_level() -> HashMap<char, u8> {
    let mut next = 0x100;
    let letter = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or(' ')
        }
    };
    let letters: Vec<char> = (0..=255).map(letter).collect();
    letters.into_iter().zip(0..=255).collect()
}

impl Spelling {
    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel(bytes) => {
                let spelt: Option<Vec<u8>> =
                    token.chars().map(|c| bytes.get(&c).copied()).collect();
                spelt.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::ByteFallback(space) => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte = hex.filter(|h| h.len() == 2).map(|h| u8::from_str_radix(h, 16));
                match byte {
                    Some(Ok(byte)) => vec![byte],
                    _ => token.replace(space.as_str(), " ").into_bytes(),
                }
            }
            Self::Plain => token.as_bytes().to_vec(),
        }
    }
}
