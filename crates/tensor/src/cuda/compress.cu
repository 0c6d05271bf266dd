// φ: every block of BLOCK tokens, STRIDE apart (it divides BLOCK), becomes one row. Here the
// average, and the copies between tokens and flattened blocks around the matrix products of the
// other kinds; compress_phi.cu has what stands between those products.
//
// x is [T, HEADS, DIM], compressed rows are [N, HEADS, DIM]; sequence s has the tokens
// tokens_at[s]..tokens_at[s + 1] and the rows rows_at[s]..rows_at[s + 1]. VEC divides DIM.
#include "types.cuh"

static constexpr int WIDTH = HEADS * DIM, PIECES = WIDTH / VEC, HEAD_PIECES = DIM / VEC;
static constexpr int REACH = BLOCK / STRIDE;
typedef Vec<Real, VEC> Piece;

struct Sequences {
    const i32 *tokens_at, *rows_at;
    int count;
};

// The sequence that holds `at` by its offsets; empty ones hold nothing.
DEVICE int sequence_of(const i32* offsets, int count, i64 at) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (offsets[middle] <= at) low = middle; else high = middle;
    }
    return low;
}

// First token of compressed row n; without offsets there is one sequence.
DEVICE i64 token_of_row(const Sequences& all, i64 n) {
    if (!all.tokens_at) return n * STRIDE;
    int s = sequence_of(all.rows_at, all.count, n);
    return all.tokens_at[s] + (n - all.rows_at[s]) * STRIDE;
}

// The rows low..high whose blocks cover `token` of sequence s.
DEVICE void covering(const Sequences& all, int s, i64 token, i64& low, i64& high) {
    i64 i = token - all.tokens_at[s], count = all.rows_at[s + 1] - all.rows_at[s];
    low = i < BLOCK ? 0 : (i - BLOCK) / STRIDE + 1;
    high = i / STRIDE + 1 < count ? i / STRIDE + 1 : count;
    low += all.rows_at[s];
    high += all.rows_at[s];
}

DEVICE i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// sums += the STRIDE tokens from x on, one vector of each.
DEVICE void add_stride(float (&sums)[VEC], const Piece* x) {
#pragma unroll 16
    for (int t = 0; t < STRIDE; ++t) {
        Piece piece = x[(i64)t * PIECES];
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[i] += widen(piece.at[i]);
    }
}

static constexpr int RUN = 4, MOST = 4;

// Thread: one vector of RUN rows. Blocks overlap, so the sums of REACH strides are kept and each
// token of the run is read once.
KERNEL compress_mean_forward(const Real* x, Real* out, const i32* tokens_at, const i32* rows_at,
                             int sequences, i64 rows) {
    i64 index = thread_index(), first = index / PIECES * RUN;
    int piece = (int)(index % PIECES);
    i64 last = first + RUN < rows ? first + RUN : rows;
    constexpr int KEPT = REACH <= MOST ? REACH : 1;
    float kept[KEPT][VEC];
    int s = -1;
    for (i64 n = first; n < last; ++n) {
        bool fresh = s < 0 || n >= rows_at[s + 1];
        if (fresh) s = sequence_of(rows_at, sequences, n);
        i64 token = tokens_at[s] + (n - rows_at[s]) * STRIDE;
        const Piece* from = reinterpret_cast<const Piece*>(x) + token * PIECES + piece;
        float sums[VEC] = {};
        if constexpr (REACH <= MOST) {
            if (fresh) {
#pragma unroll
                for (int j = 1; j < REACH; ++j) {
#pragma unroll
                    for (int i = 0; i < VEC; ++i) kept[j][i] = 0.0f;
                    add_stride(kept[j], from + (i64)(j - 1) * STRIDE * PIECES);
                }
            }
#pragma unroll
            for (int j = 0; j < REACH; ++j)
#pragma unroll
                for (int i = 0; i < VEC; ++i) kept[j][i] = j + 1 < REACH ? kept[j + 1][i] : 0.0f;
            add_stride(kept[REACH - 1], from + (i64)(REACH - 1) * STRIDE * PIECES);
#pragma unroll
            for (int j = 0; j < REACH; ++j)
#pragma unroll
                for (int i = 0; i < VEC; ++i) sums[i] += kept[j][i];
        } else {
            for (int j = 0; j < REACH; ++j) add_stride(sums, from + (i64)j * STRIDE * PIECES);
        }
        Piece mean;
#pragma unroll
        for (int i = 0; i < VEC; ++i) mean.at[i] = narrow<Real>(sums[i] / BLOCK);
        reinterpret_cast<Piece*>(out)[n * PIECES + piece] = mean;
    }
}

static constexpr int TOKENS = 16;

