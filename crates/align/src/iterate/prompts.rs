//! Prompts: rows with a `prompt` that is a string or messages, and whatever a reward reads besides.

use std::sync::atomic::AtomicBool;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tercet_train::config::{BadRow, RowsConfig};
use tercet_train::data::{Row, is_held_out, permutation, read_rows};
use tercet_train::tune::encode::part;
use tercet_train::tune::{Encoder, RowCount, bad_row};
use tercet_train::{Error, Result};

/// One prompt.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Its tokens, the opening of the answer included.
    pub ids: Vec<i32>,
    /// The text of these tokens.
    pub text: String,
    /// Its row.
    pub row: Map<String, Value>,
}

/// The prompts of a run.
pub struct Prompts {
    /// To be answered and learnt from.
    pub train: Vec<Prompt>,
    /// Held out.
    pub held_out: Vec<Prompt>,
    /// What became of the rows.
    pub count: RowCount,
}

impl Prompts {
    /// Reads all prompts; those that leave no room in the context for `max_tokens` of an answer
    /// are dropped: what is sampled is also what can be learnt.
    pub fn read(
        config: &RowsConfig,
        max_tokens: usize,
        encoder: &Encoder,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let mut count = RowCount::default();
        let mut side = |paths: &[String]| -> Result<Vec<Prompt>> {
            let rows = read_rows(paths, stop)?;
            count.rows += rows.len();
            let mut kept = Vec::with_capacity(rows.len());
            for row in rows {
                match prompt(&row, encoder) {
                    Ok(prompt) if prompt.ids.len() + max_tokens > config.context => {
                        count.drop(&row, "leaves less than sampling.max_tokens of data.context");
                    }
                    Ok(prompt) => kept.push(prompt),
                    Err(reason) if config.bad_rows == BadRow::Drop => count.drop(&row, reason),
                    Err(reason) => return Err(bad_row(&row, &reason)),
                }
            }
            count.kept += kept.len();
            Ok(kept)
        };
        let all = side(&config.paths)?;
        let (held_out, train) = match config.validation_paths.is_empty() {
            false => (side(&config.validation_paths)?, all),
            true => {
                let held_out = |prompt: &Prompt| is_held_out(prompt.hash(), config.validation);
                all.into_iter().partition(held_out)
            }
        };
        if train.is_empty() {
            return Err(Error::Data(format!("no prompt is left to answer: {count}")));
        }
        Ok(Self { train, held_out, count })
    }

    /// The prompts of round `round` (from 1) of `rounds`: a shuffled row cut into parts that differ
    /// by at most one.
    pub fn part(&self, round: usize, rounds: usize, seed: u64) -> Vec<&Prompt> {
        let count = self.train.len();
        let order = permutation(seed, 0, count as u32);
        let at = |round: usize| count * round / rounds;
        order[at(round - 1)..at(round)].iter().map(|&i| &self.train[i as usize]).collect()
    }
}

impl Prompt {
    fn hash(&self) -> u64 {
        let digest: [u8; 32] = Sha256::digest(self.text.as_bytes()).into();
        digest[..8].iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte))
    }
}

fn prompt(row: &Row, encoder: &Encoder) -> Result<Prompt, String> {
    let ids = encoder.prompt(&part(&row.object, "prompt")?)?;
    if ids.is_empty() {
        return Err(
            "has an empty prompt, from which a model without a first token cannot write".into()
        );
    }
    let unsigned: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    let text = encoder.tokenizer().decode(&unsigned).map_err(|error| error.to_string())?;
    Ok(Prompt { ids, text, row: row.object.clone() })
}
