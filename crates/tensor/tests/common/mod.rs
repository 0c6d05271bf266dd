//! Checks an op against its formula in f64: values directly, gradients by central differences.

#![allow(dead_code, reason = "every test binary uses its own part of this")]

use tercet_tensor::{DType, Grads, Result, Tape, Tensor, Var, ops};

/// Half the distance between 1 and the next f32: one rounding.
pub const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// One rounding to bf16.
pub const ROUNDING_BF16: f64 = 1.0 / 256.0;

/// Numbers in `-1..1`, the same for the same seed.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A tensor of [`numbers`].
pub fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_f32(numbers(shape.iter().product(), seed), shape).unwrap()
}

pub fn ints(values: &[i32]) -> Tensor {
    Tensor::from_i32(values.to_vec(), &[values.len()]).unwrap()
}

pub fn wide(x: &Tensor) -> Vec<f64> {
    x.to_vec_f32().unwrap().into_iter().map(f64::from).collect()
}

/// `Σ y·c` with fixed random c, so that every output has a gradient of its own. Returns the loss
/// and c.
pub fn weigh(tape: &mut Tape, y: &Var) -> Result<(Var, Vec<f64>)> {
    let count = y.value().len();
    let c = tensor(&[1, count], 4242).to_dtype(y.dtype())?;
    let exact = wide(&c);
    let c = tape.leaf(c);
    let loss = ops::linear(tape, &y.reshape(&[1, count])?, &c, None)?;
    Ok((loss, exact))
}

/// One op, its formula, and how far f32 may be off.
pub struct Check<'a> {
    pub op: &'a dyn Fn(&mut Tape, &[Var]) -> Result<Var>,
    pub exact: &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>,
    pub inputs: &'a [Tensor],
    /// Absolute bound of an output's error in f32.
    pub value_bound: f64,
    /// Absolute bound of a gradient's error in f32.
    pub grad_bound: f64,
    /// For several ops in a row: the sum of magnitudes of what they store for one another, each
    /// of which is rounded in bf16. 0 for a single op.
    pub stored: f64,
}

impl Check<'_> {
    /// Checks values and gradients in f32, then in bf16, where every result is rounded once more
    /// on each of the few stores of the path.
    pub fn run(&self) {
        self.run_as(DType::F32, 0.0);
        self.run_as(DType::BF16, 2.0 * ROUNDING_BF16);
    }

    fn run_as(&self, dtype: DType, relative: f64) {
        let inputs: Vec<Tensor> = self.inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let exact: Vec<Vec<f64>> = inputs.iter().map(wide).collect();
        let mut tape = Tape::recording();
        let vars: Vec<Var> =
            inputs.iter().enumerate().map(|(i, x)| tape.param(x.clone(), i)).collect();
        let y = (self.op)(&mut tape, &vars).unwrap();
        assert!(y.dtype() == dtype || y.value().len() == 1, "the op changed the storage type");
        close(
            "value",
            &wide(y.value()),
            &(self.exact)(&exact),
            self.value_bound + relative * self.stored,
            relative,
        );

        let (loss, c) = weigh(&mut tape, &y).unwrap();
        let mut grads = Grads::new(inputs.len());
        tape.backward(&loss, &mut grads).unwrap();
        let total =
            |x: &[Vec<f64>]| -> f64 { (self.exact)(x).iter().zip(&c).map(|(y, c)| y * c).sum() };
        for (slot, input) in inputs.iter().enumerate() {
            let got = match grads.get(slot) {
                Some(gradient) => {
                    assert_eq!(gradient.shape(), input.shape());
                    assert_eq!(gradient.dtype(), DType::F32);
                    wide(gradient)
                }
                None => vec![0.0; input.len()],
            };
            let want = slopes(&exact, slot, &total);
            // The products with c may be large where they cancel: bounded by the largest slope.
            let most = want.iter().fold(1.0f64, |m, w| m.max(w.abs()));
            let bound = self.grad_bound + relative * (most + self.stored);
            close(&format!("gradient {slot}"), &got, &want, bound, relative);
        }
    }
}

/// Central differences of `f` by every element of input `slot`.
pub fn slopes(inputs: &[Vec<f64>], slot: usize, f: &dyn Fn(&[Vec<f64>]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut moved = inputs.to_vec();
    (0..inputs[slot].len())
        .map(|i| {
            let x = inputs[slot][i];
            moved[slot][i] = x + STEP;
            let up = f(&moved);
            moved[slot][i] = x - STEP;
            let down = f(&moved);
            moved[slot][i] = x;
            (up - down) / (2.0 * STEP)
        })
        .collect()
}

/// Asserts `|got − want| ≤ bound + relative·|want|`, and a little for the differences' own error.
pub fn close(what: &str, got: &[f64], want: &[f64], bound: f64, relative: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let allowed = bound + relative * w.abs() + 1e-8 * (1.0 + w.abs());
        assert!((g - w).abs() <= allowed, "{what} {i}: got {g}, want {w}, allowed {allowed:e}");
    }
}

/// The message of an op that must refuse.
pub fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("the op took what it must refuse"),
        Err(error) => error.to_string(),
    }
}

/// A pool of exactly `count` threads.
pub fn threads<T: Send>(count: usize, f: impl FnOnce() -> T + Send) -> T {
    let mut pool = rayon::ThreadPoolBuilder::new();
    pool = pool.num_threads(count);
    pool.build().unwrap().install(f)
}
