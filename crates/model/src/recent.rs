//! A few values that are costly to make, by what they were made for.

/// The values that were used last, at most a fixed number of them.
pub(crate) struct Recent<K, V> {
    most: usize,
    /// The one used last at the end.
    held: Vec<(K, V)>,
}

impl<K: PartialEq, V> Recent<K, V> {
    /// Holds at most `most` values, and one at least.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(1), held: Vec::new() }
    }

    /// The value of a key, made if it is not held; the one that was unused longest gives way
    /// before it is made, so that never more than the most are there. An error is the maker's.
    pub fn get_or_make<E>(
        &mut self,
        key: K,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<&mut V, E> {
        match self.held.iter().position(|(held, _)| *held == key) {
            Some(at) => self.held[at..].rotate_left(1),
            None => {
                self.held.drain(..(self.held.len() + 1).saturating_sub(self.most));
                self.held.push((key, make()?));
            }
        }
        let last = self.held.len() - 1;
        Ok(&mut self.held[last].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made when these keys are asked for in turn, of at most `most`.
    fn made(most: usize, keys: &[u32]) -> Vec<u32> {
        let (mut recent, mut made) = (Recent::new(most), Vec::new());
        for &key in keys {
            let value = recent.get_or_make(key, || {
                made.push(key);
                Ok::<_, ()>(key * 10)
            });
            assert_eq!(value.copied(), Ok(key * 10));
            assert!(recent.held.len() <= most.max(1));
        }
        made
    }

    #[test]
    fn what_was_unused_longest_gives_way() {
        assert_eq!(made(2, &[1, 2, 1, 2, 1]), [1, 2], "what is held is not made again");
        assert_eq!(made(2, &[1, 2, 1, 3, 1, 2]), [1, 2, 3, 2], "2 went, not 1");
        assert_eq!(made(0, &[1, 1, 2, 1]), [1, 2, 1], "one is always held");
    }

    #[test]
    fn what_cannot_be_made_is_tried_again() {
        let mut recent = Recent::new(2);
        assert_eq!(recent.get_or_make(1, || Err::<u32, _>("no")), Err("no"));
        assert_eq!(recent.get_or_make(1, || Ok::<_, &str>(7)), Ok(&mut 7));
    }
}
