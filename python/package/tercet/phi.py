"""How a block of tokens becomes one key or value."""

from typing import List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .spec import Spec


class LinearPhi(NamedTuple):
    """One matrix per head over the flattened block: ``flatten(x + pe) @ weight``."""

    weight: Tensor
    """``[K, l*C, C]``."""
    pe: Tensor
    """Intra-block position encoding ``[K, l, C]``, added to the block's tokens."""


class MlpPhi(NamedTuple):
    """``gelu(flatten(x + pe) @ weight1 + bias1) @ weight2 + bias2`` per head, exact GELU."""

    weight1: Tensor
    """``[K, l*C, M]``."""
    bias1: Tensor
    """``[K, M]``."""
    weight2: Tensor
    """``[K, M, C]``."""
    bias2: Tensor
    """``[K, C]``."""
    pe: Tensor
    """Intra-block position encoding ``[K, l, C]``."""


Phi = Union[None, LinearPhi, MlpPhi]


def phi_tensors(phi: Phi) -> List[Tuple[str, Tensor]]:
    """Names and tensors in the order of the native module."""
    if phi is None:
        return []
    if isinstance(phi, (LinearPhi, MlpPhi)):
        return [(f"phi.{name}", tensor) for name, tensor in zip(phi._fields, phi)]
    raise TypeError(
        f"phi: expected None, tercet.LinearPhi or tercet.MlpPhi, got {type(phi).__name__}"
    )


class Compressor(nn.Module):
    """The parameters of a compressor, for one of keys or values; call it to compress.

    Args:
        kind: ``"mean"`` (no parameters), ``"linear"`` or ``"mlp"``.
        kv_heads: K.
        dim: C, the key or the value dim.
        spec: Block and stride; the paper's by default.
        hidden: M of ``"mlp"``; ``2 * dim`` by default.

    The linear one starts as the average, so that a model starts from ``"mean"``.
    """

    def __init__(
        self,
        kind: str,
        kv_heads: int,
        dim: int,
        spec: Optional[Spec] = None,
        hidden: Optional[int] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kind not in ("mean", "linear", "mlp"):
            raise ValueError(f"kind: {kind!r}, expected 'mean', 'linear' or 'mlp'")
        self.kind = kind
        self.spec = Spec() if spec is None else spec
        block = self.spec.compress_block
        options = {"device": device, "dtype": dtype}
        if kind == "mean":
            return
        self.pe = nn.Parameter(torch.zeros(kv_heads, block, dim, **options))
        if kind == "linear":
            average = torch.eye(dim, **options).repeat(kv_heads, block, 1) / block
            self.weight = nn.Parameter(average)
            return
        hidden = 2 * dim if hidden is None else hidden
        wide = block * dim
        self.weight1 = nn.Parameter(torch.randn(kv_heads, wide, hidden, **options) * wide**-0.5)
        self.bias1 = nn.Parameter(torch.zeros(kv_heads, hidden, **options))
        self.weight2 = nn.Parameter(torch.randn(kv_heads, hidden, dim, **options) * hidden**-0.5)
        self.bias2 = nn.Parameter(torch.zeros(kv_heads, dim, **options))

    def phi(self) -> Phi:
        """The parameters as :func:`tercet.compress` takes them."""
        if self.kind == "mean":
            return None
        if self.kind == "linear":
            return LinearPhi(self.weight, self.pe)
        return MlpPhi(self.weight1, self.bias1, self.weight2, self.bias2, self.pe)

    def forward(self, x: Tensor, cu_seqlens=None) -> Tensor:
        """``[T, K, C]`` to ``[N, K, C]``; see :func:`tercet.compress`."""
        from .functional import compress

        return compress(x, self.phi(), cu_seqlens, self.spec)
