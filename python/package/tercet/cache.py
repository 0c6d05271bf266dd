"""Decoding: keys and values kept between steps."""

from typing import List, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _native
from ._ops import capsule, capsules, stream_of
from .functional import _check_tensor, _scale, _spec, compress
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


class _Cache:
    """One native cache a sequence on the CPU; one for all sequences on a device."""

    def __init__(self, dims: List[int], batch: Optional[int], capacity: int) -> None:
        if batch is not None and batch < 1:
            raise ValueError(f"batch: {batch} sequences, expected at least 1")
        if capacity < 0:
            raise ValueError(f"capacity: {capacity} tokens, expected at least 0")
        self.batch, self.capacity = batch, capacity
        self._dims, self._count = dims, 1 if batch is None else batch
        self._host: List = []
        self._device = None

    def _make_host(self):
        raise NotImplementedError

    def _make_device(self, ordinal: int, stream: int, dtype: str):
        raise NotImplementedError

    def _open(self, q: Tensor) -> None:
        """Makes the native caches where the first tokens are."""
        if q.device.type == "cuda":
            if self._host:
                raise ValueError(f"q: on {q.device}, expected cpu like this cache")
            if self._device is None:
                dtype = str(q.dtype).replace("torch.", "")
                self._device = self._make_device(q.device.index, stream_of(q), dtype)
        else:
            if self._device is not None:
                raise ValueError(f"q: on {q.device}, expected CUDA like this cache")
            if not self._host:
                self._host = [self._make_host() for _ in range(self._count)]

    def __len__(self) -> int:
        """Tokens held, of each sequence."""
        if self._device is not None:
            return self._device.len(0)
        return len(self._host[0]) if self._host else 0

    @property
    def bytes(self) -> int:
        """Cache memory in use."""
        if self._device is not None:
            return self._device.bytes
        return sum(cache.bytes for cache in self._host)


class NsaCache(_Cache):
    """One layer's keys and values of native sparse attention.

    The selected branch keeps every token, the window branch a ring, the compressed branch one row
    every ``spec.compress_stride`` tokens. Decoding is inference: no gradients. The cache lies where
    its first tokens are; on CUDA it belongs to the stream that was current then.

    Args:
        heads: H. kv_heads: K. key_dim: D. value_dim: V, D by default.
        spec: Blocks, counts and window; the paper's by default.
        batch: Sequences that advance together; tensors then have a leading batch dimension.
        capacity: Tokens of each sequence to make room for at once, on CUDA; it grows as needed.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: Optional[int] = None,
        spec: Optional[Spec] = None,
        batch: Optional[int] = None,
        capacity: int = 0,
    ) -> None:
        self.spec = _spec(spec)
        super().__init__(_dims(heads, kv_heads, key_dim, value_dim), batch, capacity)

    def _make_host(self):
        return _native.NsaCache(self.spec.numbers(), self._dims)

    def _make_device(self, ordinal: int, stream: int, dtype: str):
        return _native.CudaNsaCache(
            ordinal, stream, self.spec.numbers(), self._dims, dtype, self._count, self.capacity
        )

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
        self._open(q)
        out, indices = self._outputs(q, k_slc, v_slc)
        for i, inputs in enumerate(steps):
            one = (out, indices) if self.batch is None else (out[i], indices[i])
            into = capsule(one[0]), capsule(one[1])
            if self._device is not None:
                self._device.extend(stream_of(q), i, _scale(scale, q), capsules(inputs), *into)
            else:
                self._host[i].extend(_scale(scale, q), capsules(inputs), *into)
        return (out, indices) if return_indices else out

    def _outputs(self, q: Tensor, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        shape = (*q.shape[:-2], k.shape[-2], self.spec.select_count)
        return out, q.new_empty(shape, dtype=torch.int32)

    @torch.no_grad()
    def prime(self, k_cmp: Tensor, v_cmp: Tensor) -> None:
        """Hands over the prompt's raw tokens of the compression branch ``[c, K, D]``,
        ``[c, K, V]``, which :meth:`step` needs after :meth:`extend`; only the last count."""
        if self._device is None:
            raise ValueError("k_cmp: prime is for a cache on CUDA that holds tokens")
        for i, (k, v) in enumerate(_steps(["k_cmp", "v_cmp"], [k_cmp, v_cmp], self.batch)):
            self._device.prime(stream_of(k), i, capsule(k), capsule(v))

    @torch.no_grad()
    def step(
        self,
        positions: Tensor,
        q: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        gate: Tensor,
        *,
        turns: Optional[Tensor] = None,
        scale: Optional[float] = None,
        return_indices: bool = False,
    ) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """One token of every sequence, on CUDA, with averaged blocks: two launches, and nothing
        waits, so that ``torch.cuda.graph`` can capture it on the cache's stream.

        Args:
            positions: Where the tokens stand, int32 ``[B]`` on the device; -1 lets a sequence rest.
                Trusted: each follows the sequence's last and is below the capacity.
            q: ``[B, H, D]``; B is 1 without a batch. Others likewise, ``k_cmp`` and ``v_cmp`` raw:
                a block is averaged when its last token comes.
            turns: Cosines and sines, float32 ``[positions, 2, D/2]``, by which a new compressed key
                is roped at its block's first token; None leaves it.

        Call :meth:`advance` once for every step, launched or replayed.
        """
        if q.device.type != "cuda":
            raise ValueError(f"q: on {q.device}; steps are for CUDA, use extend")
        names = ["q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gate"]
        tensors = [q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gate]
        for name, tensor in zip(names, tensors):
            _check_tensor(name, tensor, 3)
        if q.shape[0] != self._count:
            raise ValueError(f"q: shape {list(q.shape)}, expected {self._count} sequences")
        self._open(q)
        out, indices = self._outputs(q, k_slc, v_slc)
        self._device.step(
            stream_of(q),
            _scale(scale, q),
            capsule(positions),
            capsules(tensors),
            None if turns is None else capsule(turns),
            capsule(out),
            capsule(indices),
        )
        return (out, indices) if return_indices else out

    def advance(self, active: Optional[List[int]] = None) -> None:
        """Says that a :meth:`step` has been launched for these sequences; None is all."""
        if self._device is None:
            raise ValueError("active: advance is for a cache on CUDA")
        self._device.advance(list(range(self._count)) if active is None else active)


class DenseCache(_Cache):
    """One layer's keys and values of causal attention, over all keys or a window.

    Args:
        heads: H. kv_heads: K. key_dim: D. value_dim: V, D by default.
        window: Keys a query sees, its own included; None keeps all.
        batch: Sequences that advance together; tensors then have a leading batch dimension.
        capacity: Tokens of each sequence to make room for at once, on CUDA; it grows as needed.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: Optional[int] = None,
        window: Optional[int] = None,
        batch: Optional[int] = None,
        capacity: int = 0,
    ) -> None:
        if window is not None and not 1 <= window < 1 << 31:
            raise ValueError(f"window: {window} keys, expected 1 to 2147483647")
        self.window = window
        super().__init__(_dims(heads, kv_heads, key_dim, value_dim), batch, capacity)

    def _make_host(self):
        return _native.DenseCache(self._dims, self.window)

    def _make_device(self, ordinal: int, stream: int, dtype: str):
        return _native.CudaDenseCache(
            ordinal, stream, self._dims, dtype, self.window, self._count, self.capacity
        )

    @torch.no_grad()
    def extend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: Optional[float] = None) -> Tensor:
        """Appends c tokens and returns their output ``[c, H, V]``."""
        steps = _steps(["q", "k", "v"], [q, k, v], self.batch)
        self._open(q)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        for i, inputs in enumerate(steps):
            one = capsule(out if self.batch is None else out[i])
            if self._device is not None:
                self._device.extend(stream_of(q), i, _scale(scale, q), capsules(inputs), one)
            else:
                self._host[i].extend(_scale(scale, q), capsules(inputs), one)
        return out


