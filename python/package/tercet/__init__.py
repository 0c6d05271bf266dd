"""Native Sparse Attention (NSA, arXiv 2502.11089) for PyTorch.

:func:`nsa` is the operator, :func:`compress` makes its compressed keys and values, :func:`attend`
is dense or window attention, :class:`NsaCache` and :class:`DenseCache` decode, and :func:`nsa_decode`
decodes over pages that the caller keeps. All of them are
custom operators: autograd and ``torch.compile`` see them.
"""

from . import layouts
from ._native import __version__
from .cache import CompressTail, DenseCache, NsaCache
from .functional import attend, block_positions, compress, nsa
from .paged import Pages, attend_decode, nsa_decode
from .phi import Compressor, LinearPhi, MlpPhi
from .spec import Spec

__all__ = [
    "CompressTail",
    "Compressor",
    "DenseCache",
    "LinearPhi",
    "MlpPhi",
    "NsaCache",
    "Pages",
    "Spec",
    "__version__",
    "attend",
    "attend_decode",
    "block_positions",
    "compress",
    "layouts",
    "nsa",
    "nsa_decode",
]
