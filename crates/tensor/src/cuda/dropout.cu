// y = x·m/(1 − p); y may be x. Element i is dropped by the hash of start and i alone: the finalizer
// of SplitMix64, the same bits as on the CPU (ops/dropout.rs).
#include "pieces.cuh"

DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

KERNEL dropout(const Real* x, Real* y, u64 start, u32 dropped_below, float factor, i64 n) {
    i64 i = piece_index();
    if (i * VEC >= n) return;
    Piece xs = load_piece(x, i, n);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        u64 number = ((u64)(i * VEC + j) + 1) * 0x9e3779b97f4a7c15ull;
        u32 bits = (u32)(mix(start + number) >> 32);
        xs.at[j] = narrow<Real>(bits < dropped_below ? 0.0f : widen(xs.at[j]) * factor);
    }
    store_piece(y, i, n, xs);
}