class CompressTail:
    """Tokens of the compression branch that no block has absorbed yet.

    Args:
        kv_heads: K. dim: C, the key or the value dim.
        spec: Block and stride; the paper's by default.
        dtype: float32 or bfloat16; on CUDA also float16.
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
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: {dtype}, expected float32, bfloat16 or float16")
        self.spec = _spec(spec)
        self.batch, self.dtype = batch, dtype
        kv_heads, _, self._dim, _ = _dims(kv_heads, kv_heads, dim, None)
        self._kv_heads = kv_heads
        self._tails: List = []
        self._raw: Optional[Tensor] = None
        self._blocks = 0

    @property
    def blocks(self) -> int:
        """Blocks emitted so far; the next starts at token ``blocks * spec.compress_stride``."""
        return self._tails[0].blocks if self._tails else self._blocks

    @torch.no_grad()
    def push(self, x: Tensor, phi: Phi = None) -> Tensor:
        """Takes new tokens ``[c, K, C]``; returns the blocks they complete ``[n, K, C]``."""
        params = phi_tensors(phi)
        for name, tensor in params:
            _check_tensor(name, tensor)
        parts = _steps(["x"], [x], self.batch)
        if tuple(x.shape[-2:]) != (self._kv_heads, self._dim) or x.dtype != self.dtype:
            expected = f"[.., {self._kv_heads}, {self._dim}] of {self.dtype}"
            raise ValueError(f"x: shape {list(x.shape)} of {x.dtype}, expected {expected}")
        if x.device.type == "cuda":
            return self._push_cuda(x, phi)
        if self._raw is not None:
            raise ValueError(f"x: on {x.device}, expected {self._raw.device} like this tail")
        if not self._tails:
            options = self.spec.numbers(), self._kv_heads, self._dim, self.dtype == torch.bfloat16
            self._tails = [_native.CompressTail(*options) for _ in parts]
        outs = []
        for tail, (part,) in zip(self._tails, parts):
            out = part.new_empty((tail.completes(part.shape[0]), *part.shape[1:]))
            tail.push(capsule(part), capsules([tensor for _, tensor in params]), capsule(out))
            outs.append(out)
        return outs[0] if self.batch is None else torch.stack(outs)

    def _push_cuda(self, x: Tensor, phi: Phi) -> Tensor:
        if self._tails:
            raise ValueError(f"x: on {x.device}, expected cpu like this tail")
        along = -3
        raw = x if self._raw is None else torch.cat([self._raw, x], along)
        out = compress(raw.contiguous(), phi, None, self.spec)
        self._blocks += out.shape[along]
        done = out.shape[along] * self.spec.compress_stride
        self._raw = raw.narrow(along, done, raw.shape[along] - done).clone()
        return out
