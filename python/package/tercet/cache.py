"""Decoding: keys and values kept between steps."""

from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _native
from ._ops import capsule, capsules
from .functional import _check_tensor, _scale, _spec
from .phi import Phi, phi_tensors
from .spec import Spec


def _dims(heads: int, kv_heads: int, key_dim: int, value_dim: Optional[int]) -> List[int]:
    dims = [heads, kv_heads, key_dim, key_dim if value_dim is None else value_dim]
    for name, value in zip(("heads", "kv_heads", "key_dim", "value_dim"), dims):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise ValueError(f"{name}: {value!r}, expected an integer of at least 1")
    return dims


def _steps(names: List[str], tensors: List[Tensor], batch: Optional[int]) -> List[List[Tensor]]:
    """Each sequence's part of a step."""
    dims = 3 if batch is None else 4
    for name, tensor in zip(names, tensors):
        _check_tensor(name, tensor, dims)
        if batch is not None and tensor.shape[0] != batch:
            shape = list(tensor.shape)
            raise ValueError(f"{name}: shape {shape}, expected a batch of {batch} sequences")
    if batch is None:
        return [tensors]
    return [[tensor[i] for tensor in tensors] for i in range(batch)]


class NsaCache:
    """One layer's keys and values of native sparse attention.

    The selected branch keeps every token, the window branch a ring, the compressed branch one row
    every ``spec.compress_stride`` tokens. Decoding is inference: no gradients.

    Args:
        heads: H. kv_heads: K. key_dim: D. value_dim: V, D by default.
        spec: Blocks, counts and window; the paper's by default.
        batch: Sequences that advance together; tensors then have a leading batch dimension.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: Optional[int] = None,
        spec: Optional[Spec] = None,
        batch: Optional[int] = None,
    ) -> None:
        self.spec = _spec(spec)
        self.batch = batch
        dims = _dims(heads, kv_heads, key_dim, value_dim)
        self._caches = [
            _native.NsaCache(self.spec.numbers(), dims) for _ in range(1 if batch is None else batch)
        ]

    def __len__(self) -> int:
        """Tokens held, of each sequence."""
        return len(self._caches[0]) if self._caches else 0

    @property
    def bytes(self) -> int:
        """Cache memory in use."""
        return sum(cache.bytes for cache in self._caches)

    @torch.no_grad()
    def extend(
        self,
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        gate: Tensor,
        *,
        scale: Optional[float] = None,
        return_indices: bool = False,
    ) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """Appends c tokens (a whole prompt, or one) and returns their output ``[c, H, V]``.

        ``k_cmp`` and ``v_cmp`` are the blocks that these tokens complete, often none; they come
        from :meth:`CompressTail.push`. Other layouts are those of :func:`tercet.nsa` with c for T.
        """
        names = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"]
        tensors = [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]
        steps = _steps(names, tensors, self.batch)
        out = q.new_empty((*q.shape[:-1], v_slc.shape[-1]))
        shape = (*q.shape[:-2], k_slc.shape[-2], self.spec.select_count)
        indices = q.new_empty(shape, dtype=torch.int32)
        for i, (cache, inputs) in enumerate(zip(self._caches, steps)):
            one = (out, indices) if self.batch is None else (out[i], indices[i])
            cache.extend(_scale(scale, q), capsules(inputs), capsule(one[0]), capsule(one[1]))
        return (out, indices) if return_indices else out


class DenseCache:
    """One layer's keys and values of causal attention, over all keys or a window.

    Args:
        heads: H. kv_heads: K. key_dim: D. value_dim: V, D by default.
        window: Keys a query sees, its own included; None keeps all.
        batch: Sequences that advance together; tensors then have a leading batch dimension.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: Optional[int] = None,
        window: Optional[int] = None,
        batch: Optional[int] = None,
    ) -> None:
        if window is not None and not 1 <= window < 1 << 31:
            raise ValueError(f"window: {window} keys, expected 1 to 2147483647")
        self.batch = batch
        dims = _dims(heads, kv_heads, key_dim, value_dim)
        self._caches = [
            _native.DenseCache(dims, window) for _ in range(1 if batch is None else batch)
        ]

    def __len__(self) -> int:
        """Tokens held, of each sequence."""
        return len(self._caches[0]) if self._caches else 0

    @property
    def bytes(self) -> int:
        """Cache memory in use."""
        return sum(cache.bytes for cache in self._caches)

    @torch.no_grad()
    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: Optional[float] = None) -> Tensor:
        """Appends c tokens and returns their output ``[c, H, V]``."""
        steps = _steps(["q", "k", "v"], [q, k, v], self.batch)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        for i, (cache, inputs) in enumerate(zip(self._caches, steps)):
            one = out if self.batch is None else out[i]
            cache.extend(_scale(scale, q), capsules(inputs), capsule(one))
        return out


class CompressTail:
    """Tokens of the compression branch that no block has absorbed yet.

    Args:
        kv_heads: K. dim: C, the key or the value dim.
        spec: Block and stride; the paper's by default.
        dtype: float32 or bfloat16.
        batch: Sequences that advance together; tensors then have a leading batch dimension.
    """

    def __init__(
        self,
        kv_heads: int,
        dim: int,
        spec: Optional[Spec] = None,
        dtype: torch.dtype = torch.float32,
        batch: Optional[int] = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype: {dtype}, expected torch.float32 or torch.bfloat16")
        self.spec = _spec(spec)
        self.batch = batch
        kv_heads, _, dim, _ = _dims(kv_heads, kv_heads, dim, None)
        self._tails = [
            _native.CompressTail(self.spec.numbers(), kv_heads, dim, dtype == torch.bfloat16)
            for _ in range(1 if batch is None else batch)
        ]

    @property
    def blocks(self) -> int:
        """Blocks emitted so far; the next starts at token ``blocks * spec.compress_stride``."""
        return self._tails[0].blocks if self._tails else 0

    @torch.no_grad()
    def push(self, x: Tensor, phi: Phi = None) -> Tensor:
        """Takes new tokens ``[c, K, C]``; returns the blocks they complete ``[n, K, C]``."""
        params = phi_tensors(phi)
        for name, tensor in params:
            _check_tensor(name, tensor)
        parts = _steps(["x"], [x], self.batch)
        outs = []
        for tail, (part,) in zip(self._tails, parts):
            out = part.new_empty((tail.completes(part.shape[0]), *part.shape[1:]))
            tail.push(capsule(part), capsules([tensor for _, tensor in params]), capsule(out))
            outs.append(out)
        return outs[0] if self.batch is None else torch.stack(outs)
