//! AdamW, the gradients' norm and checkpoints: on a device the same bits as on the CPU.

use tercet_attention::selftest::{Check, Row, ensure};

use super::{fault, tensor};
use crate::{AdamW, AdamWConfig, DType, Device, Grads, Result, Tensor, clip};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

/// Sizes around the vectors and the blocks of a launch over many tensors.
const SHAPES: [&[usize]; 6] = [&[1], &[7, 3], &[4096], &[64, 129], &[3, 4099], &[2, 9000]];

const STEPS: u64 = 4;

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Row)) {
    for dtype in [DType::F32, DType::BF16] {
        let name = |what: &str| format!("{what} · {device} {dtype}");
        each(Row::of("ops", name("adamw, 4 steps, resumed after 2"), |_| adamw(device, dtype)));
    }
    each(Row::of("ops", format!("gradient norm · {device}"), |tally| {
        let grads = |device: &Device| gradients(1, device).and_then(|g| clip::global_norm(&g));
        let expected = grads(&Device::Cpu).map_err(fault)?;
        let (got, again) = (grads(device).map_err(fault)?, grads(device).map_err(fault)?);
        // f64 sums of at most 50,000 squares.
        tally.hold("norm", (got - expected).abs(), expected * 5e4 * f64::EPSILON);
        ensure(got.to_bits() == again.to_bits(), || "other bits when repeated".into())
    }));
}

fn gradients(step: u64, device: &Device) -> Result<Grads> {
    let mut grads = Grads::new(SHAPES.len());
    for (i, shape) in SHAPES.iter().enumerate() {
        // One parameter gets no gradient in every other step.
        if i != 2 || step.is_multiple_of(2) {
            grads.set(i, tensor(shape, 500 + 10 * step + i as u64)?.to_device(device)?)?;
        }
    }
    Ok(grads)
}

fn params(dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let param = |(i, shape): (usize, &&[usize])| {
        tensor(shape, 400 + i as u64)?.to_dtype(dtype)?.to_device(device)
    };
    SHAPES.iter().enumerate().map(param).collect()
}

/// The parameters as f32 after all steps, and the optimizer.
fn train(dtype: DType, device: &Device, resume_after: u64) -> Result<(Vec<Vec<f32>>, AdamW)> {
    let mut params = params(dtype, device)?;
    let decayed: Vec<bool> = (0..SHAPES.len()).map(|i| i % 2 == 0).collect();
    let mut optimizer = AdamW::new(CONFIG, &params, &decayed)?;
    for step in 0..STEPS {
        if step == resume_after {
            let state = optimizer.snapshot()?.into_owned();
            optimizer = AdamW::restore(CONFIG, &params, &decayed, state)?;
        }
        let rate = 1e-2 / (step + 1) as f64;
        optimizer.step(&mut params, &gradients(step, device)?, rate, 0.5)?;
    }
    Ok((params.iter().map(Tensor::to_vec_f32).collect::<Result<_>>()?, optimizer))
}

fn adamw(device: &Device, dtype: DType) -> Check<()> {
    let (expected, cpu) = train(dtype, &Device::Cpu, u64::MAX).map_err(fault)?;
    let (got, there) = train(dtype, device, 2).map_err(fault)?;
    for (i, (a, b)) in expected.iter().zip(&got).enumerate() {
        let at = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(at) = at {
            let (a, b) = (a[at], b[at]);
            return ensure(false, || format!("parameter {i}: {b:e} at {at}, the CPU has {a:e}"));
        }
    }
    let (cpu, there) = (cpu.snapshot().map_err(fault)?, there.snapshot().map_err(fault)?);
    ensure(cpu == there, || "the states of CPU and device differ".into())
}
