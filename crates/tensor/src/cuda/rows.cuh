// Rows of WIDTH numbers, each shared by a group of LANES threads that hold it in registers as
// CHUNKS vectors of VEC numbers: vector c of lane i stands at column (c·LANES + i)·VEC.
//
// LANES is a power of two; up to 32 a block of THREADS holds several groups, above it a block is
// one group. VEC divides WIDTH, so that every row is aligned. Set before: everything written in
// capitals.
#ifndef ROWS
#define ROWS
#include "types.cuh"

static constexpr int GROUPS = THREADS / LANES;
// Blocks of a backward that a multiprocessor runs at once: 768 threads of 80 registers.
static constexpr int RESIDENT = THREADS < 768 ? 768 / THREADS : 1;

typedef Vec<Real, VEC> Piece;

DEVICE int group() { return threadIdx.x / LANES; }
DEVICE int lane() { return threadIdx.x % LANES; }
DEVICE int column(int chunk) { return (chunk * LANES + lane()) * VEC; }

// Whether a chunk lies inside the row; known at compile time where the row has no rest.
DEVICE bool inside(int chunk) { return WIDTH % (LANES * VEC) == 0 || column(chunk) < WIDTH; }

DEVICE Piece load(const Real* at) { return *reinterpret_cast<const Piece*>(at); }
DEVICE void store(Real* at, const Piece& piece) { *reinterpret_cast<Piece*>(at) = piece; }

// Loads a row, zeros beyond its end; all zeros unless `live`.
DEVICE void load_row(Piece (&row)[CHUNKS], const Real* at, bool live) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        if (live && inside(c)) {
            row[c] = load(at + column(c));
        } else {
#pragma unroll
            for (int i = 0; i < VEC; ++i) row[c].at[i] = narrow<Real>(0.0f);
        }
    }
}

// Sums over a group, the same bits in each of its threads; every thread of the block must call,
// with `turn` one more than in the call before: calls then need one barrier each.
template <int N>
DEVICE void group_sums(float (&x)[N], int turn) {
    constexpr int INSIDE = LANES < 32 ? LANES : 32;
#pragma unroll
    for (int offset = INSIDE / 2; offset > 0; offset >>= 1)
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(ALL_LANES, x[n], offset);
    if constexpr (LANES > 32) {
        constexpr int WARPS = LANES > 32 ? LANES / 32 : 1;
        __shared__ float scratch[2][N][WARPS];
        float(&here)[N][WARPS] = scratch[turn & 1];
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int n = 0; n < N; ++n) here[n][threadIdx.x / 32] = x[n];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = here[n][threadIdx.x % WARPS];
#pragma unroll
        for (int offset = WARPS / 2; offset > 0; offset >>= 1)
#pragma unroll
            for (int n = 0; n < N; ++n) x[n] += __shfl_xor_sync(ALL_LANES, x[n], offset);
    }
}

// Adds up the groups' sums of each column, in the order of the groups, into out[0..WIDTH].
DEVICE void store_columns(float* out, const float (&sums)[CHUNKS][VEC]) {
    if constexpr (GROUPS == 1) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (!inside(c)) continue;
            Vec<float, VEC> wide;
#pragma unroll
            for (int i = 0; i < VEC; ++i) wide.at[i] = sums[c][i];
            *reinterpret_cast<Vec<float, VEC>*>(out + column(c)) = wide;
        }
    } else {
        constexpr int SPAN = LANES * CHUNKS * VEC;
        __shared__ float scratch[GROUPS * SPAN];
        __syncthreads();
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < VEC; ++i) scratch[group() * SPAN + column(c) + i] = sums[c][i];
        __syncthreads();
        for (int at = threadIdx.x; at < WIDTH; at += THREADS) {
            float sum = 0.0f;
            for (int g = 0; g < GROUPS; ++g) sum += scratch[g * SPAN + at];
            out[at] = sum;
        }
    }
}
#endif
