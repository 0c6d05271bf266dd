"""Choices of blocks in the layouts of common Triton implementations, to and from ours.

Ours is int32 ``[T, K, S]``: for each token and key/value head the chosen blocks of its sequence,
ascending, then -1. :func:`tercet.nsa` returns it (``return_indices=True``) and accepts it
(``indices=``). None of the functions copies more than the choice itself.
"""

from typing import Optional

import torch
from torch import Tensor


def _check(name: str, tensor: object, dims: int, layout: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != dims:
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {layout}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected int32 or int64")
    return tensor


def canonical(indices: Tensor) -> Tensor:
    """``[..., S]`` in any order, with repeats and negative padding, as ours."""
    last = torch.iinfo(torch.int32).max
    keyed = torch.where(indices < 0, last, indices.to(torch.int64)).clamp(max=last)
    keyed = keyed.sort(dim=-1).values
    repeated = torch.zeros_like(keyed, dtype=torch.bool)
    repeated[..., 1:] = keyed[..., 1:] == keyed[..., :-1]
    keyed = keyed.masked_fill(repeated, last).sort(dim=-1).values
    return keyed.masked_fill(keyed == last, -1).to(torch.int32).contiguous()


def from_kts(topk_idx: Tensor) -> Tensor:
    """From ``topk_idx`` ``[K, T, S]`` of native-sparse-attention-triton and FSA."""
    return canonical(_check("topk_idx", topk_idx, 3, "[K, T, S]").transpose(0, 1))


def to_kts(indices: Tensor) -> Tensor:
    """To ``topk_idx`` ``[K, T, S]`` of native-sparse-attention-triton and FSA, -1 padded."""
    return _check("indices", indices, 3, "[T, K, S]").transpose(0, 1).to(torch.int32).contiguous()


def from_bths(block_indices: Tensor, block_counts: Optional[Tensor] = None) -> Tensor:
    """From ``block_indices`` ``[B, T, K, S]`` of flash-linear-attention.

    ``block_counts`` ``[B, T, K]`` says how many of each list count; without it, negative ones do
    not. The batch is flattened: ``[B * T, K, S]``.
    """
    indices = _check("block_indices", block_indices, 4, "[B, T, K, S]")
    if block_counts is not None:
        counts = _check("block_counts", block_counts, 3, "[B, T, K]")
        if counts.shape != indices.shape[:3]:
            shape = list(counts.shape)
            expected = list(indices.shape[:3])
            raise ValueError(f"block_counts: shape {shape}, expected [B, T, K] = {expected}")
        place = torch.arange(indices.shape[-1], device=indices.device)
        indices = indices.masked_fill(place >= counts.unsqueeze(-1), -1)
    return canonical(indices.flatten(0, 1))


def to_bths(indices: Tensor, batch: int = 1) -> Tensor:
    """To ``block_indices`` ``[B, T, K, S]`` of flash-linear-attention, -1 padded."""
    tokens = _check("indices", indices, 3, "[T, K, S]").shape[0]
    if batch < 1 or tokens % batch != 0:
        raise ValueError(f"batch: {tokens} tokens are not {batch} sequences of one length")
    return indices.to(torch.int32).unflatten(0, (batch, tokens // batch))


def from_kts_padded(topk: Tensor, padding: int) -> Tensor:
    """From ``topk`` ``[K, T, S]`` of flash_nsa, whose lists are unordered and end in ``padding``.

    There ``padding`` is the number of selection blocks of the longest sequence; every index from
    it on is no block.
    """
    topk = _check("topk", topk, 3, "[K, T, S]")
    return canonical(topk.masked_fill(topk >= padding, -1).transpose(0, 1))


def to_kts_padded(indices: Tensor, padding: int) -> Tensor:
    """To ``topk`` ``[K, T, S]`` of flash_nsa, with ``padding`` for no block."""
    indices = _check("indices", indices, 3, "[T, K, S]")
    return indices.masked_fill(indices < 0, padding).transpose(0, 1).to(torch.int32).contiguous()
