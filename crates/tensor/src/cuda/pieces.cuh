// Elementwise loops: a thread takes 16 bytes of every operand. Pointers are aligned to 16 bytes;
// `n` may be anything.
#ifndef PIECES
#define PIECES
#include "types.cuh"

static constexpr int VEC = 16 / sizeof(Real);
typedef Vec<Real, VEC> Piece;

// Loads piece `i` of n numbers, zeros beyond the end.
DEVICE Piece load_piece(const Real* x, i64 i, i64 n) {
    if ((i + 1) * VEC <= n) return reinterpret_cast<const Piece*>(x)[i];
    Piece piece;
#pragma unroll
    for (int j = 0; j < VEC; ++j)
        piece.at[j] = i * VEC + j < n ? x[i * VEC + j] : narrow<Real>(0.0f);
    return piece;
}

DEVICE void store_piece(Real* x, i64 i, i64 n, const Piece& piece) {
    if ((i + 1) * VEC <= n) {
        reinterpret_cast<Piece*>(x)[i] = piece;
        return;
    }
#pragma unroll
    for (int j = 0; j < VEC; ++j)
        if (i * VEC + j < n) x[i * VEC + j] = piece.at[j];
}

DEVICE i64 piece_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// y = f(x), piece by piece.
template <class F>
DEVICE void map1(const Real* x, Real* y, i64 n, F f) {
    i64 i = piece_index();
    if (i * VEC >= n) return;
    Piece xs = load_piece(x, i, n);
#pragma unroll
    for (int j = 0; j < VEC; ++j) xs.at[j] = narrow<Real>(f(widen(xs.at[j])));
    store_piece(y, i, n, xs);
}

// y = f(a, b), piece by piece; y may be a or b.
template <class F>
DEVICE void map2(const Real* a, const Real* b, Real* y, i64 n, F f) {
    i64 i = piece_index();
    if (i * VEC >= n) return;
    Piece as = load_piece(a, i, n), bs = load_piece(b, i, n);
#pragma unroll
    for (int j = 0; j < VEC; ++j) as.at[j] = narrow<Real>(f(widen(as.at[j]), widen(bs.at[j])));
    store_piece(y, i, n, as);
}

// eˣ; for 16-bit storage by the special function unit, whose error is far below a rounding.
DEVICE float exponential(float x) {
    return sizeof(Real) == 4 ? expf(x) : exp2_approx(x * 1.44269504f);
}

DEVICE float logistic(float x) {
    float below = 1.0f + exponential(-x);
    return sizeof(Real) == 4 ? 1.0f / below : __fdividef(1.0f, below);
}
#endif
