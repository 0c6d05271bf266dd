// y[t] = Σ_j w[t, j]·x[row of (t, j)]; rows as in gather_rows.cu.
#include "gathers.cuh"

// Thread: a vector of a token.
KERNEL scatter_rows_forward(const Real* x, const Real* weights, const i32* rows, Real* y,
                            i64 tokens, int choices) {
    i64 index = piece_index(), token = index / PIECES;
    int piece = (int)(index % PIECES);
    if (token >= tokens) return;
    float sums[VEC] = {};
#pragma unroll 4
    for (int j = 0; j < choices; ++j) {
        i64 pair = token * choices + j;
        add_piece(sums, load_piece(x, rows[pair], piece), widen(weights[pair]));
    }
    store_piece(y, token, piece, narrow_piece(sums));
}

// dx[row of (t, j)] = w[t, j]·dy[t] and dw[t, j] = ⟨dy[t], x[row of (t, j)]⟩. Warp: a token.
KERNEL scatter_rows_backward(const Real* dy, const Real* x, const Real* weights, const i32* rows,
                             Real* dx, Real* d_weights, i64 tokens, int choices) {
    i64 token = piece_index() / 32;
    int lane = threadIdx.x % 32;
    if (token >= tokens) return;
    for (int j = 0; j < choices; ++j) {
        i64 pair = token * choices + j, row = rows[pair];
        float weight = widen(weights[pair]), product = 0.0f;
#pragma unroll 4
        for (int piece = lane; piece < PIECES; piece += 32) {
            Piece d = load_piece(dy, token, piece), v = load_piece(x, row, piece), out;
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                product += widen(d.at[i]) * widen(v.at[i]);
                out.at[i] = narrow<Real>(weight * widen(d.at[i]));
            }
            store_piece(dx, row, piece, out);
        }
        product = warp_sum(product);
        if (lane == 0) d_weights[pair] = narrow<Real>(product);
    }
}
