//! From one sequence's logits to its next token: what is allowed, what is chosen, how probable it
//! was, and whether it ends the answer.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tercet_model::Sampler;
use tercet_tensor::{Draw, log_sum_exp};

use super::request::{Constraint, EngineError, Finish, LogProbs, Request};

/// A choice.
pub(super) struct Chosen {
    /// The token and its log-probabilities; `None` when it ended the answer.
    pub token: Option<LogProbs>,
    /// Why nothing follows.
    pub finish: Option<Finish>,
}

/// Everything that choosing needs of one sequence.
pub(super) struct Chooser {
    sampler: Sampler,
    /// The model's ends of text, unless they are ignored.
    ends: Vec<u32>,
    stops: Vec<u32>,
    min_tokens: usize,
    /// At least 1, or nothing is chosen.
    most: usize,
    log_probs: Option<usize>,
    constraint: Option<Box<dyn Constraint>>,
    written: usize,
}

impl Chooser {
    /// Of a request that was let pass; `most` tokens may be written.
    pub fn new(
        request: &mut Request,
        end_of_text: &[u32],
        most: usize,
    ) -> tercet_model::Result<Self> {
        let mut sampler = Sampler::new(&request.sampling)?;
        request.prompt.iter().for_each(|&token| sampler.see(token));
        Ok(Self {
            sampler,
            ends: if request.ignore_eos { Vec::new() } else { end_of_text.to_vec() },
            stops: std::mem::take(&mut request.stop_tokens),
            min_tokens: request.min_tokens,
            most,
            log_probs: request.log_probs,
            constraint: request.constraint.take(),
            written: 0,
        })
    }

    /// Chooses from logits `[vocab]`.
    pub fn choose(&mut self, logits: &[f32]) -> Result<Chosen, EngineError> {
        let token = match self.allowed(logits)? {
            None => self.sampler.next(logits),
            Some(allowed) => self.sampler.next(&allowed),
        };
        let token = token.map_err(|error| EngineError::Model(error.to_string()))?;
        self.settle(token, Some(logits))
    }

    /// The draw of the next token, when nothing but the logits decides it.
    pub fn ahead(&mut self) -> Option<Draw> {
        let free = self.constraint.is_none() && self.written >= self.min_tokens;
        if free { self.sampler.ahead() } else { None }
    }

    /// Whether logits are needed once the token is drawn.
    pub fn tells(&self) -> bool {
        self.log_probs.is_some()
    }

    /// Takes the token of the draw that [`Chooser::ahead`] gave, with its logits if the chooser
    /// [`Chooser::tells`].
    pub fn take(
        &mut self,
        token: Option<u32>,
        logits: Option<&[f32]>,
    ) -> Result<Chosen, EngineError> {
        let token = self.sampler.was_drawn(token);
        self.settle(token.map_err(|error| EngineError::Model(error.to_string()))?, logits)
    }

    fn settle(&mut self, token: u32, logits: Option<&[f32]>) -> Result<Chosen, EngineError> {
        if self.ends.contains(&token) {
            return Ok(Chosen { token: None, finish: Some(Finish::EndOfText) });
        }
        if self.stops.contains(&token) {
            return Ok(Chosen { token: None, finish: Some(Finish::StopToken(token)) });
        }
        self.written += 1;
        let mut done = false;
        if let Some(constraint) = &mut self.constraint {
            guarded(|| constraint.take(token))?;
            done = guarded(|| Ok(constraint.is_done()))?;
        }
        let finish = match done {
            true => Some(Finish::Constraint),
            false => (self.written >= self.most).then_some(Finish::Length),
        };
        let log_probs = match self.log_probs {
            None => LogProbs { token, log_prob: f32::NAN, top: Vec::new() },
            Some(top) => log_probs(logits.ok_or_else(no_logits)?, token, top),
        };
        Ok(Chosen { token: Some(log_probs), finish })
    }

