// y = silu(gate)·up, silu(g) = g·σ(g).
#include "pieces.cuh"

KERNEL swiglu_forward(const Real* gate, const Real* up, Real* y, i64 n) {
    map2(gate, up, y, n, [](float g, float u) { return g * logistic(g) * u; });
}

// With s = σ(g): d_up = dy·g·s and d_gate = dy·up·s·(1 + g·(1 − s)); d_up may be dy.
KERNEL swiglu_backward(const Real* dy, const Real* gate, const Real* up, Real* d_gate, Real* d_up,
                       i64 n) {
    i64 i = piece_index();
    if (i * VEC >= n) return;
    Piece ds = load_piece(dy, i, n), gates = load_piece(gate, i, n), ups = load_piece(up, i, n);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
        float d = widen(ds.at[j]), g = widen(gates.at[j]), s = logistic(g);
        gates.at[j] = narrow<Real>(d * widen(ups.at[j]) * s * (1.0f + g * (1.0f - s)));
        ds.at[j] = narrow<Real>(d * g * s);
    }
    store_piece(d_gate, i, n, gates);
    store_piece(d_up, i, n, ds);
}
