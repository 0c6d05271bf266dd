// The newest raw tokens of the compression branch, out of their rings: what a φ with parameters
// makes a block of.
#include "decode.cuh"

constexpr int THREADS = 128;

// Constants: D, V, LENGTH (tokens of a block). `starts` [n]: each row's first token; tokens before
// position 0 are zeros. `sequences` [n], null: row i is of sequence i. to_k [n·LENGTH, K, D], to_v
// [n·LENGTH, K, V]. Grid: [LENGTH, n·K].
KERNEL __launch_bounds__(THREADS)
    tails(const __grid_constant__ Cache raw, const i32* starts, const i32* sequences, Real* to_k, Real* to_v, int kv_heads) {
    const int n = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads;
    const int sequence = sequences ? sequences[n] : n, token = starts[n] + (int)blockIdx.x;
    const i64 row = ((i64)n * LENGTH + blockIdx.x) * kv_heads + head;
    const i64 k = token < 0 ? 0 : token_start(raw, sequence, token % raw.page, head, kv_heads, D);
    const i64 v = token < 0 ? 0 : token_start(raw, sequence, token % raw.page, head, kv_heads, V);
    for (int i = threadIdx.x; i < D; i += THREADS) to_k[row * D + i] = token < 0 ? narrow<Real>(0.0f) : raw.k[k + i];
    for (int i = threadIdx.x; i < V; i += THREADS) to_v[row * V + i] = token < 0 ? narrow<Real>(0.0f) : raw.v[v + i];
}
