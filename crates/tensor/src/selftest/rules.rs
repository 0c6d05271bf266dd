//! What holds of tensors on a device whatever the op: ways there and back, recomputation,
//! gradients of variables used twice, and errors instead of wrong answers.

use tercet_attention::selftest::{Check, Row, ensure};

use super::{fault, poison, tensor};
use crate::{DType, Device, Error, Grads, Result, Tape, Tensor, ops};

pub(super) fn run(device: &Device, each: &mut dyn FnMut(Row)) {
    let mut row = |name: &str, check: fn(&Device) -> Result<Check<()>>| {
        let name = format!("{name} · {device}");
        each(Row::of("ops", name, |_| check(device).map_err(fault)?));
    };
    row("there and back, every type", there_and_back);
    row("conversion rounds as on the CPU", conversion);
    row("zeros are zeros", zeros);
    row("shared storage is not written", sharing);
    row("recomputation gives the same bits", recomputation);
    row("a loss scaled, gradients scaled", scaling);
    row("a captured graph reads new numbers", graphs);
    row("tensors of two devices are refused", two_devices);
    row("empty tensors", empty);
    row("integers made on the device", made_there);
    row("integers out of range are refused", out_of_range);
}

fn bits(x: &Tensor) -> Result<Vec<u32>> {
    Ok(x.to_vec_f32()?.into_iter().map(f32::to_bits).collect())
}

fn there_and_back(device: &Device) -> Result<Check<()>> {
    for len in [1, 7, 100_001] {
        let x = tensor(&[len], 1)?;
        let half = x.to_dtype(DType::BF16)?;
        for x in [&x, &half] {
            let there = x.to_device(device)?;
            let back = there.to_device(&Device::Cpu)?;
            if bits(x)? != bits(&back)? || there.shape() != x.shape() || there.dtype() != x.dtype()
            {
                return Ok(ensure(false, || format!("{x:?} came back changed")));
            }
        }
        let ids = Tensor::from_i32((0..len as i32).map(|i| i * 7 - 3).collect(), &[len])?;
        let back = ids.to_device(device)?.to_device(&Device::Cpu)?;
        if back.as_i32()? != ids.as_i32()? {
            return Ok(ensure(false, || format!("{ids:?} came back changed")));
        }
    }
    let item = Tensor::scalar(2.5).to_device(device)?.item()?;
    Ok(ensure(item == 2.5, || format!("{item} is not 2.5")))
}

fn conversion(device: &Device) -> Result<Check<()>> {
    // Halves between bf16 numbers, the smallest and largest, infinities, and random ones.
    let mut values = vec![
        0.0,
        -0.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::MAX,
        f32::MIN_POSITIVE / 4.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
    ];
    values.extend(super::numbers(5003, 9));
    let x = Tensor::from_f32(values.clone(), &[values.len()])?;
    let (there, here) = (x.to_device(device)?.to_dtype(DType::BF16)?, x.to_dtype(DType::BF16)?);
    let back = there.to_dtype(DType::F32)?;
    let same = bits(&there)? == bits(&here)? && bits(&back)? == bits(&here)?;
    let nan = Tensor::scalar(f32::NAN).to_device(device)?.to_dtype(DType::BF16)?.item()?;
    Ok(ensure(same && nan.is_nan(), || "other bits than the CPU's".into()))
}

fn zeros(device: &Device) -> Result<Check<()>> {
    poison(device)?;
    let mut clean = true;
    for dtype in [DType::F32, DType::BF16] {
        clean &= bits(&Tensor::zeros_on(device, dtype, &[1000, 33])?)?.iter().all(|&x| x == 0);
    }
    Ok(ensure(clean, || "something else".into()))
}

fn sharing(device: &Device) -> Result<Check<()>> {
    let x = tensor(&[500], 3)?.to_device(device)?;
    let before = bits(&x)?;
    let mut grads = Grads::new(1);
    grads.set(0, x.clone())?;
    grads.scale(3.0)?;
    let scaled = grads.get(0).map(bits).transpose()?;
    let kept = bits(&x)? == before && scaled.is_some_and(|s| s != before);
    Ok(ensure(kept, || "a write to a gradient reached its other owner".into()))
}

/// A small function of x and w that uses both twice.
fn network(tape: &mut Tape, vars: &[crate::Var]) -> Result<Vec<crate::Var>> {
    let hidden = ops::linear(tape, &vars[0], &vars[1], None)?;
    let gated = ops::swiglu(tape, &hidden, &vars[0])?;
    let sum = ops::add(tape, &gated, &vars[0])?;
    Ok(vec![ops::linear(tape, &sum, &vars[1], None)?])
}

