//! Log-probabilities in the two shapes of OpenAI's API.

use serde_json::{Map, Value, json};

use super::text::Text;

/// Written for −∞, which JSON has no number for; vLLM's figure.
const LEAST: f32 = -9999.0;

/// One token's log-probabilities; of the first of a prompt, none.
pub struct Scored<'e> {
    /// The token.
    pub id: u32,
    /// Its `ln p` and those of the most probable ones.
    pub scores: Option<(f32, &'e [(u32, f32)])>,
}

/// How tokens are written.
#[derive(Clone, Copy)]
pub struct Writing<'t> {
    /// The model's text.
    pub text: &'t Text,
    /// Whether as `token_id:N`.
    pub ids: bool,
}

impl Writing<'_> {
    fn token(&self, id: u32) -> String {
        if self.ids { format!("token_id:{id}") } else { self.text.token(id) }
    }

    /// `logprobs` of `/v1/completions`; `offset` is where the first token begins, in characters,
    /// and is moved to the end of the last.
    pub fn completion(&self, tokens: &[Scored], offset: &mut usize) -> Value {
        let (mut names, mut own, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
        for token in tokens {
            let name = self.token(token.id);
            offsets.push(*offset);
            *offset += name.chars().count();
            match token.scores {
                None => {
                    own.push(Value::Null);
                    top.push(Value::Null);
                }
                Some((log_prob, likely)) => {
                    let mut map = Map::new();
                    for &(id, log_prob) in likely {
                        map.insert(self.token(id), finite(log_prob));
                    }
                    // The token itself is always among them.
                    map.entry(name.clone()).or_insert(finite(log_prob));
                    own.push(finite(log_prob));
                    top.push(Value::Object(map));
                }
            }
            names.push(name);
        }
        json!({ "tokens": names, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets })
    }

    /// `logprobs` of `/v1/chat/completions`.
    pub fn chat(&self, tokens: &[Scored]) -> Value {
        let one = |id: u32, log_prob: f32| {
            let bytes = self.text.bytes.get(id as usize).map(|t| t.bytes.as_slice());
            json!({ "token": self.token(id), "logprob": finite(log_prob), "bytes": bytes })
        };
        let whole = tokens.iter().filter_map(|token| {
            let (log_prob, likely) = token.scores?;
            let mut entry = one(token.id, log_prob);
            let top: Vec<Value> = likely.iter().map(|&(id, p)| one(id, p)).collect();
            entry["top_logprobs"] = Value::Array(top);
            Some(entry)
        });
        json!({ "content": whole.collect::<Vec<Value>>(), "refusal": null })
    }
}

fn finite(log_prob: f32) -> Value {
    json!(if log_prob.is_finite() { log_prob.max(LEAST) } else { LEAST })
}
