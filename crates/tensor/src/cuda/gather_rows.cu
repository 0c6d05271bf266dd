// y[r] = x[token of row r]; a row is a (token, choice) pair: rows[token·k + choice].
#include "gathers.cuh"

// Thread: a vector of a token, which is read once and written to each of its rows.
KERNEL gather_rows_forward(const Real* x, const i32* rows, Real* y, i64 tokens, int choices) {
    i64 index = piece_index(), token = index / PIECES;
    int piece = (int)(index % PIECES);
    if (token >= tokens) return;
    Piece value = load_piece(x, token, piece);
#pragma unroll 4
    for (int j = 0; j < choices; ++j) store_piece(y, rows[token * choices + j], piece, value);
}

// dx[t] = Σ_j dy[row of (t, j)] in the order of the choices, on top of what dx holds when `add`.
// Thread: a vector of a token.
KERNEL gather_rows_backward(const Real* dy, const i32* rows, Real* dx, i64 tokens, int choices,
                            int add) {
    i64 index = piece_index(), token = index / PIECES;
    int piece = (int)(index % PIECES);
    if (token >= tokens) return;
    float sums[VEC] = {};
    if (add) add_piece(sums, load_piece(dx, token, piece), 1.0f);
#pragma unroll 4
    for (int j = 0; j < choices; ++j)
        add_piece(sums, load_piece(dy, rows[token * choices + j], piece), 1.0f);
    store_piece(dx, token, piece, narrow_piece(sums));
}
