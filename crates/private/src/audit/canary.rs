//! Canaries: what is planted, and whether it is, by a fair coin each.
//!
//! Coins come from one stream of words and what is planted from another, so that neither says
//! anything of the other. The plan is a file of JSON lines beside the run; the data holds the
//! included ones only. Guess who was in from the plan without its coins, then look.
//!
//! * `gradient` (Dirac; Nasr et al., arXiv 2302.07956): a person whose clipped gradient is, in each
//!   block, the threshold times one unit vector: as long as a person can be. The score is minus what
//!   was released at its places.
//! * `new-token`: a person with one row of tokens that nothing else has in this order (after Panda et
//!   al. 2025). The score is the row's loss.

use std::collections::HashSet;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// No plan has more canaries.
pub const MOST: usize = 1 << 20;
/// Streams of words, far from those that records of the same seed are made of.
const COINS: u64 = 1 << 60;
const PLANTED: u64 = COINS + 1;
/// No row of tokens is longer.
const MOST_LENGTH: usize = 1 << 12;

/// What is planted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Planted {
    /// A gradient along one coordinate of each block (adapter).
    Gradient {
        /// Which element, block by block.
        elements: Vec<usize>,
    },
    /// A row of tokens.
    NewToken {
        /// Their ids.
        tokens: Vec<u32>,
    },
}

/// One canary, a person of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Canary {
    /// Its id, also as a person.
    pub id: String,
    /// Whether its coin put it into the data.
    pub included: bool,
    /// What it is.
    #[serde(flatten)]
    pub planted: Planted,
}

/// Fair coins, a pure function of the seed; the first of many are those of few.
pub fn coins(count: usize, seed: u64) -> impl Iterator<Item = bool> {
    let mut words = words(seed, COINS);
    (0..count).map(move |_| words.next_u32() >> 31 == 1)
}

/// The name of canary number `at`.
pub fn id(at: usize) -> String {
    format!("canary-{at:07}")
}

/// Canaries at coordinates of a gradient with blocks of `dims` elements: one in each block, that no
/// other has.
///
/// # Errors
/// [`Error::Audit`] for no canaries, more than 2²⁰, no blocks, or more canaries than the smallest
/// block has coordinates.
pub fn gradient(count: usize, dims: &[usize], seed: u64) -> Result<Vec<Canary>> {
    check_count(count)?;
    let room = dims.iter().min().copied().unwrap_or(0);
    if count > room {
        return Err(Error::Audit(format!(
            "{count} canaries need a coordinate each of every adapter, the smallest has {room}"
        )));
    }
    let mut words = words(seed, PLANTED);
    let mut planted = vec![Vec::with_capacity(dims.len()); count];
    for &dim in dims {
        // Floyd's: each set of `count` places is as likely as any other.
        let mut taken = HashSet::new();
        for (last, elements) in (dim - count..dim).zip(&mut planted) {
            let any = below(&mut words, last + 1);
            let place = if taken.insert(any) { any } else { last };
            taken.insert(place);
            elements.push(place);
        }
    }
    let planted = planted.into_iter().map(|elements| Planted::Gradient { elements });
    Ok(with_coins(planted, count, seed))
}

/// Canaries of `length` tokens each, all different, drawn evenly from `tokens`: ids that no text
/// uses, such as those added to the vocabulary for the purpose.
///
/// # Errors
/// [`Error::Audit`] for no canaries or more than 2²⁰, an id given twice, a length of 0 or above
/// 4096, or fewer than two possible rows a canary.
pub fn new_tokens(count: usize, tokens: &[u32], length: usize, seed: u64) -> Result<Vec<Canary>> {
    check_count(count)?;
    let distinct: HashSet<u32> = tokens.iter().copied().collect();
    if distinct.len() != tokens.len() {
        return Err(Error::Audit("an id is given twice among the canaries' tokens".into()));
    }
    if !(1..=MOST_LENGTH).contains(&length) {
        return Err(Error::Audit(format!(
            "canaries of {length} tokens are refused, expected from 1 to {MOST_LENGTH}"
        )));
    }
    let rows = (tokens.len() as f64).powi(length as i32);
    if rows < 2.0 * count as f64 {
        return Err(Error::Audit(format!(
            "{count} canaries of {length} from {} tokens are refused: there are {rows} rows, \
             expected two a canary; give more tokens or a greater length",
            tokens.len()
        )));
    }
    let (mut words, mut taken) = (words(seed, PLANTED), HashSet::new());
    let planted = std::iter::repeat_with(|| {
        loop {
            let row: Vec<u32> =
                (0..length).map(|_| tokens[below(&mut words, tokens.len())]).collect();
            if taken.insert(row.clone()) {
                return Planted::NewToken { tokens: row };
            }
        }
    });
    Ok(with_coins(planted.take(count), count, seed))
}

/// The plan as JSON lines.
///
/// # Errors
/// [`Error::Audit`] when a canary cannot be written, which none made here is.
pub fn manifest(canaries: &[Canary]) -> Result<String> {
    let mut text = String::new();
    for canary in canaries {
        let line =
            serde_json::to_string(canary).map_err(|error| Error::Audit(error.to_string()))?;
        text.push_str(&line);
        text.push('\n');
    }
    Ok(text)
}

