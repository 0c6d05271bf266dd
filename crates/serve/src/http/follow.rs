//! One answer while it is written: the engine's tokens become text, stop texts end it, and the
//! pieces go to whoever sends them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tercet_model::StopFilter;
use tokio::sync::mpsc;

use super::error::ApiError;
use super::text::Served;
use crate::engine::{Event, Finish, LogProbs, Reads, Usage};

/// How tokens become text.
#[derive(Clone, Debug)]
pub struct Manner {
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Whether the stop text is part of it.
    pub include_stop: bool,
    /// Whether special tokens are left out.
    pub skip_special: bool,
}

/// A written token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its `ln p`; NaN where it was not asked for.
    pub log_prob: f32,
    /// The most probable tokens.
    pub top: Vec<(u32, f32)>,
    /// What was read to choose it.
    pub reads: Option<Reads>,
}

/// What happens to an answer, ending with one `End` or `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// It waits behind so many others.
    Queued(usize),
    /// So much of the prompt is read, of so much.
    Prefill(usize, usize),
    /// Log-probabilities of the prompt.
    Prompt(Vec<Option<LogProbs>>),
    /// Text that is certain, and the tokens that came since the last piece; either may be empty.
    Text(String, Vec<Token>),
    /// It is complete.
    End(End),
    /// It cannot be completed.
    Failed(ApiError),
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Whether it ended by itself, and not for want of room.
    pub stopped: bool,
    /// The stop text or token that ended it.
    pub by: Option<StoppedBy>,
    /// What it took.
    pub usage: Usage,
}

/// What a client named to end its answers.
#[derive(Clone, Debug, PartialEq)]
pub enum StoppedBy {
    /// A text.
    Text(String),
    /// A token.
    Token(u32),
}

/// Follows an answer to its end, or until nobody takes its pieces; returning cancels it.
pub async fn follow(
    served: Arc<Served>,
    manner: Manner,
    mut events: mpsc::UnboundedReceiver<Event>,
    number: usize,
    out: mpsc::Sender<(usize, Piece)>,
) {
    let tokenizer = &served.text.tokenizer;
    let mut text = if manner.skip_special { tokenizer.stream() } else { tokenizer.stream_all() };
    let mut stop = StopFilter::new(&manner.stop);
    let (mut usage, mut ended) = (Usage::default(), false);
    while !ended {
        let event = tokio::select! {
            event = events.recv() => event,
            () = out.closed() => return,
        };
        let piece = match event {
            None => Piece::Failed(ApiError::ours("the engine ended; see the server's own words")),
            Some(Event::Queued { ahead }) => Piece::Queued(ahead),
            Some(Event::Prefill { done, total, cached }) => {
                usage = Usage { prompt: total, cached, completion: 0 };
                Piece::Prefill(done, total)
            }
            Some(Event::PromptLogProbs(all)) => Piece::Prompt(all),
            Some(Event::Failed(error)) => Piece::Failed(error.into()),
            Some(Event::Token { id, log_prob, top, reads }) => {
                usage.completion += 1;
                let token = Token { id, log_prob, top, reads };
                match text.push(id) {
                    Err(error) => Piece::Failed(error.into()),
                    Ok(more) => {
                        let (mut shown, stopped) = stop.push(&more);
                        if let Some(by) = stopped {
                            served.ended_by_text.fetch_add(1, Ordering::Relaxed);
                            if manner.include_stop {
                                shown.push_str(&by);
                            }
                            let last = Piece::Text(shown, vec![token]);
                            let _ = out.send((number, last)).await;
                            let by = Some(StoppedBy::Text(by));
                            Piece::End(End { stopped: true, by, usage })
                        } else {
                            Piece::Text(shown, vec![token])
                        }
                    }
                }
            }
            Some(Event::Done { finish, usage }) => match text.finish() {
                Err(error) => Piece::Failed(error.into()),
                Ok(rest) => {
                    // What was held back for a stop text or half a character.
                    let (mut shown, mut by) = stop.push(&rest);
                    match &by {
                        None => shown.push_str(&stop.finish()),
                        Some(found) if manner.include_stop => shown.push_str(found),
                        Some(_) => {}
                    }
                    if !shown.is_empty() {
                        let _ = out.send((number, Piece::Text(shown, Vec::new()))).await;
                    }
                    let by = by.take().map(StoppedBy::Text).or(match finish {
                        Finish::StopToken(id) => Some(StoppedBy::Token(id)),
                        _ => None,
                    });
                    let stopped = finish != Finish::Length || by.is_some();
                    Piece::End(End { stopped, by, usage })
                }
            },
        };
        ended = matches!(piece, Piece::End(_) | Piece::Failed(_));
        if out.send((number, piece)).await.is_err() {
            return;
        }
    }
}