fn recomputation(device: &Device) -> Result<Check<()>> {
    let (x, w) = (tensor(&[70, 48], 1)?.to_device(device)?, tensor(&[48, 48], 2)?);
    let w = w.to_device(device)?;
    let targets = Tensor::from_i32((0..70).map(|t| t % 48).collect(), &[70])?.to_device(device)?;
    let run = |again: bool| -> Result<Vec<Vec<u32>>> {
        let mut tape = Tape::recording();
        let vars = [tape.param(x.clone(), 0), tape.param(w.clone(), 1)];
        let y = match again {
            true => tape.recompute(&vars, network)?,
            false => network(&mut tape, &vars)?,
        };
        let loss = ops::linear_cross_entropy(&mut tape, &y[0], &vars[1], &targets)?;
        let mut grads = Grads::new(2);
        tape.backward(&loss, &mut grads)?;
        let mut found = vec![bits(loss.value())?];
        for gradient in grads.iter().flatten() {
            found.push(bits(gradient)?);
        }
        Ok(found)
    };
    let (kept, again) = (run(false)?, run(true)?);
    Ok(ensure(kept.len() == 3 && kept == again, || "other bits than without".into()))
}

fn scaling(device: &Device) -> Result<Check<()>> {
    let w = tensor(&[20, 16], 2)?.to_device(device)?;
    let x = tensor(&[30, 16], 1)?.to_device(device)?;
    let targets = Tensor::from_i32((0..30).map(|t| t % 20).collect(), &[30])?.to_device(device)?;
    let run = |in_loss: f32, after: f32| -> Result<Vec<u32>> {
        let mut tape = Tape::recording();
        let (x, w) = (tape.leaf(x.clone()), tape.param(w.clone(), 0));
        let loss = ops::linear_cross_entropy(&mut tape, &x, &w, &targets)?;
        let mut grads = Grads::new(1);
        tape.backward_scaled(&loss, in_loss, &mut grads)?;
        grads.scale(after)?;
        grads.get(0).map_or(Ok(Vec::new()), bits)
    };
    // Powers of two round nothing.
    let (one, two) = (run(0.25, 1.0)?, run(1.0, 0.25)?);
    Ok(ensure(!one.is_empty() && one == two, || "the factor is not where it belongs".into()))
}

fn graphs(device: &Device) -> Result<Check<()>> {
    let Device::Cuda(gpu) = device else { return Ok(Ok(())) };
    let (old, new) = (tensor(&[70, 48], 1)?, tensor(&[70, 48], 5)?);
    let (x, w) = (old.to_device(device)?, tensor(&[48, 48], 2)?.to_device(device)?);
    let run = |x: &Tensor| -> Result<Tensor> {
        let mut tape = Tape::inference();
        let vars = [tape.leaf(x.clone()), tape.leaf(w.clone())];
        let y = network(&mut tape, &vars)?;
        let y = ops::gelu(&mut tape, &y[0], ops::Gelu::Tanh)?;
        Ok(y.value().clone())
    };
    let expected = [bits(&run(&x)?)?, bits(&run(&new.to_device(device)?)?)?];
    let (graph, y) = gpu.capture(|| run(&x))?;
    let mut got = Vec::new();
    for numbers in [&old, &new] {
        x.overwrite(numbers)?;
        // What is allocated in between must not be where the graph works.
        let other = tensor(&[70, 48], 6)?.to_device(device)?;
        graph.launch()?;
        got.push(bits(&y)?);
        if bits(&other)? != bits(&tensor(&[70, 48], 6)?)? {
            return Ok(ensure(false, || "the graph wrote into another tensor".into()));
        }
    }
    Ok(ensure(got == expected, || "other bits than without a graph".into()))
}

fn two_devices(device: &Device) -> Result<Check<()>> {
    if *device == Device::Cpu {
        return Ok(Ok(()));
    }
    let (here, there) = (tensor(&[4, 4], 1)?, tensor(&[4, 4], 1)?.to_device(device)?);
    let mut tape = Tape::inference();
    let (a, b) = (tape.leaf(here), tape.leaf(there.clone()));
    let refused = [
        ops::add(&mut tape, &a, &b).err(),
        ops::linear(&mut tape, &a, &b, None).err(),
        there.as_f32().map(|_| ()).err(),
    ];
    let all = refused.iter().all(|e| matches!(e, Some(Error::Device { .. })));
    Ok(ensure(all, || format!("{refused:?}")))
}

