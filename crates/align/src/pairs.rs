//! Rows of preferences to pairs of examples: a prompt, an answer that is better and one that is
//! worse, and how much better (Δ).
//!
//! A row is `{prompt, chosen, rejected}` or `{chosen, rejected}`, whose prompt is what the two
//! have in common at their beginning; strings, or lists of messages. Beside two conversations a
//! `prompt` that is a string must be a turn that they share. `score_chosen` and `score_rejected`,
//! or `delta`, say what a reward thinks of them.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tercet_model::Message;
use tercet_train::config::{BadRow, RowsConfig};
use tercet_train::data::{Row, is_held_out, read_rows};
use tercet_train::tune::encode::part;
use tercet_train::tune::{Encoder, Example, Part, RowCount, bad_row};
use tercet_train::{Error, Result, files};

use crate::delta::{DeltaConfig, DeltaCounts, PairScores, Verdict};

/// Two answers to one prompt, tokenized.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// Prompt and the better answer.
    pub chosen: Example,
    /// Prompt and the worse answer.
    pub rejected: Example,
    /// Δ in [0, 1]; `None` when nothing asks for it.
    pub delta: Option<f64>,
}

impl Pair {
    /// Tokens of both answers with their prompts.
    pub fn tokens(&self) -> usize {
        self.chosen.ids.len() + self.rejected.ids.len()
    }

    /// What decides on which side of a split the pair falls: its prompt, so that no prompt is on
    /// both.
    fn prompt_hash(&self) -> u64 {
        let len = self.chosen.learnt.iter().position(|&learnt| learnt).unwrap_or(0);
        let ids = self.chosen.ids[..len].to_vec();
        Example { learnt: vec![false; len], ids }.hash()
    }
}

/// The pairs of a run and what became of its rows.
pub struct Pairs {
    /// Trained on.
    pub train: Vec<Pair>,
    /// Held out.
    pub validation: Vec<Pair>,
    /// Rows kept, cut, dropped.
    pub count: RowCount,
    /// Rows that say what Δ needs.
    pub scored: usize,
    /// Δ of every such row, before anything was done about negative ones.
    pub raw_deltas: Vec<f64>,
    /// What was done about them.
    pub deltas: DeltaCounts,
    /// SHA-256 of the training pairs, in hexadecimal.
    pub key: String,
}

/// How pairs are read.
pub struct PairRule<'a> {
    /// Where the rows are.
    pub data: &'a RowsConfig,
    /// How Δ is made.
    pub delta: &'a DeltaConfig,
    /// Whether the objective asks for Δ; without it scores are only counted.
    pub needs_delta: bool,
}

/// Reads and tokenizes all pairs.
pub fn read_pairs(rule: &PairRule, encoder: &Encoder, stop: &AtomicBool) -> Result<Pairs> {
    let mut pairs = Pairs {
        train: Vec::new(),
        validation: Vec::new(),
        count: RowCount::default(),
        scored: 0,
        raw_deltas: Vec::new(),
        deltas: DeltaCounts::default(),
        key: String::new(),
    };
    let all = read_side(rule, &rule.data.paths, encoder, stop, &mut pairs)?;
    if rule.data.validation_paths.is_empty() {
        let share = rule.data.validation;
        (pairs.validation, pairs.train) =
            all.into_iter().partition(|pair| is_held_out(pair.prompt_hash(), share));
    } else {
        pairs.train = all;
        pairs.validation = read_side(rule, &rule.data.validation_paths, encoder, stop, &mut pairs)?;
    }
    if pairs.train.is_empty() {
        let problem = format!("nothing is left to train on: {}", pairs.count);
        return Err(Error::Data(problem));
    }
    let mut hasher = Sha256::new();
    for pair in &pairs.train {
        pair.chosen.absorb(&mut hasher);
        pair.rejected.absorb(&mut hasher);
        hasher.update(pair.delta.unwrap_or(-1.0).to_le_bytes());
    }
    pairs.key = files::hex(&hasher.finalize());
    Ok(pairs)
}