/// The plan that [`manifest`] wrote.
///
/// # Errors
/// [`Error::Audit`] names the line: one that is not a canary, an id given twice; no canaries.
pub fn read_manifest(text: &str) -> Result<Vec<Canary>> {
    let (mut canaries, mut ids) = (Vec::new(), HashSet::new());
    for (at, line) in text.lines().enumerate() {
        let refuse = |problem: String| {
            Error::Audit(format!("line {} of the canaries' manifest {problem}", at + 1))
        };
        let canary: Canary = serde_json::from_str(line)
            .map_err(|error| refuse(format!("is not a canary ({error})")))?;
        if !ids.insert(canary.id.clone()) {
            return Err(refuse(format!("has the id {:?} of an earlier one", canary.id)));
        }
        canaries.push(canary);
    }
    check_count(canaries.len())?;
    Ok(canaries)
}

fn with_coins(planted: impl Iterator<Item = Planted>, count: usize, seed: u64) -> Vec<Canary> {
    let both = planted.zip(coins(count, seed)).enumerate();
    both.map(|(at, (planted, included))| Canary { id: id(at), included, planted }).collect()
}

fn check_count(count: usize) -> Result<()> {
    if (1..=MOST).contains(&count) {
        return Ok(());
    }
    Err(Error::Audit(format!("{count} canaries are refused, expected from 1 to {MOST}")))
}

fn words(seed: u64, stream: u64) -> ChaCha20Rng {
    let mut words = ChaCha20Rng::seed_from_u64(seed);
    words.set_stream(stream);
    words
}

/// A whole number below `end`, all but evenly: 128 bits are cut to a range below 2⁶⁴.
fn below(words: &mut ChaCha20Rng, end: usize) -> usize {
    let word = u128::from(words.next_u64()) << 64 | u128::from(words.next_u64());
    (word % end as u128) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_a_function_of_its_seed_and_reads_back() {
        let plan = gradient(500, &[600, 500, 700], 3).unwrap();
        assert_eq!(plan, gradient(500, &[600, 500, 700], 3).unwrap());
        assert_ne!(plan, gradient(500, &[600, 500, 700], 4).unwrap());
        assert_eq!(read_manifest(&manifest(&plan).unwrap()).unwrap(), plan);
        let rows = new_tokens(200, &[7, 8, 9, 10], 6, 3).unwrap();
        assert_eq!(read_manifest(&manifest(&rows).unwrap()).unwrap(), rows);
        let line = manifest(&rows[..1]).unwrap();
        assert!(line.starts_with(r#"{"id":"canary-0000000","included":"#), "{line}");
        assert!(line.contains(r#""kind":"new-token","tokens":["#), "{line}");
    }

    #[test]
    fn canaries_differ_and_lie_within_the_gradient() {
        let dims = [300, 301, 700];
        // As many as the first block has coordinates: each exactly once.
        let plan = gradient(300, &dims, 5).unwrap();
        for (block, &dim) in dims.iter().enumerate() {
            let place = |canary: &Canary| match &canary.planted {
                Planted::Gradient { elements } => elements[block],
                Planted::NewToken { .. } => panic!(),
            };
            let places: HashSet<usize> = plan.iter().map(place).collect();
            assert!(places.len() == 300 && places.iter().all(|&place| place < dim));
        }
        let rows = new_tokens(8, &[4, 5, 6, 7], 2, 1).unwrap();
        let distinct: HashSet<String> = rows.iter().map(|c| format!("{:?}", c.planted)).collect();
        assert_eq!(distinct.len(), 8);
    }

    #[test]
    fn coins_are_fair_and_do_not_depend_on_what_is_planted() {
        // 10⁵ coins: five standard deviations are 791.
        let heads = coins(100_000, 1).filter(|&coin| coin).count();
        assert!(heads.abs_diff(50_000) < 791, "{heads}");
        let one = gradient(50, &[1000], 9).unwrap();
        let other = new_tokens(50, &[1, 2, 3], 9, 9).unwrap();
        for ((a, b), coin) in one.iter().zip(&other).zip(coins(50, 9)) {
            assert_eq!((a.included, b.included), (coin, coin));
        }
        assert!(coins(10, 9).eq(coins(50, 9).take(10)));
    }

    #[test]
    fn plans_that_cannot_be_are_refused() {
        for refused in [
            gradient(0, &[5], 1),
            gradient(6, &[5], 1),
            gradient(1, &[], 1),
            gradient(2, &[usize::MAX, 1], 1),
            gradient(usize::MAX, &[usize::MAX], 1),
            new_tokens(1, &[], 3, 1),
            new_tokens(1, &[1, 1], 3, 1),
            new_tokens(9, &[1, 2], 4, 1),
            new_tokens(1, &[1, 2], 0, 1),
            new_tokens(1, &[1, 2], 5000, 1),
            read_manifest(""),
            read_manifest("{}"),
            read_manifest("\u{0}\n"),
            read_manifest(
                &[r#"{"id":"a","included":true,"kind":"gradient","elements":[1]}"#; 2].join("\n"),
            ),
        ] {
            assert!(matches!(refused, Err(Error::Audit(_))), "{refused:?}");
        }
    }
}
