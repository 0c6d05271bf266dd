//! The tape: sums of gradients, recomputation, memory, threads.

mod common;

use common::{ints, refusal, tensor, threads};
use tercet_tensor::{DType, Grads, Mask, Result, RopeTable, Tape, Tensor, Var, ops};

const TOKENS: usize = 70;
const WIDTH: usize = 24;
const HEADS: usize = 3;

/// Weights of a small decoder layer with experts and a tied head.
fn params(dtype: DType) -> Vec<Tensor> {
    let shapes: [&[usize]; 13] = [
        &[50, WIDTH],
        &[WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH, WIDTH],
        &[WIDTH],
        &[WIDTH],
        &[3, WIDTH],
        &[40, WIDTH],
        &[40, WIDTH],
        &[40, WIDTH],
        &[WIDTH, 40],
    ];
    let tensors = shapes.iter().enumerate().map(|(i, s)| tensor(s, i as u64));
    tensors.map(|t| t.to_dtype(dtype).unwrap()).collect()
}

/// One layer: attention, then experts.
fn layer<'a>(tape: &mut Tape<'a>, x: &Var, params: &'a [Tensor]) -> Result<Vec<Var>> {
    let p = |tape: &Tape, slot: usize| tape.param(params[slot].clone(), slot);
    let rope = RopeTable::plain(WIDTH / HEADS, 10000.0)?;
    let cu = [0, 30, TOKENS as i32];
    let positions: Vec<i32> = (0..30).chain(0..TOKENS as i32 - 30).collect();
    let w = p(tape, 1);
    let y = ops::rms_norm(tape, x, &w, 1e-5)?;
    let mut heads = vec![];
    for slot in 2..5 {
        let w = p(tape, slot);
        let y = ops::linear(tape, &y, &w, None)?;
        heads.push(y.reshape(&[TOKENS, HEADS, WIDTH / HEADS])?);
    }
    let q = ops::rope(tape, &heads[0], &ints(&positions), &rope)?;
    let k = ops::rope(tape, &heads[1], &ints(&positions), &rope)?;
    let y = ops::attention_dense(tape, &q, &k, &heads[2], &cu, Mask::Window(9))?;
    let w = p(tape, 5);
    let y = ops::linear(tape, &y.reshape(&[TOKENS, WIDTH])?, &w, None)?;
    let x = ops::add(tape, x, &y)?;
    let (w, b, router) = (p(tape, 6), p(tape, 7), p(tape, 8));
    let y = ops::layer_norm(tape, &x, &w, &b, 1e-5)?;
    let logits = ops::linear(tape, &y, &router, None)?;
    let routing = ops::moe_route(tape, &logits, 2, true)?;
    let rows = ops::gather_rows(tape, &y, &routing.plan)?;
    let experts: Vec<Var> = (9..12).map(|slot| p(tape, slot)).collect();
    let h = ops::expert_linear(tape, &rows, &experts, &routing.plan)?;
    let h = ops::swiglu(tape, &h, &h)?;
    let down = p(tape, 12);
    let y = ops::linear(tape, &h, &down, None)?;
    let y = ops::scatter_rows(tape, &y, &routing.weights, &routing.plan)?;
    Ok(vec![ops::add(tape, &x, &y)?, routing.balance])
}

/// Loss and gradients of two such layers that share their weights.
fn step(params: &[Tensor], recompute: bool) -> (f32, Grads) {
    let mut tape = Tape::recording();
    let ids: Vec<i32> = (0..TOKENS as i32).map(|i| i * 7 % 50).collect();
    let targets: Vec<i32> = (0..TOKENS as i32).map(|i| (i * 11 + 3) % 50).collect();
    let table = tape.param(params[0].clone(), 0);
    let mut x = ops::embedding(&mut tape, &table, &ints(&ids)).unwrap();
    let mut balances = vec![];
    for _ in 0..2 {
        let mut outputs = if recompute {
            tape.recompute(&[x], move |tape, x| layer(tape, &x[0], params)).unwrap()
        } else {
            layer(&mut tape, &x, params).unwrap()
        };
        balances.extend(outputs.pop());
        x = outputs.remove(0);
    }
    let mut loss = ops::linear_cross_entropy(&mut tape, &x, &table, &ints(&targets)).unwrap();
    for balance in &balances {
        let scaled = ops::scale(&mut tape, balance, 0.01).unwrap();
        loss = ops::add(&mut tape, &loss, &scaled).unwrap();
    }
    drop((x, balances));
    let mut grads = Grads::new(params.len());
    tape.backward(&loss, &mut grads).unwrap();
    (loss.value().item().unwrap(), grads)
}

fn bits(grads: &Grads) -> Vec<Vec<u32>> {
    let bits = |g: &Tensor| g.as_f32().unwrap().iter().map(|x| x.to_bits()).collect();
    grads.iter().map(|g| bits(g.expect("every parameter is reached"))).collect()
}

