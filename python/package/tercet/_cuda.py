"""What CUDA needs beside the native module: its libraries, a cache folder, and compression."""

import ctypes
import functools
import glob
import os
import warnings
from typing import List, Optional

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from . import _native
from .spec import blocks_of


@functools.lru_cache(maxsize=None)
def prepare_cuda() -> None:
    """Finds the kernel compiler that PyTorch's wheels bring, and names the cache folder."""
    major = (torch.version.cuda or "").split(".")[0]
    name = f"libnvrtc.so.{major}"
    packages = os.path.dirname(os.path.dirname(torch.__file__))
    found = glob.glob(os.path.join(packages, "nvidia", "*", "lib", name))
    for path in [name, *sorted(found)]:
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    _native.use_cache(cache_folder())


def cache_folder() -> Optional[str]:
    """Where compiled kernels are kept: ``TERCET_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("TERCET_CACHE")
    if chosen:
        return chosen
    caches = os.environ.get("XDG_CACHE_HOME")
    if not caches and os.environ.get("HOME"):
        caches = os.path.join(os.environ["HOME"], ".cache")
    return os.path.join(caches, "tercet") if caches else None


def warn_once_about_cache() -> None:
    """Says why compiled kernels could not be kept, if so; the reason is handed out once."""
    reason = _native.cache_warning()
    if reason:
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def check_choice(
    indices: Tensor, cu_seqlens: Optional[Tensor], batch: int, spec: List[int]
) -> None:
    """Refuses a choice of blocks that no selection makes; waits for the device. What does not fit
    in shape or type is left to the native module, and what is captured to the kernels, which pass
    over entries that are no blocks of their query."""
    tokens, count = indices.shape[0], indices.shape[-1]
    if torch.cuda.is_current_stream_capturing() or indices.dtype != torch.int32 or not tokens:
        return
    if cu_seqlens is None:
        position = torch.arange(tokens) % max(tokens // max(batch, 1), 1)
    else:
        offsets = cu_seqlens.cpu().to(torch.int64)
        if len(offsets) < 2 or offsets[-1] != tokens or bool((offsets.diff() < 0).any()):
            return  # refused by name where all offsets are
        position = torch.arange(tokens) - offsets[:-1].repeat_interleave(offsets.diff())
    own = (position // spec[2]).to(indices.device).view(-1, 1, 1)
    used = torch.arange(count, device=indices.device) <= own
    good = torch.where(used, (indices >= 0) & (indices <= own), indices == -1)
    good[..., 1:] &= ~used[..., 1:] | (indices[..., 1:] > indices[..., :-1])
    bad = (~good.all(-1)).nonzero()
    if len(bad):
        token, head = bad[0].tolist()
        last = int(own[token])
        raise ValueError(
            f"indices: token {token}, KV head {head}: {indices[token, head].tolist()}, expected "
            f"{min(last + 1, count)} ascending blocks of 0..={last} and then -1"
        )


def _check_phi(x: Tensor, phi: List[Tensor], block: int) -> None:
    heads, dim = x.shape[1:]
    if len(phi) == 2:
        names = ["weight", "pe"]
        shapes = [(heads, block * dim, dim), (heads, block, dim)]
    else:
        hidden = phi[1].shape[-1]
        names = ["weight1", "bias1", "weight2", "bias2", "pe"]
        shapes = [
            (heads, block * dim, hidden),
            (heads, hidden),
            (heads, hidden, dim),
            (heads, dim),
            (heads, block, dim),
        ]
    for name, shape, tensor in zip(names, shapes, phi):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"phi.{name}: shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"phi.{name}: {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device} "
                "like x"
            )


def _phi(blocks: Tensor, phi: List[Tensor]) -> Tensor:
    """``[n, K, l, C]`` to ``[n, K, C]``; the arithmetic of ``LinearPhi`` and ``MlpPhi``."""
    *layers, pe = phi
    flat = (blocks + pe).flatten(2).transpose(0, 1)  # [K, n, l*C]
    if len(layers) == 1:
        return torch.bmm(flat, layers[0]).transpose(0, 1).contiguous()
    weight1, bias1, weight2, bias2 = layers
    inner = torch.nn.functional.gelu(torch.baddbmm(bias1.unsqueeze(1), flat, weight1))
    return torch.baddbmm(bias2.unsqueeze(1), inner, weight2).transpose(0, 1).contiguous()


def _mean(x: Tensor, count: int, block: int, stride: int) -> Tensor:
    """``[B, T, K, C]`` to ``[B, count, K, C]``: sums of strides, then of a block's strides."""
    parts = block // stride
    strides = x[:, : (count + parts - 1) * stride].unflatten(1, (-1, stride))
    sums = strides.sum(2, dtype=torch.float32)
    total = sums[:, :count]
    for part in range(1, parts):
        total = total + sums[:, part : part + count]
    return (total / block).to(x.dtype)


def compress(
    x: Tensor, phi: List[Tensor], cu_seqlens: Optional[Tensor], batch: int, spec: List[int]
) -> Tensor:
    """Compression on a device, by PyTorch's own operators; arguments of ``compress_forward``."""
    block, stride = spec[:2]
    if phi:
        _check_phi(x, phi, block)
    if cu_seqlens is None:
        if x.shape[0] % batch:
            raise ValueError(f"x: {x.shape[0]} tokens are not {batch} sequences of one length")
        parts = [x.unflatten(0, (batch, x.shape[0] // batch))]
    else:
        _native.compressed_blocks(spec, to_dlpack(cu_seqlens), 1, x.shape[0])
        parts = [part.unsqueeze(0) for part in x.split(cu_seqlens.diff().tolist())]
    outs = []
    for part in parts:
        count = blocks_of(part.shape[1], block, stride)
        if isinstance(count, int) and count == 0:
            outs.append(part[:, :0].flatten(0, 1))
        elif phi:
            blocks = part.unfold(1, block, stride).flatten(0, 1)  # [n, K, C, l]
            outs.append(_phi(blocks.transpose(-1, -2), phi))
        else:
            outs.append(_mean(part, count, block, stride).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