    /// The logits with −∞ where a token may not be chosen; `None` when all may.
    fn allowed(&mut self, logits: &[f32]) -> Result<Option<Vec<f32>>, EngineError> {
        let mask = match &mut self.constraint {
            None => None,
            Some(constraint) => guarded(|| constraint.mask())?,
        };
        let early = self.written < self.min_tokens;
        if mask.is_none() && !early {
            return Ok(None);
        }
        let mut allowed = logits.to_vec();
        if let Some(mask) = mask {
            for (token, logit) in allowed.iter_mut().enumerate() {
                if mask.get(token / 32).is_none_or(|word| word >> (token % 32) & 1 == 0) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if early {
            for &token in self.ends.iter().chain(&self.stops) {
                if let Some(logit) = allowed.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if allowed.iter().all(|&logit| logit == f32::NEG_INFINITY) {
            let text = match early {
                true => "before min_tokens only ending tokens are allowed",
                false => "it allows no token that the model has",
            };
            return Err(EngineError::Constraint(text.into()));
        }
        Ok(Some(allowed))
    }
}

/// A step did not give what it was asked for.
pub(super) fn no_logits() -> EngineError {
    EngineError::Model("a step gave no logits where they are needed; please report it".into())
}

/// A constraint is made of what a client sent: it may fail in any way, and ends its own sequence.
fn guarded<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(EngineError::Constraint),
        Err(_) => Err(EngineError::Constraint("it panicked".into())),
    }
}

/// `ln p` of a token and of the `top` most probable ones in the distribution of logits `[vocab]`;
/// of equals the smaller id comes first.
pub(super) fn log_probs(logits: &[f32], token: u32, top: usize) -> LogProbs {
    let normaliser = log_sum_exp(logits);
    let of =
        |id: u32| logits.get(id as usize).map_or(f32::NAN, |&l| (f64::from(l) - normaliser) as f32);
    let by_logit =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = Vec::new();
    if top > 0 {
        ids.extend(0..logits.len() as u32);
        if top < ids.len() {
            ids.select_nth_unstable_by(top, by_logit);
            ids.truncate(top);
        }
        ids.sort_unstable_by(by_logit);
    }
    LogProbs { token, log_prob: of(token), top: ids.into_iter().map(|id| (id, of(id))).collect() }
}

#[cfg(test)]
mod tests {
    use tercet_model::Sampling;

    use super::*;

    #[test]
    fn logits_that_are_needed_and_missing_are_an_error_and_no_number() {
        let chooser = |log_probs| {
            let mut request = Request {
                prompt: vec![1],
                adapter: None,
                sampling: Sampling::greedy(1),
                max_tokens: 2,
                min_tokens: 0,
                stop_tokens: Vec::new(),
                ignore_eos: false,
                log_probs,
                prompt_log_probs: None,
                namespace: String::new(),
                reads: false,
                constraint: None,
            };
            Chooser::new(&mut request, &[], 2).unwrap()
        };
        let token = |chosen: Chosen| chosen.token.map(|token| token.token);
        // Nothing is told of the token: its id is all there is.
        assert_eq!(chooser(None).take(Some(3), None).map(token), Ok(Some(3)));
        assert_eq!(chooser(Some(2)).take(Some(3), Some(&[0.0; 8])).map(token), Ok(Some(3)));
        assert_eq!(chooser(Some(2)).take(Some(3), None).map(token), Err(no_logits()));
    }

    #[test]
    fn the_most_probable_come_first_and_equals_by_id() {
        let logits = [1.0, 3.0, -2.0, 3.0, f32::NEG_INFINITY];
        let found = log_probs(&logits, 2, 3);
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let of = |l: f64| (l - sum.ln()) as f32;
        // Exponentials are summed in f32, within 1e-6.
        let near = |got: f32, want: f32| assert!((got - want).abs() < 2e-6, "{got} {want}");
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 0]);
        found.top.iter().zip([3.0, 3.0, 1.0]).for_each(|(got, want)| near(got.1, of(want)));
        near(found.log_prob, of(-2.0));
        assert_eq!(log_probs(&logits, 0, 99).top.len(), 5, "no more than there are");
        assert_eq!(log_probs(&logits, 0, 0).top, []);
    }
}
