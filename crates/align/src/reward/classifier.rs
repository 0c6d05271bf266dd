//! Rewards from a reward model: a folder of Hugging Face's `...ForSequenceClassification`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value};
use tercet_model::{Message, SequenceClassifier, Tokenizer};
use tercet_tensor::Device;

use super::error::{Error, Result};
use super::{Answer, Scored};

/// Answers scored between two looks at the stop flag.
const AT_ONCE: usize = 16;

/// A reward model and its tokenizer.
///
/// What it reads: where the prompt's row has `messages` (a list of `{"role", "content"}`), these
/// and the answer as the assistant's last message, through the folder's own chat template; else
/// the prompt's text and the answer, one after the other, with the marks that the folder's
/// tokenizer adds. The score is that of the last token, and has no part but itself.
pub struct Classifier {
    model: SequenceClassifier,
    tokenizer: Tokenizer,
}

impl Classifier {
    /// Loads the folder, weights as they are stored, and moves the model to `device`.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        let mut model = SequenceClassifier::load(dir, None)?;
        let tokenizer = Tokenizer::load(dir)?;
        tokenizer.check_fits(model.config().vocab_size)?;
        model.to_device(device)?;
        Ok(Self { model, tokenizer })
    }

    /// Whether the row's messages, if it has any, can be read.
    pub fn check_row(&self, id: u64, row: &Map<String, Value>) -> Result<()> {
        self.text(&Answer { id, prompt: "", answer: "", tokens: 0, row }).map(|_| ())
    }

    /// Scores of the answers, in their order.
    pub fn score(&self, answers: &[Answer], stop: &AtomicBool) -> Result<Vec<Scored>> {
        let mut scored = Vec::with_capacity(answers.len());
        for some in answers.chunks(AT_ONCE) {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let ids = some.iter().map(|a| self.ids(a)).collect::<Result<Vec<_>>>()?;
            let ids: Vec<&[i32]> = ids.iter().map(Vec::as_slice).collect();
            for (answer, score) in some.iter().zip(self.model.score(&ids)?) {
                if !score.is_finite() {
                    let problem = format!(
                        "the reward model gave {score}, which is not finite; are its weights whole?"
                    );
                    return Err(Error::Answer { id: answer.id, problem });
                }
                scored.push(Scored { total: f64::from(score), parts: Vec::new() });
            }
        }
        Ok(scored)
    }

    /// The token ids that the model reads.
    fn ids(&self, answer: &Answer) -> Result<Vec<i32>> {
        let (text, special) = self.text(answer)?;
        let ids = self.tokenizer.encode(&text, special)?;
        let longest = self.model.config().max_position_embeddings;
        if ids.is_empty() || ids.len() > longest {
            let problem = format!(
                "with its prompt it is {} tokens to the reward model, which reads 1 to {longest}",
                ids.len()
            );
            return Err(Error::Answer { id: answer.id, problem });
        }
        Ok(ids.into_iter().map(|id| id as i32).collect())
    }

    /// The text that the model reads, and whether the tokenizer adds its marks.
    fn text(&self, answer: &Answer) -> Result<(String, bool)> {
        let Some(messages) = answer.row.get("messages") else {
            return Ok((format!("{}{}", answer.prompt, answer.answer), true));
        };
        let wrong = |problem: &str| Error::Row { id: answer.id, problem: problem.to_owned() };
        let mut messages = read_messages(messages).ok_or_else(|| {
            wrong("column `messages` is not a list of {\"role\": text, \"content\": text}")
        })?;
        if messages.last().is_none_or(|last| last.role == "assistant") {
            return Err(wrong(
                "column `messages` is empty or ends with an assistant's message; the answer is to \
                 follow it",
            ));
        }
        let Some(template) = self.tokenizer.chat() else {
            return Err(wrong(
                "has messages, but the reward model's folder has no chat template; add \
                 chat_template.jinja there",
            ));
        };
        messages.push(Message::new("assistant", answer.answer));
        Ok((template.render(&messages, false)?, false))
    }
}

/// The messages of a row's cell.
fn read_messages(cell: &Value) -> Option<Vec<Message>> {
    let text = |message: &Value, key| message.get(key).and_then(Value::as_str).map(str::to_owned);
    let one = |m: &Value| Some(Message { role: text(m, "role")?, content: text(m, "content")? });
    cell.as_array()?.iter().map(one).collect()
}
