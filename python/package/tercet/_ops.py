"""The operators as PyTorch knows them: ``torch.ops.tercet.*`` with fake kernels and autograd.

Everything here is internal; ``functional.py`` is what users call. Outputs are allocated by PyTorch
and written in place by the native module, which reads and writes tensors through DLPack.
"""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from . import _native
from ._cuda import check_choice, prepare_cuda, warn_once_about_cache
from .spec import blocks_of

# Inputs arrive as they were given: a graph compiler may not choose other strides for them.
_TAGS = (torch.Tag.needs_fixed_stride_order,)


def capsule(tensor: Tensor) -> object:
    """A tensor for the native module."""
    return to_dlpack(tensor.detach())


def capsules(tensors: Sequence[Tensor]) -> List[object]:
    """Tensors for the native module."""
    return [capsule(tensor) for tensor in tensors]


def host_offsets(cu_seqlens: Optional[Tensor]) -> Optional[object]:
    """Sequence offsets for the native module, which reads them on the host."""
    return None if cu_seqlens is None else capsule(cu_seqlens.cpu())


def stream_of(tensor: Tensor) -> int:
    """PyTorch's current stream on the tensor's device, as the native module takes it."""
    if tensor.device.type != "cuda":
        return 0
    prepare_cuda()
    warn_once_about_cache()
    if torch.cuda.is_current_stream_capturing():
        _native.capturing(tensor.device.index)
    return torch.cuda.current_stream(tensor.device).cuda_stream


def sums_dtype(device: torch.device) -> torch.dtype:
    """The type in which sums of exponentials are kept between forward and backward."""
    return torch.float64 if device.type == "cpu" else torch.float32


# --- the whole operator ---------------------------------------------------------------------------


