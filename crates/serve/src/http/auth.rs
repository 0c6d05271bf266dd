//! Keys: who may ask.

use std::fmt;

use sha2::{Digest, Sha256};

/// Shortest key that is taken; shorter ones are guessed.
const SHORTEST: usize = 8;

/// Keys that are let in; empty lets everybody in.
#[derive(Clone, Default)]
pub struct Keys {
    /// Digests: all of one length, whatever the keys', and a memory dump shows none of them.
    digests: Vec<[u8; 32]>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} keys", self.digests.len())
    }
}

impl Keys {
    /// The keys of a text, one a line; empty lines and lines that begin with `#` are none. The
    /// error says what is wrong, without the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).enumerate();
        let mut digests = Vec::new();
        for (at, key) in lines.filter(|(_, l)| !l.is_empty() && !l.starts_with('#')) {
            let printable = key.bytes().all(|b| b.is_ascii_graphic());
            if key.len() < SHORTEST || !printable {
                return Err(format!(
                    "line {} is no key: expected at least {SHORTEST} printable characters",
                    at + 1
                ));
            }
            digests.push(Sha256::digest(key).into());
        }
        if digests.is_empty() {
            return Err("there is no key in it; write one a line".into());
        }
        Ok(Self { digests })
    }

    /// Whether everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Which key an `Authorization` header holds: its number, or `None` for one that is not
    /// known. The time this takes depends on the number of keys alone.
    pub fn check(&self, authorization: Option<&[u8]>) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let given = authorization.unwrap_or_default();
        let (scheme, key) = given.split_at(given.len().min(7));
        let digest: [u8; 32] = Sha256::digest(key.trim_ascii()).into();
        let mut found = usize::MAX;
        for (at, known) in self.digests.iter().enumerate() {
            let differs = digest.iter().zip(known).fold(0, |all, (a, b)| all | (a ^ b));
            // No branch on the outcome: all ones where nothing differs.
            let same = usize::from(std::hint::black_box(differs) == 0).wrapping_neg();
            found = (found & !same) | (at & same);
        }
        let known = found != usize::MAX && scheme.eq_ignore_ascii_case(b"bearer ");
        known.then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_known_keys_are_let_in() {
        let keys = Keys::parse("# ours\nkey-number-one\n\n  key-number-two  \n").unwrap();
        for (header, want) in [
            ("Bearer key-number-one", Some(0)),
            ("bearer  key-number-two", Some(1)),
            ("Bearer key-number-on", None),
            ("Bearer key-number-onee", None),
            ("Bearer # ours", None),
            ("Bearer ", None),
            ("Basic key-number-one", None),
            ("key-number-one", None),
            ("", None),
        ] {
            assert_eq!(keys.check(Some(header.as_bytes())), want, "{header}");
        }
        assert_eq!(keys.check(None), None);
        assert_eq!(keys.check(Some(&[0xff; 40])), None);
        assert_eq!(Keys::default().check(None), Some(0));
        for bad in ["", "# nothing\n", "short\n", "with space inside\n"] {
            assert!(Keys::parse(bad).is_err(), "{bad}");
        }
        assert!(!format!("{keys:?}").contains("number"));
    }
}
