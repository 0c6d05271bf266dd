// y[t] = table[ids[t]]. Backward: the tokens are sorted by id (sort.cu), so that the sum of each
// row runs over its tokens in order: rows with at most FEW tokens by a thread a few vectors, the
// others by a block a slice of columns, in parts whose places depend on the number of tokens alone.
#include "gathers.cuh"

static constexpr int FEW = 32, MANY = 1024;

// An id outside 0..vocab makes a row of NaN. Thread: a vector of a token.
KERNEL embedding_forward(const Real* table, const i32* ids, Real* y, i64 tokens, i64 vocab) {
    i64 index = piece_index(), token = index / PIECES;
    int piece = (int)(index % PIECES);
    if (token >= tokens) return;
    i64 id = ids[token];
    Piece value;
    if (id >= 0 && id < vocab) {
        value = load_piece(table, id, piece);
    } else {
#pragma unroll
        for (int i = 0; i < VEC; ++i) value.at[i] = narrow<Real>(__uint_as_float(0x7fffffff));
    }
    store_piece(y, token, piece, value);
}

DEVICE void store_sums(float* at, const float (&sums)[VEC], bool add) {
    typedef Vec<float, VEC> Wide;
    Wide out;
    if (add) out = *reinterpret_cast<const Wide*>(at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) out.at[i] = (add ? out.at[i] : 0.0f) + sums[i];
    *reinterpret_cast<Wide*>(at) = out;
}

// sum [vocab, WIDTH] f32 for the rows of at most FEW tokens; untouched rows are zeroed unless
// `add`. The tokens of row v are order[starts[v]..starts[v + 1]]. Thread: EACH vectors of a row.
KERNEL embedding_few(const Real* dy, const i32* order, const i32* starts, float* sum, i64 vocab,
                     int add) {
    constexpr int EACH = 4, SPAN = (PIECES + EACH - 1) / EACH;
    i64 index = piece_index(), row = index / SPAN;
    int piece = (int)(index % SPAN);
    if (row >= vocab) return;
    int from = starts[row], to = starts[row + 1];
    if (to - from > FEW || (add && to == from)) return;
    float sums[EACH][VEC] = {};
#pragma unroll 2
    for (int i = from; i < to; ++i) {
        i64 token = order[i];
#pragma unroll
        for (int e = 0; e < EACH; ++e)
            if (PIECES % EACH == 0 || piece + e * SPAN < PIECES)
                add_piece(sums[e], load_piece(dy, token, piece + e * SPAN), 1.0f);
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e)
        if (PIECES % EACH == 0 || piece + e * SPAN < PIECES)
            store_sums(sum + row * WIDTH + (piece + e * SPAN) * VEC, sums[e], add);
}

// The rows of more than `above` and at most `most` tokens. Such a row's stretch of `order` holds a
// multiple of `above`; the first of them names the block that adds the row up, a slice of 32
// vectors. Grid: [tokens / above, PIECES / 32]; warp w takes the w-th part of the tokens, the
// parts are added in order.
template <int WARPS>
DEVICE void add_rows(const Real* dy, const i32* keys, const i32* order, const i32* starts,
                     float* sum, i64 vocab, int above, int most, int add) {
    __shared__ float parts[WARPS][32][VEC + 1];
    i64 mark = (i64)blockIdx.x * above;
    i64 row = keys[mark];
    if (row >= vocab) return;
    int from = starts[row], to = starts[row + 1];
    if (to - from <= above || to - from > most || mark - from >= above) return;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = blockIdx.y * 32 + lane;
    int per = (to - from + WARPS - 1) / WARPS;
    int first = from + warp * per, last = first + per < to ? first + per : to;
    float sums[VEC] = {};
    if (piece < PIECES) {
#pragma unroll 8
        for (int i = first; i < last; ++i) add_piece(sums, load_piece(dy, order[i], piece), 1.0f);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) parts[warp][lane][i] = sums[i];
    __syncthreads();
    if (warp > 0 || piece >= PIECES) return;
    for (int w = 1; w < WARPS; ++w)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sums[i] += parts[w][lane][i];
    store_sums(sum + row * WIDTH + piece * VEC, sums, add);
}

// Rows of FEW to MANY tokens; block: 256.
KERNEL embedding_many(const Real* dy, const i32* keys, const i32* order, const i32* starts,
                      float* sum, i64 vocab, int add) {
    add_rows<8>(dy, keys, order, starts, sum, vocab, FEW, MANY, add);
}

// Rows of more than MANY tokens; block: 1024.
KERNEL embedding_most(const Real* dy, const i32* keys, const i32* order, const i32* starts,
                      float* sum, i64 vocab, int add) {
    add_rows<32>(dy, keys, order, starts, sum, vocab, MANY, 0x7fffffff, add);
}