def _nsa_outputs(
    q: Tensor, v: Tensor, spec: List[int], save: bool, choose: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [T, H, V], indices [T, K, S], then what the backward needs; empty what is not asked for."""
    tokens, heads, kv_heads, value_dim = q.shape[0], q.shape[1], v.shape[1], v.shape[2]
    rows, heads_saved = (tokens, heads) if save else (0, 0)
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype

    def branch() -> Tensor:
        return q.new_empty((rows, heads_saved, value_dim), dtype=dtype)

    def sums() -> Tensor:
        return q.new_empty((rows, heads_saved), dtype=sums_dtype(q.device))

    return (
        q.new_empty((tokens, heads, value_dim)),
        q.new_empty((tokens if choose else 0, kv_heads, spec[3]), dtype=torch.int32),
        branch(),
        branch(),
        branch(),
        sums(),
        sums(),
        sums(),
    )


@torch.library.custom_op("tercet::nsa_forward", mutates_args=(), tags=_TAGS)
def nsa_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gate: Tensor,
    cu_seqlens: Optional[Tensor],
    indices: Optional[Tensor],
    batch: int,
    spec: List[int],
    scale: float,
    save: bool,
    choose: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _nsa_outputs(q, v_slc, spec, save, choose)
    out, chosen, *saved = outputs
    stream, offsets = stream_of(q), host_offsets(cu_seqlens)
    if indices is not None and indices.device.type == "cuda":
        check_choice(indices, cu_seqlens, batch, spec)
    _native.nsa_forward(
        stream,
        spec,
        scale,
        offsets,
        batch,
        capsules((q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate)),
        None if indices is None else capsule(indices),
        capsule(out),
        capsule(chosen) if choose else None,
        capsules(saved) if save else None,
    )
    if choose and indices is not None and indices.device.type == "cuda":
        chosen.copy_(indices)  # the device reads the given choice and writes none
    return outputs


@nsa_forward.register_fake
def _(
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate, cu_seqlens, indices, batch, spec, scale,
    save, choose,
):
    return _nsa_outputs(q, v_slc, spec, save, choose)


@torch.library.custom_op("tercet::nsa_backward", mutates_args=(), tags=_TAGS)
def nsa_backward(
    d_out: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gate: Tensor,
    cu_seqlens: Optional[Tensor],
    out: Tensor,
    indices: Tensor,
    out_cmp: Tensor,
    out_slc: Tensor,
    out_win: Tensor,
    lse_cmp: Tensor,
    lse_slc: Tensor,
    lse_win: Tensor,
    batch: int,
    spec: List[int],
    scale: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate)
    grads = tuple(torch.empty_like(tensor) for tensor in inputs)
    _native.nsa_backward(
        stream_of(q),
        spec,
        scale,
        host_offsets(cu_seqlens),
        batch,
        capsules(inputs),
        capsule(indices),
        capsules((out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win)),
        capsule(d_out),
        capsules(grads),
    )
    return grads


@nsa_backward.register_fake
def _(
    d_out, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate, cu_seqlens, out, indices,
    out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, batch, spec, scale,
):
    inputs = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate)
    return tuple(torch.empty_like(tensor) for tensor in inputs)


def _nsa_setup(ctx, inputs, output) -> None:
    *tensors, cu_seqlens, _, ctx.batch, ctx.spec, ctx.scale, ctx.saved, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, cu_seqlens, *output)


def _nsa_grads(ctx, d_out, *_):
    nothing = (None,) * 7
    if d_out is None:
        return (None,) * 8 + nothing
    if not ctx.saved:
        raise RuntimeError("tercet::nsa_forward was called with save=False: no backward")
    grads = nsa_backward(
        d_out.contiguous(), *ctx.saved_tensors, ctx.batch, ctx.spec, ctx.scale
    )
    return (*grads, *nothing)


nsa_forward.register_autograd(_nsa_grads, setup_context=_nsa_setup)


# --- dense and window attention -------------------------------------------------------------------


def _attend_outputs(q: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[0], q.shape[1]), dtype=sums_dtype(q.device))


@torch.library.custom_op("tercet::attend_forward", mutates_args=(), tags=_TAGS)
def attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Optional[Tensor],
    batch: int,
    window: Optional[int],
    scale: float,
) -> Tuple[Tensor, Tensor]:
    out, lse = _attend_outputs(q, v)
    _native.attend_forward(
        stream_of(q),
        scale,
        window,
        host_offsets(cu_seqlens),
        batch,
        capsules((q, k, v)),
        capsule(out),
        capsule(lse),
    )
    return out, lse


@attend_forward.register_fake
def _(q, k, v, cu_seqlens, batch, window, scale):
    return _attend_outputs(q, v)


@torch.library.custom_op("tercet::attend_backward", mutates_args=(), tags=_TAGS)
def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    batch: int,
    window: Optional[int],
    scale: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _native.attend_backward(
        stream_of(q),
        scale,
        window,
        host_offsets(cu_seqlens),
        batch,
        capsules((q, k, v)),
        capsule(out),
        capsule(lse),
        capsule(d_out),
        capsules(grads),
    )
    return grads


@attend_backward.register_fake
def _(d_out, q, k, v, cu_seqlens, out, lse, batch, window, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend_setup(ctx, inputs, output) -> None:
    *tensors, ctx.batch, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attend_grads(ctx, d_out, _):
    nothing = (None,) * 4
    if d_out is None:
        return (None,) * 3 + nothing
    grads = attend_backward(
        d_out.contiguous(), *ctx.saved_tensors, ctx.batch, ctx.window, ctx.scale
    )
    return (*grads, *nothing)


attend_forward.register_autograd(_attend_grads, setup_context=_attend_setup)


# --- compression ----------------------------------------------------------------------------------


@torch.library.custom_op("tercet::compress_forward", mutates_args=(), tags=_TAGS)
def compress_forward(
    x: Tensor, phi: List[Tensor], cu_seqlens: Optional[Tensor], batch: int, spec: List[int]
) -> Tensor:
    offsets = host_offsets(cu_seqlens)
    blocks = _native.compressed_blocks(spec, offsets, batch, x.shape[0])
    out = x.new_empty((blocks, x.shape[1], x.shape[2]))
    _native.compress_forward(spec, offsets, batch, capsule(x), capsules(phi), capsule(out))
    return out


@compress_forward.register_fake
def _(x, phi, cu_seqlens, batch, spec):
    if cu_seqlens is None:
        blocks = batch * blocks_of(x.shape[0] // batch, spec[0], spec[1])
    else:  # depends on the offsets themselves
        blocks = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((blocks, x.shape[1], x.shape[2]))


@torch.library.custom_op("tercet::compress_backward", mutates_args=(), tags=_TAGS)
def compress_backward(
    d_out: Tensor,
    x: Tensor,
    phi: List[Tensor],
    cu_seqlens: Optional[Tensor],
    batch: int,
    spec: List[int],
) -> List[Tensor]:
    d_x = torch.empty_like(x)
    d_phi = [torch.empty_like(tensor, dtype=torch.float32) for tensor in phi]
    _native.compress_backward(
        spec,
        host_offsets(cu_seqlens),
        batch,
        capsule(x),
        capsules(phi),
        capsule(d_out),
        capsule(d_x),
        capsules(d_phi),
    )
    return [d_x, *d_phi]


@compress_backward.register_fake
def _(d_out, x, phi, cu_seqlens, batch, spec):
    d_phi = [torch.empty_like(tensor, dtype=torch.float32) for tensor in phi]
    return [torch.empty_like(x), *d_phi]


def _compress_setup(ctx, inputs, output) -> None:
    x, phi, cu_seqlens, ctx.batch, ctx.spec = inputs
    ctx.save_for_backward(x, cu_seqlens, *phi)


def _compress_grads(ctx, d_out):
    x, cu_seqlens, *phi = ctx.saved_tensors
    d_x, *d_phi = compress_backward(
        d_out.contiguous(), x, phi, cu_seqlens, ctx.batch, ctx.spec
    )
    d_phi = [grad.to(tensor.dtype) for grad, tensor in zip(d_phi, phi)]
    return d_x, d_phi, None, None, None


compress_forward.register_autograd(_compress_grads, setup_context=_compress_setup)
