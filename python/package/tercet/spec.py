"""The shape of native sparse attention: block sizes, counts and the window."""

import dataclasses
from typing import List

from . import _native


@dataclasses.dataclass(frozen=True)
class Spec:
    """Blocks, counts and window of native sparse attention; the defaults are the paper's.

    Refused, as a ``ValueError`` naming the field: ``compress_stride`` that does not divide
    ``compress_block`` and ``select_block``; ``compress_block`` above ``select_block``;
    ``select_count`` below ``select_initial + select_local``; zeros.
    """

    compress_block: int = 32
    """Tokens in one compressed block (the paper's l)."""
    compress_stride: int = 16
    """Tokens between the starts of neighbouring compressed blocks (d)."""
    select_block: int = 64
    """Tokens in one selection block (l')."""
    select_count: int = 16
    """Selected blocks per query and key/value head, the forced ones included (n)."""
    select_initial: int = 1
    """Blocks at the start of the sequence that are always selected."""
    select_local: int = 2
    """Blocks ending with the query's own that are always selected."""
    window: int = 512
    """Keys the window branch sees, the query's own included (w)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"spec.{field.name} = {value!r} is not an integer of at least 0")
            if value >= 1 << 63:
                raise ValueError(f"spec.{field.name} = {value} is too large")
        _native.compressed_blocks(self.numbers(), None, 1, 0)

    def numbers(self) -> List[int]:
        """The fields in order."""
        return [
            self.compress_block,
            self.compress_stride,
            self.select_block,
            self.select_count,
            self.select_initial,
            self.select_local,
            self.window,
        ]

    def compressed_blocks(self, tokens: int) -> int:
        """Compressed blocks of a sequence of so many tokens; a tail shorter than l is dropped."""
        return blocks_of(tokens, self.compress_block, self.compress_stride)

    def selection_blocks(self, tokens: int) -> int:
        """Selection blocks of a sequence of so many tokens; the last may be partial."""
        return -(-tokens // self.select_block)


def blocks_of(tokens: int, block: int, stride: int) -> int:
    """Blocks of ``block`` tokens, ``stride`` apart, that fit into ``tokens``."""
    count = (tokens - block) // stride + 1
    if isinstance(count, int):
        return max(count, 0)
    import torch  # a symbolic size, while a graph is traced

    return torch.sym_max(count, 0)
