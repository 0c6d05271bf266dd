//! The secret from which coins and noise come.
//!
//! Random words are those of ChaCha20, cut into streams: one for every line of the ledger, so that
//! none is ever used twice, and within a stream at a place that is a function of what is drawn
//! (person, or parameter and element) alone. Coins and noise have keys of their own, made from the
//! secret by SHA-256.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// A secret of 256 bits. It is never written anywhere: a run that goes on takes a new one from the
/// system, and with it new streams.
#[derive(Clone)]
pub struct Key {
    bytes: [u8; 32],
    insecure: bool,
}

impl Key {
    /// A fresh secret from the system's entropy.
    ///
    /// # Errors
    /// [`Error::Entropy`].
    pub fn from_os() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|error| Error::Entropy(error.to_string()))?;
        Ok(Self { bytes, insecure: false })
    }

    /// A key that anybody can guess: for tests and for runs that must repeat. It protects nobody,
    /// since whoever knows the seed can take the noise away.
    pub fn insecure(seed: u64) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"tercet insecure seed");
        hasher.update(seed.to_le_bytes());
        Self { bytes: hasher.finalize().into(), insecure: true }
    }

    /// Whether the key came from a seed.
    pub fn is_insecure(&self) -> bool {
        self.insecure
    }

    /// Sixteen hexadecimal digits that tell keys apart and say nothing else of them.
    pub fn fingerprint(&self) -> String {
        hex(&self.derived("fingerprint")[..8])
    }

    /// The key for one purpose.
    pub(super) fn derived(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(b"tercet private ");
        hasher.update(purpose.as_bytes());
        hasher.update(self.bytes);
        hasher.finalize().into()
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Key({})", self.fingerprint())
    }
}

/// ChaCha20 at a 32-bit word of a stream.
pub(super) fn words(key: &[u8; 32], stream: u64, word: u128) -> ChaCha20Rng {
    let mut rng = ChaCha20Rng::from_seed(*key);
    rng.set_stream(stream);
    rng.set_word_pos(word);
    rng
}

/// Lowercase hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_by_source_and_purpose_and_hide_themselves() {
        let (one, other) = (Key::insecure(1), Key::insecure(2));
        assert_eq!(one.derived("a"), Key::insecure(1).derived("a"));
        assert_ne!(one.derived("a"), one.derived("b"));
        assert_ne!(one.derived("a"), other.derived("a"));
        let os = Key::from_os().unwrap();
        assert!(one.is_insecure() && !os.is_insecure());
        assert_ne!(os.fingerprint(), Key::from_os().unwrap().fingerprint());
        assert!(!format!("{os:?}").contains(&hex(&os.bytes)[..16]));
    }
}
