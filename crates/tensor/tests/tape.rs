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

type Op<'a> = &'a dyn Fn(&mut Tape, &[Var]) -> Result<Var>;

/// Gradients of `op`, used once or twice on the same values and parameters.
fn grads_of(op: Op, inputs: &[Tensor], uses: usize) -> Vec<Vec<f64>> {
    let mut tape = Tape::recording();
    // Every input is reached as a value, whose gradient ops add to in place, and, from its
    // own slot, as a parameter.
    let slots = 2 * inputs.len();
    let mut vars = vec![];
    for (slot, input) in inputs.iter().enumerate() {
        let param = tape.param(input.clone(), slot);
        vars.push(ops::scale(&mut tape, &param, 1.0).unwrap());
    }
    for (i, input) in inputs.iter().enumerate() {
        vars.push(tape.param(input.clone(), inputs.len() + i));
    }
    let mut total: Option<Var> = None;
    for _ in 0..uses {
        for vars in vars.chunks(inputs.len()) {
            let y = op(&mut tape, vars).unwrap();
            total = Some(match total {
                None => y,
                Some(sum) => ops::add(&mut tape, &sum, &y).unwrap(),
            });
        }
    }
    let (loss, _) = common::weigh(&mut tape, &total.unwrap()).unwrap();
    let mut grads = Grads::new(slots);
    tape.backward(&loss, &mut grads).unwrap();
    grads.iter().map(|g| g.map_or(vec![], common::wide)).collect()
}

#[test]
fn every_op_adds_to_the_gradient_that_is_there() {
    let ids = ints(&[1, 0, 1, 2]);
    let table = RopeTable::plain(6, 100.0).unwrap();
    let plan = {
        let tape = &mut Tape::inference();
        let logits = tape.leaf(tensor(&[4, 3], 3));
        ops::moe_route(tape, &logits, 2, false).unwrap().plan
    };
    let spec = tercet_tensor::NsaSpec { window: 2, ..Default::default() };
    let linear_phi = |x: &[Var]| ops::Phi::Linear { weight: x[1].clone(), pe: x[2].clone() };
    let short = tercet_tensor::NsaSpec {
        compress_block: 2,
        compress_stride: 1,
        select_block: 2,
        select_count: 2,
        select_initial: 1,
        select_local: 1,
        ..Default::default()
    };
    let nsa = |x: &[Var]| ops::NsaVars {
        q: x[0].clone(),
        k_cmp: x[1].clone(),
        v_cmp: x[1].clone(),
        k_slc: x[2].clone(),
        v_slc: x[2].clone(),
        k_win: x[2].clone(),
        v_win: x[2].clone(),
        gate: x[3].clone(),
    };
    let flat: &[usize] = &[4, 6];
    let heads: &[usize] = &[4, 1, 6];
    let cases: [(&str, &[&[usize]], Op); 18] = [
        ("add", &[flat, flat], &|t, x| ops::add(t, &x[0], &x[1])),
        ("scale", &[flat], &|t, x| ops::scale(t, &x[0], 0.3)),
        ("sigmoid", &[flat], &|t, x| ops::sigmoid(t, &x[0])),
        ("gelu", &[flat], &|t, x| ops::gelu(t, &x[0], ops::Gelu::Exact)),
        ("swiglu", &[flat, flat], &|t, x| ops::swiglu(t, &x[0], &x[1])),
        ("rms_norm", &[flat, &[6]], &|t, x| ops::rms_norm(t, &x[0], &x[1], 0.01)),
        ("layer_norm", &[flat, &[6], &[6]], &|t, x| ops::layer_norm(t, &x[0], &x[1], &x[2], 0.01)),
        ("linear", &[flat, &[5, 6], &[5]], &|t, x| ops::linear(t, &x[0], &x[1], Some(&x[2]))),
        ("embedding", &[flat], &|t, x| ops::embedding(t, &x[0], &ids)),
        ("loss", &[flat, &[3, 6]], &|t, x| ops::linear_cross_entropy(t, &x[0], &x[1], &ids)),
        ("log-probs", &[flat, &[3, 6]], &|t, x| {
            Ok(ops::token_log_probs(t, &x[0], &x[1], &ids)?.log_probs)
        }),
        ("rope", &[heads], &|t, x| ops::rope(t, &x[0], &ids, &table)),
        ("attention", &[heads, heads, heads], &|t, x| {
            ops::attention_dense(t, &x[0], &x[1], &x[2], &[0, 4], Mask::Causal)
        }),
        ("nsa", &[heads, &[0, 1, 6], heads, &[4, 1, 3]], &|t, x| {
            ops::attention_nsa(t, &nsa(x), &spec, &[0, 4])
        }),
        ("compress", &[heads, &[1, 12, 6], &[1, 2, 6]], &|t, x| {
            ops::compress(t, &x[0], &linear_phi(x), &short, &[0, 4])
        }),
        ("route", &[&[4, 3]], &|t, x| Ok(ops::moe_route(t, &x[0], 2, true)?.weights)),
        ("gather", &[flat], &|t, x| ops::gather_rows(t, &x[0], &plan)),
        ("experts", &[&[8, 6], &[5, 6], &[4, 2]], &|t, x| {
            let weights = [x[1].clone(), x[1].clone(), x[1].clone()];
            let y = ops::expert_linear(t, &x[0], &weights, &plan)?;
            ops::scatter_rows(t, &y, &x[2], &plan)
        }),
    ];
    for (name, shapes, op) in cases {
        let inputs: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| tensor(s, i as u64 + 1)).collect();
        let once = grads_of(op, &inputs, 1);
        let twice = grads_of(op, &inputs, 2);
        let (values, params) = once.split_at(inputs.len());
        for (slot, (value, param)) in values.iter().zip(params).enumerate() {
            assert!(inputs[slot].is_empty() || value.iter().any(|&g| g != 0.0), "{name} {slot}");
            // Sums of a few dozen terms below 8, added in another order.
            let bound = 512.0 * common::ROUNDING;
            common::close(&format!("{name} {slot}, parameter"), param, value, bound, 0.0);
            let doubled: Vec<f64> = value.iter().map(|g| 2.0 * g).collect();
            let what = format!("{name} {slot}, twice");
            common::close(&what, &twice[slot], &doubled, bound, 0.0);
            common::close(&what, &twice[inputs.len() + slot], &doubled, bound, 0.0);
        }
    }
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
