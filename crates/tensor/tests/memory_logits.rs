//! Logits of all tokens never exist at once, by the books of the pool. They are the process's, so
//! this file holds one test only.

mod common;

use common::tensor;
use tercet_tensor::{Grads, Tape, Tensor, ops, pool};

#[test]
fn the_log_probabilities_of_many_tokens_hold_one_chunk_of_logits() {
    const TOKENS: usize = 4096;
    const VOCAB: usize = 4096;
    const WIDTH: usize = 8;
    let (x, w) = (tensor(&[TOKENS, WIDTH], 1), tensor(&[VOCAB, WIDTH], 2));
    let targets = Tensor::from_i32((0..TOKENS as i32).collect(), &[TOKENS]).unwrap();
    pool::trim();
    let before = pool::usage().lent;
    let mut tape = Tape::recording();
    let (px, pw) = (tape.param(x, 0), tape.param(w, 1));
    let found = ops::token_log_probs(&mut tape, &px, &pw, &targets).unwrap();
    let kept = pool::usage().lent - before;
    // Five numbers a token; x and W are shared.
    assert!(kept <= 5 * 4 * TOKENS, "{kept} bytes are kept");
    let gradient = Tensor::from_f32(vec![1.0; TOKENS], &[TOKENS]).unwrap();
    let mut grads = Grads::new(2);
    tape.backward_from(&[(&found.log_probs, gradient)], &mut grads).unwrap();
    let peak = pool::usage().peak - before;
    // A chunk is a quarter of the logits; all else is a hundredth of that.
    let logits = 4 * TOKENS * VOCAB;
    assert!(peak < logits / 4 + logits / 16, "{peak} bytes of {logits}");
}
