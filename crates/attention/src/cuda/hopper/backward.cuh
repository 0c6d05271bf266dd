// What the backward kernels of `attend` share: the masks, the way out.
//
// Constants: D, V (head dims, multiples of 32, at most 256), MASK (0 causal, 1 compressed, 2 window).
//
// With P the probabilities, g the branch's gate and δ = dOut·O_b of a query (O_b the branch's output
// before its gate), the branch's gradients are
//   dV = (g·P)ᵀ·dOut     dS = g·P·(dOut·Vᵀ − δ)     dQ = scale·dS·K     dK = scale·dSᵀ·Q
// so no gated dOut is ever written. The gate's own gradient is δ.
#pragma once
#include "products.cuh"

static constexpr int DP = (D + 63) / 64 * 64, VP = (V + 63) / 64 * 64;
static constexpr int COMPRESSED = 1, WINDOW = 2;  // 0 is causal
static_assert(D % 32 == 0 && V % 32 == 0, "head dims come in multiples of 32");

struct Visible {
    int window;         // w
    int block, stride;  // l, d
};

// Keys [first_key, last_key) are visible to position p.
DEVICE int last_key(const Visible& a, int p) {
    if (MASK == COMPRESSED) return p + 1 < a.block ? 0 : (p + 1 - a.block) / a.stride + 1;
    return p + 1;
}
DEVICE int first_key(const Visible& a, int p) { return MASK == WINDOW ? max(0, p - a.window + 1) : 0; }

// Positions [first_query, last_query) of a sequence of `length` tokens see key j.
DEVICE int first_query(const Visible& a, int j) { return MASK == COMPRESSED ? j * a.stride + a.block - 1 : j; }
DEVICE int last_query(const Visible& a, int j, int length) {
    return MASK == WINDOW && a.window < length - j ? j + a.window : length;  // a window may be endless
}

// One thread's two rows see the columns [first, last) only: 64×N scores outside become −∞.
// `first` and `last` count from the thread's own first column.
template <int N>
DEVICE void hide(float (&scores)[N / 2], const int (&first)[2], const int (&last)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int at = 8 * j + c;
                if (at < first[r] || at >= last[r]) scores[4 * j + 2 * r + c] = -INF;
            }
        }
    }
}

// A thread's two rows, 8 apart, of a 64×N accumulator, times `factor`, to `row` (N numbers each) in
// 16-byte pieces, added to what is there if `add`. All lanes of a warp take part; `inside` says which
// rows are stored.
template <int N>
DEVICE void store_rows(const float (&d)[N / 2], const float (&factor)[2], Real* const (&row)[2],
                       const bool (&inside)[2], bool add) {
    // Old values are loaded before any store, as far as registers go: a load after a store waits for memory.
    static constexpr int PIECES = N / 16, AT_ONCE = N > 128 ? 2 : PIECES;
    int lane = threadIdx.x & 3;
#pragma unroll
    for (int from = 0; from < PIECES; from += AT_ONCE) {
        Vec<u32, 4> old[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int r = (from + i) / (N / 32), j = (from + i) % (N / 32);
            if (add && inside[r]) old[i] = *(const Vec<u32, 4>*)(row[r] + 32 * j + 8 * lane);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int r = (from + i) / (N / 32), j = (from + i) % (N / 32);
            Vec<u32, 4> words;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const float* pair = d + 4 * (4 * j + c) + 2 * r;
                words.at[c] = pack<Real>(pair[0] * factor[r], pair[1] * factor[r]);
            }
            transpose_quad(words.at);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                float2 x = unpack<Real>(words.at[c]), y = unpack<Real>(old[i].at[c]);
                if (add) words.at[c] = pack<Real>(x.x + y.x, x.y + y.y);
            }
            if (inside[r]) *(Vec<u32, 4>*)(row[r] + 32 * j + 8 * lane) = words;
        }
    }
}
