// What the backward of `attend` needs of every query and head before it starts. Bandwidth-bound.
//
// `delta`: δ_c = dOut·O_c of up to three branches, which is also the gradient of their gates, and
// Δ_c = g_c·δ_c, the softmax correction. Constants: V. Lanes of a row: V/8, padded to a power of two.
// `rows`: a table that the copy engine can fetch for a tile of queries of one head.
#include "types.cuh"

static constexpr int CHUNKS = V / 8, LANES = CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;

struct Delta {
    const Real* d_out;      // [rows, V], rows = T·H
    const Real* branch[3];  // [rows, V], or null
    const Real* gate;       // [rows, 3], or null: 1
    Real* d_gate;           // [rows, 3], or null
    float* delta;           // [3, rows]: Δ
    i64 rows;
};

KERNEL delta(const Delta a) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    bool inside = row < a.rows && lane < CHUNKS;
    i64 at = row * V + lane * 8;
    Vec<Real, 8> up, x[3];
    if (inside) {
        up = *(const Vec<Real, 8>*)(a.d_out + at);
#pragma unroll
        for (int c = 0; c < 3; c++)
            if (a.branch[c] != nullptr) x[c] = *(const Vec<Real, 8>*)(a.branch[c] + at);
    }
#pragma unroll
    for (int c = 0; c < 3; c++) {
        if (a.branch[c] == nullptr) continue;
        float sum = 0.0f;
        if (inside) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(widen(up.at[i]), widen(x[c].at[i]), sum);
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        if (lane != c || row >= a.rows) continue;
        if (a.d_gate != nullptr) a.d_gate[row * 3 + c] = narrow<Real>(sum);
        a.delta[c * a.rows + row] = a.gate == nullptr ? sum : widen(a.gate[row * 3 + c]) * sum;
    }
}

struct Rows {
    const float* lse;    // [T, H], natural log
    const float* delta;  // [T, H]: Δ
    const Real* gate;    // [T, H, 3], or null: 1
    int gate_index, tokens, heads, spare;
    float4* rows;  // [H, T]: log-sum-exp (base 2, +∞ where nothing is visible), gate, δ, 0
};

// A block of 256 threads turns 32 tokens × 32 heads. Grid: token blocks, head blocks.
KERNEL rows(const Rows a) {
    __shared__ float4 table[32][33];
    int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (int i = y; i < 32; i += 8) {
        int token = blockIdx.x * 32 + i, head = blockIdx.y * 32 + x;
        if (token >= a.tokens || head >= a.heads) continue;
        i64 at = (i64)token * a.heads + head;
        float lse = a.lse[at], gate = a.gate == nullptr ? 1.0f : widen(a.gate[at * 3 + a.gate_index]);
        // A gate of zero makes dS zero whatever δ is.
        float delta = gate == 0.0f ? 0.0f : a.delta[at] / gate;
        table[x][i] = make_float4(lse == -INF ? INF : lse * 1.4426950408889634f, gate, delta, 0.0f);
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8) {
        int token = blockIdx.x * 32 + x, head = blockIdx.y * 32 + i;
        if (token < a.tokens && head < a.heads) a.rows[(i64)head * a.tokens + token] = table[i][x];
    }
}