// dx[t] = Σ dy over the rows that cover t, over BLOCK. Thread: one vector of TOKENS tokens, most
// of which are covered by the same rows.
KERNEL compress_mean_backward(const Real* dy, Real* dx, const i32* tokens_at, const i32* rows_at,
                              int sequences, i64 tokens) {
    Sequences all = {tokens_at, rows_at, sequences};
    i64 index = thread_index(), first = index / PIECES * TOKENS;
    int piece = (int)(index % PIECES), s = -1;
    i64 last = first + TOKENS < tokens ? first + TOKENS : tokens;
    i64 low = -1, high = -1;
    Piece out;
    for (i64 t = first; t < last; ++t) {
        if (s < 0 || t >= tokens_at[s + 1]) s = sequence_of(tokens_at, sequences, t);
        i64 new_low, new_high;
        covering(all, s, t, new_low, new_high);
        if (new_low != low || new_high != high) {
            low = new_low;
            high = new_high;
            float sums[VEC] = {};
            for (i64 n = low; n < high; ++n) {
                Piece d = reinterpret_cast<const Piece*>(dy)[n * PIECES + piece];
#pragma unroll
                for (int i = 0; i < VEC; ++i) sums[i] += widen(d.at[i]);
            }
#pragma unroll
            for (int i = 0; i < VEC; ++i) out.at[i] = narrow<Real>(sums[i] / BLOCK);
        }
        reinterpret_cast<Piece*>(dx)[t * PIECES + piece] = out;
    }
}

// out [HEADS, count, BLOCK·DIM]: the flattened blocks of the rows first... Thread: a vector of a
// token of a block; grid: [.., HEADS].
KERNEL compress_gather(const Real* x, Real* out, const i32* tokens_at, const i32* rows_at,
                       int sequences, i64 first, i64 count) {
    constexpr int ROW = BLOCK * HEAD_PIECES;
    Sequences all = {tokens_at, rows_at, sequences};
    i64 index = thread_index(), row = index / ROW;
    if (row >= count) return;
    int rest = (int)(index % ROW), head = blockIdx.y;
    i64 token = token_of_row(all, first + row) + rest / HEAD_PIECES;
    i64 from = (token * HEADS + head) * HEAD_PIECES + rest % HEAD_PIECES;
    reinterpret_cast<Piece*>(out)[head * count * ROW + index] =
        reinterpret_cast<const Piece*>(x)[from];
}

// dx of the tokens from..to: the sum over the blocks that cover a token, out of the gradients of
// `count` flattened blocks, [HEADS, count, BLOCK·DIM], whose first is row `first`. Thread: a vector
// of a token; grid: [.., HEADS].
KERNEL compress_scatter(const float* d_blocks, Real* dx, const i32* tokens_at, const i32* rows_at,
                        int sequences, i64 first, i64 count, i64 from, i64 to) {
    Sequences all = {tokens_at, rows_at, sequences};
    i64 index = thread_index(), token = from + index / HEAD_PIECES;
    if (token >= to) return;
    int piece = (int)(index % HEAD_PIECES), head = blockIdx.y;
    int s = sequence_of(tokens_at, sequences, token);
    i64 low, high;
    covering(all, s, token, low, high);
    float sums[VEC] = {};
    for (i64 n = low; n < high; ++n) {
        i64 inside = token - tokens_at[s] - (n - rows_at[s]) * STRIDE;
        i64 block = head * count + n - first;
        const float* d = d_blocks + (block * BLOCK + inside) * DIM + piece * VEC;
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[i] += d[i];
    }
    Piece out;
#pragma unroll
    for (int i = 0; i < VEC; ++i) out.at[i] = narrow<Real>(sums[i]);
    reinterpret_cast<Piece*>(dx)[(token * HEADS + head) * HEAD_PIECES + piece] = out;
}

// The rows first.. of out [N, HEADS, DIM] = y [HEADS, count, DIM] + shift [HEADS, DIM]. Thread: a
// vector; grid: [.., HEADS].
KERNEL compress_finish(const float* y, const float* shift, Real* out, i64 first, i64 count) {
    i64 index = thread_index(), row = index / HEAD_PIECES;
    if (row >= count) return;
    int piece = (int)(index % HEAD_PIECES), head = blockIdx.y;
    y += (head * count * HEAD_PIECES + index) * VEC;
    shift += head * DIM + piece * VEC;
    Piece value;
#pragma unroll
    for (int i = 0; i < VEC; ++i) value.at[i] = narrow<Real>(y[i] + shift[i]);
    reinterpret_cast<Piece*>(out)[((first + row) * HEADS + head) * HEAD_PIECES + piece] = value;
}