fn read_side(
    rule: &PairRule,
    paths: &[String],
    encoder: &Encoder,
    stop: &AtomicBool,
    into: &mut Pairs,
) -> Result<Vec<Pair>> {
    let rows = read_rows(paths, stop)?;
    into.count.rows += rows.len();
    let mut kept = Vec::with_capacity(rows.len());
    for row in &rows {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let answers = match encode(row, encoder) {
            Ok(answers) => answers,
            Err(reason) if rule.data.bad_rows == BadRow::Drop => {
                into.count.drop(row, reason);
                continue;
            }
            Err(reason) => return Err(bad_row(row, &reason)),
        };
        let Some([chosen, rejected]) = fit(row, answers, rule.data.context, &mut into.count) else {
            continue;
        };
        let scores = match scores(&row.object) {
            Ok(scores) => scores,
            Err(reason) if rule.data.bad_rows == BadRow::Drop => {
                into.count.drop(row, reason);
                continue;
            }
            Err(reason) => return Err(bad_row(row, &reason)),
        };
        if let Ok(raw) = rule.delta.raw(&scores) {
            into.scored += 1;
            into.raw_deltas.push(raw);
        }
        if !rule.needs_delta {
            kept.push(Pair { chosen, rejected, delta: None });
            continue;
        }
        match rule.delta.read(&scores, &mut into.deltas) {
            Ok(Verdict::Keep(delta)) => kept.push(Pair { chosen, rejected, delta: Some(delta) }),
            Ok(Verdict::Swap(delta)) => {
                kept.push(Pair { chosen: rejected, rejected: chosen, delta: Some(delta) });
            }
            Ok(Verdict::Drop) => into.count.drop(row, "has a Δ below 0"),
            Err(problem) if rule.data.bad_rows == BadRow::Drop => {
                into.count.drop(row, problem.to_string());
            }
            Err(problem) => {
                let problem = format!("cannot be used: {problem}");
                return Err(bad_row(row, &problem));
            }
        }
    }
    into.count.kept += kept.len();
    Ok(kept)
}

/// Cuts both answers to the context. `None` when nothing that can be learnt is left; counted.
fn fit(
    row: &Row,
    mut answers: [Example; 2],
    context: usize,
    count: &mut RowCount,
) -> Option<[Example; 2]> {
    let longest = answers.iter().map(|answer| answer.ids.len()).max().unwrap_or(0);
    let cut = answers.iter_mut().fold(false, |cut, answer| answer.truncate(context) | cut);
    if answers.iter().any(|answer| answer.counted() == 0) {
        count.drop(row, "has a prompt that fills data.context");
        return None;
    }
    if answers[0] == answers[1] {
        count.drop(row, "has answers that differ only beyond data.context");
        return None;
    }
    if cut {
        count.cut(row, format!("has an answer of {longest} tokens, prompt included"));
    }
    Some(answers)
}

/// Prompt with the chosen and with the rejected answer.
fn encode(row: &Row, encoder: &Encoder) -> Result<[Example; 2], String> {
    let object = &row.object;
    if let Some(prompt) = tokens(object, "prompt_tokens", encoder)? {
        return sampled(object, &prompt, encoder);
    }
    let (chosen, rejected) = (part(object, "chosen")?, part(object, "rejected")?);
    if chosen == rejected {
        return Err("has a chosen answer equal to the rejected one".into());
    }
    let prompt = match object.contains_key("prompt") {
        true => Some(part(object, "prompt")?),
        false => None,
    };
    let whole = matches!((&chosen, &rejected), (Part::Messages(_), Part::Messages(_)));
    let (prompt, chosen, rejected) = match prompt {
        // Beside two whole conversations a string repeats a turn that they share.
        Some(Part::Text(text)) if whole => {
            let split = split_prompt(chosen, rejected)?;
            let is_said = |turn: &Message| turn.content.trim() == text.trim();
            if !matches!(&split.0, Part::Messages(shared) if shared.iter().any(is_said)) {
                return Err("has a `prompt` that is none of the turns its two conversations \
                            share; give the prompt as messages"
                    .into());
            }
            split
        }
        Some(prompt) => (prompt, chosen, rejected),
        None => split_prompt(chosen, rejected)?,
    };
    let answers = [encoder.pair(&prompt, &chosen), encoder.pair(&prompt, &rejected)];
    let [chosen, rejected] = answers;
    let (mut chosen, mut rejected) = (named(chosen, "chosen")?, named(rejected, "rejected")?);
    if chosen.ids == rejected.ids {
        return Err("has a chosen answer equal to the rejected one once tokenized".into());
    }
    let same = chosen.ids.iter().zip(&rejected.ids).take_while(|(a, b)| a == b).count();
    learn_from(&mut chosen, same);
    learn_from(&mut rejected, same);
    Ok([chosen, rejected])
}

