"""The operators that users call."""

import operator
from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import _cuda, _native, _ops
from .phi import Phi, phi_tensors
from .spec import Spec, blocks_of

Offsets = Union[Tensor, Sequence[int], None]


def _check_tensor(name: str, tensor: object, dims: Optional[int] = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {dims} dimensions")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: strides {list(tensor.stride())} of shape {list(tensor.shape)} are not "
            f"contiguous; pass {name}.contiguous()"
        )


def _spec(spec: Optional[Spec]) -> Spec:
    if spec is None:
        return Spec()
    if not isinstance(spec, Spec):
        raise TypeError(f"spec: expected a tercet.Spec, got {type(spec).__name__}")
    return spec


def _scale(scale: Optional[float], q: Tensor) -> float:
    if scale is not None:
        return float(scale)
    if q.shape[-1] == 0:
        raise ValueError(f"q: shape {list(q.shape)}, expected a key dim of at least 1")
    return q.shape[-1] ** -0.5


def _offsets(cu_seqlens: Offsets) -> Optional[Tensor]:
    """Offsets as an int32 tensor on the host; numbers that do not fit are refused."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        try:
            numbers = [operator.index(offset) for offset in cu_seqlens]
            cu_seqlens = torch.tensor(numbers, dtype=torch.int64)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"cu_seqlens: {error}") from None
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens: shape {list(cu_seqlens.shape)}, expected [B + 1]")
    # On the host before narrowing: a wrapped offset would look like a small one.
    cu_seqlens = cu_seqlens.cpu()
    if cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    return cu_seqlens.contiguous()


def _flatten(
    names: Sequence[str], tensors: Sequence[Tensor], cu_seqlens: Offsets
) -> Tuple[List[Tensor], Optional[int]]:
    """``[B, T, ...]`` tensors as ``[B * T, ...]``, and B; None for tensors without a batch."""
    for name, tensor in zip(names, tensors):
        _check_tensor(name, tensor)
    dims = tensors[0].dim()
    if dims not in (3, 4):
        shape = list(tensors[0].shape)
        raise ValueError(f"{names[0]}: shape {shape}, expected [T, H, D] or [B, T, H, D]")
    for name, tensor in zip(names, tensors):
        if tensor.dim() != dims:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}, expected {dims} dimensions like {names[0]}"
            )
    if dims == 3:
        return list(tensors), None
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: given with a batch dimension; concatenate the sequences")
    batch = tensors[0].shape[0]
    for name, tensor in zip(names, tensors):
        if tensor.shape[0] != batch:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}, expected a batch of {batch} like {names[0]}"
            )
    if batch == 0:
        raise ValueError(f"{names[0]}: a batch of 0 sequences, expected at least 1")
    return [tensor.flatten(0, 1) for tensor in tensors], batch


def nsa(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gate: Tensor,
    cu_seqlens: Offsets = None,
    spec: Optional[Spec] = None,
    *,
    scale: Optional[float] = None,
    indices: Optional[Tensor] = None,
    return_indices: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Native sparse attention: compressed, selected and window branches, blended by gates.

    T tokens of all sequences together, H query heads, K key/value heads (H a multiple of K), D key
    dim, V value dim, N compressed blocks of all sequences together, S = ``spec.select_count``.
    All tensors are contiguous and share one dtype (float32, bfloat16; float16 on CUDA) and device.
    Sharing keys and values between branches is passing the same tensor twice. Position encodings
    are the caller's: rope ``q``, ``k_slc``, ``k_win`` and ``k_cmp`` (at :func:`block_positions`).

    Args:
        q: Queries ``[T, H, D]``, or ``[B, T, H, D]`` for B sequences of one length (then every
            tensor has a batch dimension and ``cu_seqlens`` is None).
        k_cmp: Compressed keys ``[N, K, D]``, made by :func:`compress`.
        v_cmp: Compressed values ``[N, K, V]``.
        k_slc: Keys of the selected branch ``[T, K, D]``.
        v_slc: Values of the selected branch ``[T, K, V]``.
        k_win: Keys of the window branch ``[T, K, D]``.
        v_win: Values of the window branch ``[T, K, V]``.
        gate: Gates after the sigmoid ``[T, H, 3]``: cmp, slc, win.
        cu_seqlens: Offsets ``[B + 1]`` of concatenated sequences, from 0 to T; blocks restart at
            each. A list or a CPU tensor costs no synchronisation. None is one sequence.
        spec: Blocks, counts and window; the paper's by default.
        scale: Of the logits; 1/sqrt(D) by default.
        indices: A choice of blocks to use instead of one's own, int32 ``[T, K, S]``: ascending
            blocks of the query's sequence, -1 padded. See :mod:`tercet.layouts`.
        return_indices: Also return the blocks chosen.

    Returns:
        ``[T, H, V]`` (or ``[B, T, H, V]``), and the choice ``[T, K, S]`` when asked for.
        Differentiable in all eight tensors; no gradient flows through the choice.

    Raises:
        ValueError: An argument that does not fit, named first in the message.
    """
    spec = _spec(spec)
    names = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"]
    tensors = [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]
    tensors, batch = _flatten(names, tensors, cu_seqlens)
    if indices is not None:
        _check_tensor("indices", indices, 3 if batch is None else 4)
        indices = indices if batch is None else indices.flatten(0, 1)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    choose = save or return_indices
    if q.device.type == "cuda" and (choose or indices is not None):
        save = choose = True  # the kernels that keep a choice keep the branches, too
    out, chosen, *_ = _ops.nsa_forward(
        *tensors,
        _offsets(cu_seqlens),
        indices,
        1 if batch is None else batch,
        spec.numbers(),
        _scale(scale, q),
        save,
        choose,
    )
    if batch is not None:
        out = out.unflatten(0, q.shape[:2])
    if not return_indices:
        return out
    return out, chosen if batch is None else chosen.unflatten(0, q.shape[:2])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Offsets = None,
    window: Optional[int] = None,
    *,
    scale: Optional[float] = None,
    return_lse: bool = False,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Causal attention, over all keys before a query or over a window of them.

    Args:
        q: Queries ``[T, H, D]`` or ``[B, T, H, D]``.
        k: Keys ``[T, K, D]``; H is a multiple of K.
        v: Values ``[T, K, V]``.
        cu_seqlens: Offsets of concatenated sequences, see :func:`nsa`.
        window: Keys a query sees, its own included; None is all.
        scale: Of the logits; 1/sqrt(D) by default.
        return_lse: Also return the natural-log sums of exponentials, float32 ``[T, H]``; no
            gradient flows through them.

    Returns:
        ``[T, H, V]`` (or ``[B, T, H, V]``), differentiable in q, k and v.

    Raises:
        ValueError: An argument that does not fit, named first in the message.
    """
    tensors, batch = _flatten(["q", "k", "v"], [q, k, v], cu_seqlens)
    if window is not None:
        window = int(window)
        if not 1 <= window < 1 << 31:
            raise ValueError(f"window: {window} keys, expected 1 to 2147483647")
    out, lse = _ops.attend_forward(
        *tensors, _offsets(cu_seqlens), 1 if batch is None else batch, window, _scale(scale, q)
    )
    lse = lse.to(torch.float32) if return_lse else lse
    if batch is not None:
        out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])
    return (out, lse) if return_lse else out


def compress(
    x: Tensor, phi: Phi = None, cu_seqlens: Offsets = None, spec: Optional[Spec] = None
) -> Tensor:
    """Blocks of ``spec.compress_block`` tokens, ``spec.compress_stride`` apart, as one row each.

    Args:
        x: Keys or values ``[T, K, C]``, or ``[B, T, K, C]``.
        phi: None for the average, or :class:`LinearPhi` or :class:`MlpPhi`.
        cu_seqlens: Offsets of concatenated sequences, see :func:`nsa`.
        spec: Block and stride; the paper's by default.

    Returns:
        ``[N, K, C]``, sequences concatenated, or ``[B, N, K, C]``; a tail shorter than a block is
        dropped. Differentiable in x and in phi's tensors.

    Raises:
        ValueError: An argument that does not fit, named first in the message.
    """
    spec = _spec(spec)
    (flat,), batch = _flatten(["x"], [x], cu_seqlens)
    params = phi_tensors(phi)
    for name, tensor in params:
        _check_tensor(name, tensor)
    tensors = [tensor for _, tensor in params]
    run = _cuda.compress if x.device.type == "cuda" else _ops.compress_forward
    out = run(flat, tensors, _offsets(cu_seqlens), 1 if batch is None else batch, spec.numbers())
    if batch is not None:
        blocks = blocks_of(x.shape[1], spec.compress_block, spec.compress_stride)
        out = out.view(batch, blocks, *x.shape[2:])
    return out


def block_positions(
    tokens: int, cu_seqlens: Offsets = None, spec: Optional[Spec] = None, device=None
) -> Tensor:
    """Where compressed blocks start within their sequences, int64 ``[N]``.

    The position at which a compressed key is roped, when it is made of raw keys.
    """
    spec = _spec(spec)
    offsets = _offsets(cu_seqlens)
    if offsets is None:
        starts = torch.arange(spec.compressed_blocks(tokens), device=device)
        return starts * spec.compress_stride
    blocks = _native.compressed_blocks(spec.numbers(), _ops.capsule(offsets), 1, tokens)
    lengths = offsets.diff().tolist()
    parts = [torch.arange(spec.compressed_blocks(length)) for length in lengths]
    starts = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    assert starts.numel() == blocks
    return (starts * spec.compress_stride).to(device)
