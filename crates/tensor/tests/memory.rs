//! What the tape holds, by the books of the pool. They are the process's, so this file holds one
//! test only.

use tercet_tensor::{DType, Grads, Result, Tape, Tensor, Var, ops, pool};

#[test]
fn the_walk_back_frees_as_it_goes_and_recomputation_keeps_little() {
    const COUNT: usize = 1 << 20;
    const BYTES: usize = 4 * COUNT;
    const DEPTH: usize = 8;
    fn chain(tape: &mut Tape, x: &Var) -> Result<Var> {
        let mut x = x.clone();
        for _ in 0..DEPTH {
            x = ops::gelu(tape, &x, ops::Gelu::Tanh)?;
        }
        Ok(x)
    }
    let peak = |recompute: bool| {
        pool::trim();
        let before = pool::usage().lent;
        let mut tape = Tape::recording();
        let x = tape.param(Tensor::zeros(DType::F32, &[1, COUNT]), 0);
        let mut y = x;
        for _ in 0..4 {
            y = if recompute {
                tape.recompute(&[y], |tape, x| Ok(vec![chain(tape, &x[0])?])).unwrap().remove(0)
            } else {
                chain(&mut tape, &y).unwrap()
            };
        }
        let forward = pool::usage().lent - before;
        let ones = tape.leaf(Tensor::zeros(DType::F32, &[1, COUNT]));
        let loss = ops::linear(&mut tape, &y, &ones, None).unwrap();
        drop(y);
        let mut grads = Grads::new(1);
        tape.backward(&loss, &mut grads).unwrap();
        drop((tape, ones));
        let after = pool::usage().lent - before;
        assert_eq!(after, BYTES, "only the gradient is left");
        (forward / BYTES, (pool::usage().peak - before) / BYTES)
    };
    let (kept, most) = peak(false);
    assert_eq!(kept, 4 * DEPTH + 1, "every value of the chain");
    // The walk back adds the constant and one gradient: each value is freed before the next.
    assert!(most <= 4 * DEPTH + 3, "{most} buffers");
    let (kept, most) = peak(true);
    assert_eq!(kept, 5, "the inputs of four pieces and the output");
    assert!(most <= 5 + DEPTH + 3, "{most} buffers");
}