fn empty(device: &Device) -> Result<Check<()>> {
    let (x, w) = (tensor(&[0, 8], 1)?.to_device(device)?, tensor(&[5, 8], 2)?.to_device(device)?);
    let mut tape = Tape::recording();
    let (x, w) = (tape.param(x, 0), tape.param(w, 1));
    let x2 = ops::add(&mut tape, &x, &x)?;
    let x2 = ops::scale(&mut tape, &x2, 2.0)?;
    let y = ops::linear(&mut tape, &x2, &w, None)?;
    let targets = Tensor::from_i32(Vec::new(), &[0])?.to_device(device)?;
    let loss = ops::linear_cross_entropy(&mut tape, &x2, &w, &targets)?;
    let mut grads = Grads::new(2);
    tape.backward(&loss, &mut grads)?;
    let none = grads.get(1).map(bits).transpose()?;
    let zero = none.is_some_and(|g| g.len() == 40 && g.iter().all(|&g| g == 0));
    let fine = y.shape() == [0, 5] && loss.value().item()? == 0.0 && zero;
    Ok(ensure(fine, || "the sum of nothing is not 0".into()))
}

/// Ids and positions that the host does not know, as in a captured graph: the same results, and
/// a row of NaN for an id that does not exist.
fn made_there(device: &Device) -> Result<Check<()>> {
    if *device == Device::Cpu {
        return Ok(Ok(()));
    }
    let list = |values: Vec<i32>| Tensor::from_i32(values, &[40]);
    let known = list((0..40).map(|t| t * 7 % 30).collect())?;
    let made = Tensor::zeros_on(device, DType::I32, &[40])?;
    made.overwrite(&known)?;
    let table = tensor(&[30, 64], 1)?.to_device(device)?;
    let angles = crate::RopeTable::plain(64, 10_000.0)?;
    let run = |ids: &Tensor| -> Result<Vec<Vec<u32>>> {
        let mut tape = Tape::recording();
        let table = tape.param(table.clone(), 0);
        let rows = ops::embedding(&mut tape, &table, ids)?.reshape(&[40, 1, 64])?;
        let turned = ops::rope(&mut tape, &rows, ids, &angles)?;
        let loss = super::weigh(&mut tape, std::slice::from_ref(&turned), device)?;
        let mut grads = Grads::new(1);
        tape.backward(&loss, &mut grads)?;
        let mut found = vec![bits(turned.value())?];
        for gradient in grads.iter().flatten() {
            found.push(bits(gradient)?);
        }
        Ok(found)
    };
    let (here, there) = (run(&known.to_device(device)?)?, run(&made)?);
    made.overwrite(&list((0..40).map(|t| [0, -1, 30, i32::MIN, i32::MAX][t % 5]).collect())?)?;
    let mut tape = Tape::inference();
    let table = tape.leaf(table.clone());
    let rows = ops::embedding(&mut tape, &table, &made)?.value().to_vec_f32()?;
    let marked = rows.chunks(64).enumerate().all(|(t, row)| match t % 5 {
        0 => row.iter().all(|x| x.is_finite()),
        _ => row.iter().all(|x| x.is_nan()),
    });
    let same = here.len() == 2 && here == there;
    Ok(ensure(same && marked, || format!("same numbers: {same}, missing ids marked: {marked}")))
}

fn out_of_range(device: &Device) -> Result<Check<()>> {
    let mut tape = Tape::inference();
    let table = tape.leaf(tensor(&[5, 8], 1)?.to_device(device)?);
    let heads = tape.leaf(tensor(&[2, 1, 8], 1)?.to_device(device)?);
    let angles = crate::RopeTable::plain(8, 10_000.0)?;
    let list = |values: Vec<i32>| Tensor::from_i32(values, &[2])?.to_device(device);
    let refused = [
        ops::embedding(&mut tape, &table, &list(vec![4, 5])?).err(),
        ops::embedding(&mut tape, &table, &list(vec![-1, 0])?).err(),
        ops::rope(&mut tape, &heads, &list(vec![0, -3])?, &angles).err(),
    ];
    let all = refused.iter().all(|e| matches!(e, Some(Error::Value { .. })));
    Ok(ensure(all, || format!("{refused:?}")))
}
