//! Checks that several ops make.

use crate::{Device, Error, Result, Tensor, Var};

/// Refuses an input whose storage type differs from the first one's.
pub(super) fn same_dtype(
    op: &'static str,
    first: &Var,
    others: &[(&'static str, &Var)],
) -> Result<()> {
    for (what, var) in others {
        if var.dtype() != first.dtype() {
            let expected = match first.dtype() {
                crate::DType::F32 => "f32 like the first input",
                crate::DType::BF16 => "bf16 like the first input",
                crate::DType::I32 => "i32 like the first input",
            };
            return Err(Error::DType { op, what, expected, got: var.dtype() });
        }
    }
    Ok(())
}

/// Where all of these live; refuses one that lives elsewhere than the first.
pub(super) fn device(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<Device> {
    let Some(((_, first), others)) = tensors.split_first() else { return Ok(Device::Cpu) };
    let device = first.device();
    for (what, tensor) in others {
        let got = tensor.device();
        if got != device {
            return Err(Error::device(op, what, &device, &got));
        }
    }
    Ok(device)
}

/// Refuses an input of another shape.
pub(super) fn shape(
    op: &'static str,
    what: &'static str,
    got: &Tensor,
    expected: &[usize],
) -> Result<()> {
    if got.shape() == expected {
        return Ok(());
    }
    Err(Error::shape(op, what, format!("{expected:?}"), got.shape()))
}

/// Splits a shape into rows and the size of the last dimension.
pub(super) fn rows_of(
    op: &'static str,
    what: &'static str,
    shape: &[usize],
) -> Result<(usize, usize)> {
    match shape.split_last() {
        Some((&last, rest)) => Ok((rest.iter().product(), last)),
        None => Err(Error::shape(op, what, "at least one dimension", shape)),
    }
}

/// The sizes of a tensor of exactly `N` dimensions, named by `layout` in the error.
pub(super) fn dims<const N: usize>(
    op: &'static str,
    what: &'static str,
    tensor: &Tensor,
    layout: &str,
) -> Result<[usize; N]> {
    tensor.shape().try_into().map_err(|_| Error::shape(op, what, layout, tensor.shape()))
}

/// Refuses offsets that do not start at 0, decrease, or end elsewhere than at `tokens`.
pub(super) fn offsets(op: &'static str, cu_seqlens: &[i32], tokens: usize) -> Result<()> {
    tercet_attention::sequences(cu_seqlens, tokens).map_err(Error::attention(op))?;
    Ok(())
}

/// The integers of a tensor as the host knows them; `None` when they were made on a device.
pub(super) fn known<'t>(
    op: &'static str,
    what: &'static str,
    integers: &'t Tensor,
) -> Result<Option<&'t [i32]>> {
    match (integers.dtype(), integers.on_cuda()) {
        (crate::DType::I32, Some(_)) => Ok(integers.view_i32(op, what).ok()),
        _ => integers.view_i32(op, what).map(Some),
    }
}

/// The target that means "do not count this token".
pub(super) const IGNORED: i32 = -100;

/// The targets of `tokens` tokens, each [`IGNORED`] or in `0..vocab`.
pub(super) fn targets<'t>(
    op: &'static str,
    targets: &'t Tensor,
    tokens: usize,
    vocab: usize,
) -> Result<&'t [i32]> {
    shape(op, "targets", targets, &[tokens])?;
    let list = targets.view_i32(op, "targets")?;
    let wrong = |&t: &i32| t != IGNORED && (t < 0 || t as usize >= vocab);
    if let Some(at) = list.iter().position(wrong) {
        let text =
            format!("target {} of token {at} is neither {IGNORED} nor in 0..{vocab}", list[at]);
        return Err(Error::value(op, text));
    }
    Ok(list)
}

/// Tokens, width and vocabulary of x `[T, C]` and a head's weight `[vocab, C]` of x's type.
pub(super) fn head(op: &'static str, x: &Var, weight: &Var) -> Result<[usize; 3]> {
    let [tokens, width] = dims(op, "x", x.value(), "[T, C]")?;
    let [vocab, weight_width] = dims(op, "the weight", weight.value(), "[vocab, C]")?;
    same_dtype(op, x, &[("the weight", weight)])?;
    if weight_width != width {
        let expected = format!("[vocab, {width}] to fit x of shape {:?}", x.shape());
        return Err(Error::shape(op, "the weight", expected, weight.shape()));
    }
    Ok([tokens, width, vocab])
}
