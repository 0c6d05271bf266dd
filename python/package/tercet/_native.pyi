"""The native module: DLPack capsules in, results written in place."""

from typing import List, Optional, Sequence, Tuple

Capsule = object
Spec = Sequence[int]  # l, d, l', n, initial, local, window

__version__: str

def nsa_forward(
    stream: int,
    spec: Spec,
    scale: float,
    cu_seqlens: Optional[Capsule],
    batch: int,
    inputs: Sequence[Capsule],
    choice: Optional[Capsule],
    out: Capsule,
    chosen: Optional[Capsule],
    saved: Optional[Sequence[Capsule]],
) -> None: ...
def nsa_backward(
    stream: int,
    spec: Spec,
    scale: float,
    cu_seqlens: Optional[Capsule],
    batch: int,
    inputs: Sequence[Capsule],
    choice: Capsule,
    saved: Sequence[Capsule],
    d_out: Capsule,
    grads: Sequence[Capsule],
) -> None: ...
def attend_forward(
    stream: int,
    scale: float,
    window: Optional[int],
    cu_seqlens: Optional[Capsule],
    batch: int,
    inputs: Sequence[Capsule],
    out: Capsule,
    lse: Capsule,
) -> None: ...
def attend_backward(
    stream: int,
    scale: float,
    window: Optional[int],
    cu_seqlens: Optional[Capsule],
    batch: int,
    inputs: Sequence[Capsule],
    out: Capsule,
    lse: Capsule,
    d_out: Capsule,
    grads: Sequence[Capsule],
) -> None: ...
def compressed_blocks(
    spec: Spec, cu_seqlens: Optional[Capsule], batch: int, tokens: int
) -> int: ...
def compress_forward(
    spec: Spec,
    cu_seqlens: Optional[Capsule],
    batch: int,
    x: Capsule,
    phi: List[Capsule],
    out: Capsule,
) -> None: ...
def compress_backward(
    spec: Spec,
    cu_seqlens: Optional[Capsule],
    batch: int,
    x: Capsule,
    phi: List[Capsule],
    d_out: Capsule,
    d_x: Capsule,
    d_phi: List[Capsule],
) -> None: ...
def use_cache(folder: Optional[str]) -> None: ...
def capturing(ordinal: int) -> None: ...
def cache_warning() -> Optional[str]: ...
def memory(ordinal: int) -> Tuple[int, int, int]: ...
def reset_memory(ordinal: int) -> None: ...

class NsaCache:
    def __new__(cls, spec: Spec, dims: Sequence[int]) -> "NsaCache": ...
    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def extend(
        self, scale: float, inputs: Sequence[Capsule], out: Capsule, indices: Capsule
    ) -> None: ...

class DenseCache:
    def __new__(cls, dims: Sequence[int], window: Optional[int] = None) -> "DenseCache": ...
    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def extend(self, scale: float, inputs: Sequence[Capsule], out: Capsule) -> None: ...

class CompressTail:
    def __new__(cls, spec: Spec, kv_heads: int, dim: int, bf16: bool) -> "CompressTail": ...
    @property
    def blocks(self) -> int: ...
    def completes(self, count: int) -> int: ...
    def push(self, x: Capsule, phi: List[Capsule], out: Capsule) -> None: ...
