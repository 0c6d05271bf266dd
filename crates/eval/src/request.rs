//! Texts become tokens: where a context ends and its continuation begins, as lm-eval cuts them.

use tercet_model::Tokenizer;

/// A continuation whose probability is asked for. The model reads all tokens but the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Context and continuation.
    pub tokens: Vec<i32>,
    /// Where the continuation begins, at least 1.
    pub from: usize,
}

impl Request {
    /// The tokens that every continuation of the same context shares.
    pub fn context(&self) -> &[i32] {
        &self.tokens[..self.from]
    }

    /// What is asked about.
    pub fn continuation(&self) -> &[i32] {
        &self.tokens[self.from..]
    }
}

/// How texts are cut.
pub(crate) struct Cut<'t> {
    pub tokenizer: &'t Tokenizer,
    /// The tokenizer's own marks, such as a first token, are added.
    pub special: bool,
    /// Stands for a context that is empty.
    pub prefix: Option<u32>,
    /// Tokens that the model reads at most.
    pub max_length: usize,
}

type Said<T> = std::result::Result<T, String>;

impl Cut<'_> {
    /// Spaces at the end of the context go to the continuation; both are encoded as one text, and
    /// what comes after the tokens of the context alone is the continuation
    /// (`TemplateLM._encode_pair`). Too long a request loses its beginning.
    pub fn request(&self, context: &str, continuation: &str) -> Said<Request> {
        let (context, rest) = if context.is_empty() {
            let rest = self.encode(continuation, false)?;
            match (self.prefix, rest.split_first()) {
                // A continuation that begins with the prefix is its own context.
                (Some(prefix), Some((&first, rest))) if prefix == first => {
                    (vec![first], rest.to_vec())
                }
                (Some(prefix), _) => (vec![prefix], rest),
                (None, _) => {
                    return Err("the context is empty, and the model has neither a first nor an \
                                end-of-text token to stand for it"
                        .into());
                }
            }
        } else {
            let bare = context.trim_end_matches(python_space);
            let own = self.encode(bare, self.special)?;
            let whole = self.encode(&format!("{context}{continuation}"), self.special)?;
            let rest = whole.get(own.len()..).unwrap_or_default().to_vec();
            (own, rest)
        };
        if context.is_empty() {
            return Err("the context is nothing but spaces; lm-eval has no token to begin \
                        with either"
                .into());
        }
        if rest.is_empty() {
            return Err(format!("the continuation {continuation:?} adds no token to its context"));
        }
        if rest.len() > self.max_length {
            return Err(format!(
                "the continuation has {} tokens, and the model reads {} at most; shorten it",
                rest.len(),
                self.max_length
            ));
        }
        // The last token is not read, so that one more fits.
        let drop = (context.len() + rest.len()).saturating_sub(self.max_length + 1);
        let from = context.len() - drop;
        let tokens = context[drop..].iter().chain(&rest).map(|&id| id as i32).collect();
        Ok(Request { tokens, from })
    }

    /// A prompt with room for `max_tokens` after it; too long a one loses its beginning.
    pub fn prompt(&self, context: &str, max_tokens: usize) -> Said<Vec<u32>> {
        let Some(room) = self.max_length.checked_sub(max_tokens).filter(|&room| room > 0) else {
            return Err(format!(
                "max_gen_toks is {max_tokens}, and prompt and answer have {} tokens together; \
                 lower it",
                self.max_length
            ));
        };
        let tokens = self.encode(context, self.special)?;
        if tokens.is_empty() {
            return Err("the context has no tokens; a model needs at least one".into());
        }
        Ok(tokens[tokens.len().saturating_sub(room)..].to_vec())
    }

    fn encode(&self, text: &str, special: bool) -> Said<Vec<u32>> {
        self.tokenizer.encode(text, special).map_err(|e| e.to_string())
    }
}

/// What `str.rstrip` takes away: white space, and four separators that Unicode does not count.
fn python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
