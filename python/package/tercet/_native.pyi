"""The native module: DLPack capsules in, results written in place."""

from typing import List, Optional, Sequence, Tuple

Capsule = object
Spec = Sequence[int]  # l, d, l', n, initial, local, window

Pages = Tuple[Capsule, Capsule, Optional[Capsule], bool, bool]

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
def nsa_rows(
    stream: int,
    spec: Spec,
    scale: float,
    q: Capsule,
    gate: Capsule,
    at: Tuple[Capsule, Optional[Capsule], int, int],
    caches: Sequence[Pages],
    out: Capsule,
    indices: Optional[Capsule],
) -> None: ...
def dense_rows(
    stream: int,
    scale: float,
    window: Optional[int],
    q: Capsule,
    at: Tuple[Capsule, Optional[Capsule], int, int],
    pages: Pages,
    out: Capsule,
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

class CudaNsaCache:
    def __new__(
        cls,
        ordinal: int,
        stream: int,
        spec: Spec,
        dims: Sequence[int],
        dtype: str,
        sequences: int,
        capacity: int,
    ) -> "CudaNsaCache": ...
    def len(self, sequence: int) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def extend(
        self,
        stream: int,
        sequence: int,
        scale: float,
        inputs: Sequence[Capsule],
        out: Capsule,
        indices: Capsule,
    ) -> None: ...
    def prime(self, stream: int, sequence: int, k: Capsule, v: Capsule) -> None: ...
    def step(
        self,
        stream: int,
        scale: float,
        positions: Capsule,
        inputs: Sequence[Capsule],
        turns: Optional[Capsule],
        out: Capsule,
        indices: Capsule,
    ) -> None: ...
    def advance(self, active: List[int]) -> None: ...
    def reserve(self, tokens: int) -> None: ...

class CudaDenseCache:
    def __new__(
        cls,
        ordinal: int,
        stream: int,
        dims: Sequence[int],
        dtype: str,
        window: Optional[int],
        sequences: int,
        capacity: int,
    ) -> "CudaDenseCache": ...
    def len(self, sequence: int) -> int: ...
    @property
    def bytes(self) -> int: ...
    def extend(
        self, stream: int, sequence: int, scale: float, inputs: Sequence[Capsule], out: Capsule
    ) -> None: ...