/// Answers that a policy wrote are learnt as the very tokens it wrote.
fn sampled(
    object: &Map<String, Value>,
    prompt: &[i32],
    encoder: &Encoder,
) -> Result<[Example; 2], String> {
    let answer = |key: &str| {
        let found = tokens(object, key, encoder)?.ok_or_else(|| format!("has no `{key}`"))?;
        if found.is_empty() {
            return Err("has an empty completion".to_owned());
        }
        Ok(Example::completion(prompt, &found))
    };
    let (chosen, rejected) = (answer("chosen_tokens")?, answer("rejected_tokens")?);
    if chosen == rejected {
        return Err("has a chosen answer equal to the rejected one".into());
    }
    Ok([chosen, rejected])
}

/// A list of token ids, if there is one.
fn tokens(
    object: &Map<String, Value>,
    key: &str,
    encoder: &Encoder,
) -> Result<Option<Vec<i32>>, String> {
    let Some(value) = object.get(key) else { return Ok(None) };
    let most = encoder.vocab_size() as u64;
    let id = |value: &Value| value.as_u64().filter(|id| *id < most).map(|id| id as i32);
    let ids: Option<Vec<i32>> = value.as_array().and_then(|list| list.iter().map(id).collect());
    let wrong = || format!("has `{key}` that are not a list of token ids below {most}");
    ids.ok_or_else(wrong).map(Some)
}

/// Where two answers part inside a token that begins in the prompt, that token is all that tells
/// them apart, and is learnt.
fn learn_from(answer: &mut Example, same: usize) {
    let open = answer.learnt.iter().position(|&learnt| learnt).unwrap_or(0);
    if same < open {
        answer.learnt[same..open].fill(true);
    }
}

fn named(answer: Result<Example, String>, which: &str) -> Result<Example, String> {
    answer.map_err(|reason| format!("(its {which} answer) {reason}"))
}

/// The prompt that two whole texts, or conversations, share: their longest common beginning. Of
/// texts a last space goes to the answers, whose first word it belongs to.
fn split_prompt(chosen: Part, rejected: Part) -> Result<(Part, Part, Part), String> {
    match (chosen, rejected) {
        (Part::Text(a), Part::Text(b)) => {
            let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y);
            let mut end: usize = same.map(|(x, _)| x.len_utf8()).sum();
            if a[..end].ends_with(' ') {
                end -= 1;
            }
            let rest = |text: &str| Part::Text(text[end..].to_owned());
            Ok((Part::Text(a[..end].to_owned()), rest(&a), rest(&b)))
        }
        (Part::Messages(a), Part::Messages(b)) => {
            let end = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
            if end == 0 {
                return Err("has no `prompt` of messages, and its conversations share no first \
                            turn"
                    .into());
            }
            let rest = |turns: &[Message]| Part::Messages(turns[end..].to_vec());
            Ok((Part::Messages(a[..end].to_vec()), rest(&a), rest(&b)))
        }
        _ => Err("has a string and a list of messages as its two answers".into()),
    }
}

/// The numbers a row brings; a null counts as absent.
fn scores(object: &Map<String, Value>) -> Result<PairScores, String> {
    let number = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(format!("has a `{key}` that is {value}, not a number")),
        },
    };
    Ok(PairScores {
        delta: number("delta")?,
        chosen: number("score_chosen")?,
        rejected: number("score_rejected")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_implicit_prompt_is_what_the_answers_share_and_a_last_space_is_theirs() {
        let text = |text: &str| Part::Text(text.to_owned());
        let (prompt, a, b) = split_prompt(text("Ünit: so good"), text("Ünit: so bad")).unwrap();
        assert_eq!((prompt, a, b), (text("Ünit: so"), text(" good"), text(" bad")));
        let turn = |role: &str, words: &str| Message::new(role, words);
        let talk = |last: &str| Part::Messages(vec![turn("user", "hi"), turn("assistant", last)]);
        let (prompt, a, _) = split_prompt(talk("yes"), talk("no")).unwrap();
        assert_eq!(prompt, Part::Messages(vec![turn("user", "hi")]));
        assert_eq!(a, Part::Messages(vec![turn("assistant", "yes")]));
        let other = Part::Messages(vec![turn("user", "ho"), turn("assistant", "yes")]);
        assert!(split_prompt(talk("yes"), other).is_err());
    }

    #[test]
    fn a_score_that_is_no_number_is_said_and_null_is_absent() {
        let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let found = scores(&object(r#"{"score_chosen": 1, "delta": null}"#)).unwrap();
        assert_eq!(found, PairScores { chosen: Some(1.0), ..PairScores::default() });
        assert!(scores(&object(r#"{"score_rejected": "NaN"}"#)).unwrap_err().contains("NaN"));
    }
}
