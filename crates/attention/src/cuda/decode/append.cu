// New tokens enter the caches of a layer; a block of the compression branch that they complete is
// averaged, turned to its position and stored.
#include "decode.cuh"

constexpr int THREADS = 128;

struct Target {
    const Real* k;  // [R, K, D], null: nothing for this cache
    const Real* v;  // [R, K, V]
    Cache cache;
};

struct Append {
    Target targets[3];
    const i32* positions;  // [R], -1: the row is idle
    const i32* sequences;  // [R], null: row i is of sequence i
    i32 kv_heads;
    // Mean compression, when `cmp.k` is there: targets[0] is then the ring of raw tokens, one token
    // a row, and keys are turned by `turns` [positions, 2, D/2] (cosines, sines) unless null.
    Cache cmp;
    const float* turns;
};

DEVICE void put(const Real* from, Real* to, int dim) {
    for (int i = threadIdx.x; i < dim; i += THREADS) to[i] = from[i];
}

// Constants: D, V; COMPRESS_BLOCK and COMPRESS_STRIDE where `cmp` is used.
KERNEL __launch_bounds__(THREADS) append(const __grid_constant__ Append p) {
    const int row = blockIdx.x / p.kv_heads, head = blockIdx.x % p.kv_heads;
    const int position = p.positions[row], sequence = p.sequences ? p.sequences[row] : row;
    if (position < 0) return;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const Target& target = p.targets[i];
        if (!target.k) continue;
        const int token = target.cache.ring ? position % target.cache.page : position;
        put(target.k + (i64)blockIdx.x * D, target.cache.k + token_start(target.cache, sequence, token, head, p.kv_heads, D), D);
        put(target.v + (i64)blockIdx.x * V, target.cache.v + token_start(target.cache, sequence, token, head, p.kv_heads, V), V);
    }
#ifdef COMPRESS_BLOCK
    const int first = position + 1 - COMPRESS_BLOCK;
    if (!p.cmp.k || first < 0 || first % COMPRESS_STRIDE != 0) return;
    __syncthreads();
    const int block = first / COMPRESS_STRIDE;
    const Cache& raw = p.targets[0].cache;
    __shared__ float key[D];
    auto mean = [&](const Real* x, int dim, int i) {
        float sum = 0.0f;
#pragma unroll 8
        for (int t = 0; t < COMPRESS_BLOCK; ++t)
            sum += widen(x[token_start(raw, sequence, (first + t) % raw.page, head, p.kv_heads, dim) + i]);
        return widen(narrow<Real>(sum / (float)COMPRESS_BLOCK));
    };
    for (int i = threadIdx.x; i < D; i += THREADS) key[i] = mean(raw.k, D, i);
    Real* v = p.cmp.v + token_start(p.cmp, sequence, block, head, p.kv_heads, V);
    for (int i = threadIdx.x; i < V; i += THREADS) v[i] = narrow<Real>(mean(raw.v, V, i));
    __syncthreads();
    Real* k = p.cmp.k + token_start(p.cmp, sequence, block, head, p.kv_heads, D);
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float y = key[i];
        if (p.turns) {
            const int half = D / 2, j = i % half;
            const float* turn = p.turns + (i64)first * D;
            const float a = key[j], b = key[j + half], cos = turn[j], sin = turn[half + j];
            y = i < half ? __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)) : __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
        }
        k[i] = narrow<Real>(y);
    }
#endif
}
