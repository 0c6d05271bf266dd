//! The main ops at the sizes of a small decoder: 2048 tokens, 256 channels, 8 heads.
//!
//! `cargo bench -p tercet-tensor`; `forward` is one op on a tape that records nothing,
//! `both` records it and walks back.

use criterion::{Criterion, criterion_group, criterion_main};
use tercet_tensor::{DType, Grads, Mask, Result, RopeTable, Tape, Tensor, Var, ops};

const TOKENS: usize = 2048;
const WIDTH: usize = 256;
const HIDDEN: usize = 688;
const HEADS: usize = 8;
const VOCAB: usize = 4096;

fn tensor(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let values = (0..count).map(|i| (i * 7919 % 1999) as f32 / 1000.0 - 1.0).collect();
    Tensor::from_f32(values, shape).expect("the count is the shape's")
}

fn ints(f: impl Fn(usize) -> usize) -> Tensor {
    let values = (0..TOKENS).map(|t| f(t) as i32).collect();
    Tensor::from_i32(values, &[TOKENS]).expect("one number a token")
}

type Op<'a> = &'a dyn Fn(&mut Tape, &[Var]) -> Result<Var>;

/// Times an op forward, and forward and backward with a gradient of 1 everywhere.
fn time(c: &mut Criterion, name: &str, shapes: &[&[usize]], op: Op) {
    for dtype in [DType::F32, DType::BF16] {
        let to = |s: &&[usize]| tensor(s).to_dtype(dtype).expect("floats convert");
        let inputs: Vec<Tensor> = shapes.iter().map(to).collect();
        let mut group = c.benchmark_group(name);
        group.bench_function(format!("forward {dtype}"), |b| {
            b.iter(|| {
                let mut tape = Tape::inference();
                let vars: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
                op(&mut tape, &vars).expect("the sizes fit")
            });
        });
        let mut grads = Grads::new(inputs.len());
        group.bench_function(format!("both {dtype}"), |b| {
            b.iter(|| both(op, &inputs, &mut grads).expect("the sizes fit"));
        });
        group.finish();
    }
}

fn both(op: Op, inputs: &[Tensor], grads: &mut Grads) -> Result<()> {
    let mut tape = Tape::recording();
    let vars: Vec<Var> =
        inputs.iter().enumerate().map(|(slot, x)| tape.param(x.clone(), slot)).collect();
    let y = op(&mut tape, &vars)?;
    let count = y.value().len();
    let loss = if count == 1 {
        y
    } else {
        let ones = tape.leaf(tensor(&[1, count]).to_dtype(y.dtype())?);
        ops::linear(&mut tape, &y.reshape(&[1, count])?, &ones, None)?
    };
    grads.zero();
    tape.backward(&loss, grads)
}

fn benches(c: &mut Criterion) {
    let table = RopeTable::plain(WIDTH / HEADS, 10000.0).expect("an even dimension");
    let positions = ints(|t| t);
    let ids = ints(|t| t * 31 % VOCAB);
    let cu = [0, TOKENS as i32];
    let flat: &[usize] = &[TOKENS, WIDTH];
    let hidden: &[usize] = &[TOKENS, HIDDEN];
    let heads: &[usize] = &[TOKENS, HEADS, WIDTH / HEADS];

    time(c, "add", &[flat, flat], &|t, x| ops::add(t, &x[0], &x[1]));
    time(c, "rms_norm", &[flat, &[WIDTH]], &|t, x| ops::rms_norm(t, &x[0], &x[1], 1e-5));
    time(c, "swiglu", &[hidden, hidden], &|t, x| ops::swiglu(t, &x[0], &x[1]));
    time(c, "gelu", &[hidden], &|t, x| ops::gelu(t, &x[0], ops::Gelu::Exact));
    time(c, "rope", &[heads], &|t, x| ops::rope(t, &x[0], &positions, &table));
    time(c, "embedding", &[&[VOCAB, WIDTH]], &|t, x| ops::embedding(t, &x[0], &ids));
    time(c, "linear", &[flat, &[HIDDEN, WIDTH]], &|t, x| ops::linear(t, &x[0], &x[1], None));
    time(c, "linear one row", &[&[1, WIDTH], &[HIDDEN, WIDTH]], &|t, x| {
        ops::linear(t, &x[0], &x[1], None)
    });
    time(c, "attention_dense", &[heads, heads, heads], &|t, x| {
        ops::attention_dense(t, &x[0], &x[1], &x[2], &cu, Mask::Causal)
    });
    time(c, "linear_cross_entropy", &[flat, &[VOCAB, WIDTH]], &|t, x| {
        ops::linear_cross_entropy(t, &x[0], &x[1], &ids)
    });
}

criterion_group!(all, benches);
criterion_main!(all);
