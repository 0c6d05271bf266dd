// The newest raw tokens of the compression branch, out of their rings: what a φ with parameters
// makes a block of.
#include "decode.cuh"

constexpr int THREADS = 128;

// Constants: D, V, LENGTH (tokens of a block), STRIDE. `starts` [n]: each row's first token; where no
// block begins there, nobody will ask for the row and it stays as it is: at most rows, at most steps.
// `sequences` [n], null: row i is of sequence i. to_k [n·LENGTH, K, D], to_v [n·LENGTH, K, V].
// Grid: [LENGTH, n·K].
KERNEL __launch_bounds__(THREADS)
    tails(const __grid_constant__ Cache raw, const i32* starts, const i32* sequences, Real* to_k, Real* to_v, int kv_heads) {
    const int n = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads, start = starts[n];
    if (start < 0 || start % STRIDE != 0) return;
    const int sequence = sequences ? sequences[n] : n, token = (start + (int)blockIdx.x) % raw.page;
    const i64 row = ((i64)n * LENGTH + blockIdx.x) * kv_heads + head;
    const i64 k = token_start(raw, sequence, token, head, kv_heads, D);
    const i64 v = token_start(raw, sequence, token, head, kv_heads, V);
    for (int i = threadIdx.x; i < D; i += THREADS) to_k[row * D + i] = raw.k[k + i];
    for (int i = threadIdx.x; i < V; i += THREADS) to_v[row * V + i] = raw.v[v + i];
}
