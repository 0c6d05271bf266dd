// Loops over rows that an index picks: a thread takes one vector of VEC numbers of a row of WIDTH.
// VEC divides WIDTH.
#ifndef GATHERS
#define GATHERS
#include "types.cuh"

static constexpr int PIECES = WIDTH / VEC;
typedef Vec<Real, VEC> Piece;

DEVICE i64 piece_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

DEVICE Piece load_piece(const Real* x, i64 row, int piece) {
    return reinterpret_cast<const Piece*>(x + row * WIDTH)[piece];
}
DEVICE void store_piece(Real* x, i64 row, int piece, const Piece& value) {
    reinterpret_cast<Piece*>(x + row * WIDTH)[piece] = value;
}

// sums += factor · piece.
DEVICE void add_piece(float (&sums)[VEC], const Piece& piece, float factor) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[i] += factor * widen(piece.at[i]);
}

DEVICE Piece narrow_piece(const float (&sums)[VEC]) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < VEC; ++i) piece.at[i] = narrow<Real>(sums[i]);
    return piece;
}
#endif
