"""Decoding over the caller's pages, on CUDA: for servers that keep their own caches."""

from typing import NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _native
from ._ops import capsule, stream_of
from .functional import _check_tensor, _scale, _spec
from .spec import Spec


class Pages(NamedTuple):
    """Keys and values in pages of a multiple of 64 tokens."""

    k: Tensor
    """``[pages, page, K, D]``, or ``[pages, K, page, D]`` with ``heads_first``."""
    v: Tensor
    """Likewise with V."""
    table: Optional[Tensor] = None
    """Page of each sequence's tokens ``t // page``, int32 ``[sequences, width]``; None: sequence i
    has page i alone."""
    ring: bool = False
    """Whether token t stands at ``t % page`` (a window's cache); only without a table."""
    heads_first: bool = False
    """Whether a head's tokens lie together."""

    def capsules(self) -> Tuple[object, object, Optional[object], bool, bool]:
        """As the native module takes them."""
        table = None if self.table is None else capsule(self.table)
        return capsule(self.k), capsule(self.v), table, self.ring, self.heads_first


def _check_type(name: str, pages: object) -> None:
    if not isinstance(pages, Pages):
        raise TypeError(f"{name}: expected tercet.Pages, got {type(pages).__name__}")


def _check_pages(name: str, pages: Pages, longest: int, check: bool) -> None:
    _check_tensor(f"{name}.k", pages.k, 4)
    _check_tensor(f"{name}.v", pages.v, 4)
    if pages.table is None:
        return
    _check_tensor(f"{name}.table", pages.table, 2)
    if check and pages.table.numel():
        page = pages.k.shape[2 if pages.heads_first else 1]
        used = pages.table[:, : -(-longest // max(page, 1))]
        if used.numel() and bool(((used < -1) | (used >= pages.k.shape[0])).any()):
            raise ValueError(f"{name}.table: a page outside 0..{pages.k.shape[0] - 1}")


def _check_rows(
    q: Tensor, positions: Tensor, sequences: Optional[Tensor], longest: Optional[int], count: int,
    check: bool,
) -> int:
    _check_tensor("q", q, 3)
    if q.device.type != "cuda":
        raise ValueError(f"q: on {q.device}; pages are for CUDA")
    _check_tensor("positions", positions, 1)
    if sequences is not None:
        _check_tensor("sequences", sequences, 1)
    if longest is None:
        longest = int(positions.max()) + 1 if positions.numel() else 0
    elif check and positions.numel() and int(positions.max()) >= longest:
        raise ValueError(f"positions: one is not below longest = {longest}")
    if check and sequences is not None and sequences.numel():
        if bool(((sequences < 0) | (sequences >= count)).any()):
            raise ValueError(f"sequences: one is outside 0..{count - 1}")
    return max(longest, 0)


def _count(pages: Pages) -> int:
    return pages.k.shape[0] if pages.table is None else pages.table.shape[0]


@torch.no_grad()
def nsa_decode(
    q: Tensor,
    cmp: Pages,
    slc: Pages,
    win: Pages,
    gate: Tensor,
    positions: Tensor,
    sequences: Optional[Tensor] = None,
    spec: Optional[Spec] = None,
    *,
    longest: Optional[int] = None,
    scale: Optional[float] = None,
    return_indices: bool = False,
    check: bool = True,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Native sparse attention of new tokens over pages that already hold them. One launch.

    Args:
        q: ``[R, H, D]``, one row a token: one of each sequence, or a chunk of a prompt.
        cmp: Compressed keys and values, a block in a token's place.
        slc: Keys and values of the selected branch.
        win: Keys and values of the window branch, often a ring.
        gate: After the sigmoid ``[R, H, 3]``.
        positions: Each row's position in its sequence, int32 ``[R]``; -1 is an idle row.
        sequences: Each row's sequence, int32 ``[R]``; None: row i is of sequence i.
        spec: Blocks, counts and window; the paper's by default.
        longest: More than any position; given, nothing waits for the device.
        check: Whether what lies on the device (positions, tables) is checked, which waits for it.
            With False it is trusted. Within ``torch.cuda.graph``: False, and ``longest`` given.

    Returns:
        ``[R, H, V]``, and the choice of blocks ``[R, K, S]`` when asked for.
    """
    spec = _spec(spec)
    for name, pages in (("cmp", cmp), ("slc", slc), ("win", win)):
        _check_type(name, pages)
    count = min(_count(pages) for pages in (cmp, slc, win))
    longest = _check_rows(q, positions, sequences, longest, count, check)
    _check_pages("cmp", cmp, spec.compressed_blocks(longest), check)
    _check_pages("slc", slc, longest, check)
    _check_pages("win", win, longest, check)
    _check_tensor("gate", gate, 3)
    out = q.new_empty((*q.shape[:2], slc.v.shape[-1]))
    indices = None
    if return_indices:
        kv_heads = slc.k.shape[1 if slc.heads_first else 2]
        shape = (q.shape[0], kv_heads, spec.select_count)
        indices = q.new_empty(shape, dtype=torch.int32)
    _native.nsa_rows(
        stream_of(q),
        spec.numbers(),
        _scale(scale, q),
        capsule(q),
        capsule(gate),
        (capsule(positions), None if sequences is None else capsule(sequences), count, longest),
        [cmp.capsules(), slc.capsules(), win.capsules()],
        capsule(out),
        None if indices is None else capsule(indices),
    )
    return out if indices is None else (out, indices)


@torch.no_grad()
def attend_decode(
    q: Tensor,
    pages: Pages,
    positions: Tensor,
    sequences: Optional[Tensor] = None,
    window: Optional[int] = None,
    *,
    longest: Optional[int] = None,
    scale: Optional[float] = None,
    check: bool = True,
) -> Tensor:
    """Dense or window attention of new tokens over pages; arguments as :func:`nsa_decode`."""
    _check_type("pages", pages)
    count = _count(pages)
    if window is not None and not 1 <= window < 1 << 31:
        raise ValueError(f"window: {window} keys, expected 1 to 2147483647")
    longest = _check_rows(q, positions, sequences, longest, count, check)
    _check_pages("pages", pages, longest, check)
    out = q.new_empty((*q.shape[:2], pages.v.shape[-1]))
    _native.dense_rows(
        stream_of(q),
        _scale(scale, q),
        window,
        capsule(q),
        (capsule(positions), None if sequences is None else capsule(sequences), count, longest),
        pages.capsules(),
        capsule(out),
    )
    return out
