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
    /// Whether special tokens are left out of the answer's text.
    pub skip_special: bool,
}

impl Writing<'_> {
    fn token(&self, id: u32) -> String {
        if self.ids { format!("token_id:{id}") } else { self.text.token(id) }
    }

    /// Characters that begin in a token, of those that the answer's text has, and whether its first
    /// byte goes on with one that began before.
    fn begun(&self, id: u32) -> (usize, bool) {
        let shown = self.text.bytes.get(id as usize).filter(|t| !(t.special && self.skip_special));
        let bytes = shown.map_or(&[][..], |token| &token.bytes);
        let goes_on = |byte: &u8| byte & 0xc0 == 0x80;
        (bytes.iter().filter(|byte| !goes_on(byte)).count(), bytes.first().is_some_and(goes_on))
    }

    /// `logprobs` of `/v1/completions`; `offset` counts the characters of the answer's text that
    /// began in the tokens before, and goes on with these.
    pub fn completion(&self, tokens: &[Scored], offset: &mut usize) -> Value {
        let (mut names, mut own, mut top, mut offsets) = (vec![], vec![], vec![], vec![]);
        for token in tokens {
            let name = self.token(token.id);
            let (begun, goes_on) = self.begun(token.id);
            offsets.push(offset.saturating_sub(usize::from(goes_on)));
            *offset += begun;
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