#[test]
fn recomputation_gives_the_same_bits() {
    for dtype in [DType::F32, DType::BF16] {
        let params = params(dtype);
        let (plain_loss, plain) = step(&params, false);
        let (loss, again) = step(&params, true);
        assert_eq!(plain_loss.to_bits(), loss.to_bits());
        assert!(bits(&plain) == bits(&again), "{dtype}");
    }
}

#[test]
fn repeats_and_any_number_of_threads_give_the_same_bits() {
    let params = params(DType::F32);
    let one = threads(1, || step(&params, false));
    for count in [1, 2, 3, 8] {
        let (loss, grads) = threads(count, || step(&params, false));
        assert_eq!(one.0.to_bits(), loss.to_bits());
        assert!(bits(&one.1) == bits(&grads), "{count} threads");
    }
}

#[test]
fn gradients_of_two_walks_add_up_and_zero_forgets() {
    let w = tensor(&[2, 3], 1);
    let mut grads = Grads::new(1);
    let walk = |grads: &mut Grads, scale: f32| {
        let mut tape = Tape::recording();
        let x = tape.leaf(tensor(&[1, 3], 2));
        let weight = tape.param(w.clone(), 0);
        let y = ops::linear(&mut tape, &x, &weight, None).unwrap();
        let (loss, _) = common::weigh(&mut tape, &y).unwrap();
        tape.backward_scaled(&loss, scale, grads).unwrap();
        grads.get(0).unwrap().to_vec_f32().unwrap()
    };
    let once = walk(&mut grads, 1.0);
    let thrice = walk(&mut grads, 2.0);
    for (one, three) in once.iter().zip(&thrice) {
        // Twice and once are exact; their sum is rounded once.
        assert_eq!(*three, one + 2.0 * one);
    }
    grads.zero();
    assert!(grads.get(0).is_none());
    assert_eq!(walk(&mut grads, 1.0), once);
    grads.scale(0.5).unwrap();
    let half: Vec<f32> = once.iter().map(|g| 0.5 * g).collect();
    assert_eq!(grads.get(0).unwrap().as_f32().unwrap(), half);
}

#[test]
fn a_value_used_twice_gets_both_gradients() {
    let mut tape = Tape::recording();
    let x = tape.param(tensor(&[1, 4], 1), 0);
    let x = ops::scale(&mut tape, &x, 1.0).unwrap();
    let y = ops::scale(&mut tape, &x, 3.0).unwrap();
    let y = ops::add(&mut tape, &y, &x).unwrap();
    let y = ops::add(&mut tape, &y, &y).unwrap();
    let (loss, c) = common::weigh(&mut tape, &y).unwrap();
    let mut grads = Grads::new(1);
    tape.backward(&loss, &mut grads).unwrap();
    let want: Vec<f64> = c.iter().map(|c| 8.0 * c).collect();
    assert_eq!(common::wide(grads.get(0).unwrap()), want);
}

#[test]
fn constants_and_inference_record_nothing() {
    let mut tape = Tape::recording();
    let x = tape.leaf(tensor(&[1, 4], 1));
    let (loss, _) = common::weigh(&mut tape, &x).unwrap();
    let mut grads = Grads::new(1);
    tape.backward(&loss, &mut grads).unwrap();
    assert!(grads.get(0).is_none());

    let mut tape = Tape::inference();
    let x = tape.param(tensor(&[1, 4], 1), 0);
    let (loss, _) = common::weigh(&mut tape, &x).unwrap();
    let text = refusal(tape.backward(&loss, &mut grads));
    assert_eq!(text, "tape: backward on a tape that does not record");
}

#[test]
fn misuse_is_an_error_not_a_wrong_gradient() {
    let mut tape = Tape::recording();
    let x = tape.param(tensor(&[1, 4], 1), 0);
    assert!(refusal(x.reshape(&[4])).contains("a parameter cannot be reshaped"));
    let y = ops::scale(&mut tape, &x, 2.0).unwrap();
    let mut grads = Grads::new(1);
    assert!(refusal(tape.backward(&y, &mut grads)).contains("expected one element"));
    let (loss, _) = common::weigh(&mut tape, &y).unwrap();

    let mut other = Tape::recording();
    assert!(refusal(ops::scale(&mut other, &y, 2.0)).contains("a variable of another tape"));
    let outside = y.clone();
    let captured = other.recompute(&[], move |tape, _| Ok(vec![ops::scale(tape, &outside, 1.0)?]));
    assert!(refusal(captured).contains("pass it to recompute as an input"));

    tape.backward(&loss, &mut grads).unwrap();
    assert!(refusal(tape.backward(&loss, &mut grads)).contains("already run"));
    let mut tape = Tape::recording();
    let x = tape.param(tensor(&[1, 4], 1), 7);
    let (loss, _) = common::weigh(&mut tape, &x).unwrap();
    let text = refusal(tape.backward(&loss, &mut grads));
    assert_eq!(text, "grads: slot 7 does not exist; there are 1");
}
