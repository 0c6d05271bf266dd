// RMSNorm: y = x·r·w, r = 1/√(mean(x²) + eps). One group of threads holds a row in registers, so
// each number is read once; the backward's sums over rows are cut into parts.
#include "rows.cuh"

// x, y [rows, WIDTH]; w [WIDTH]; inverse [rows] takes r. Grid: rows / GROUPS.
KERNEL rms_norm_forward(const Real* x, const Real* w, Real* y, float* inverse, i64 rows,
                        float eps) {
    i64 row = (i64)blockIdx.x * GROUPS + group();
    bool live = row < rows;
    Piece xs[CHUNKS];
    load_row(xs, x + row * WIDTH, live);
    float squares[1] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            float v = widen(xs[c].at[i]);
            squares[0] += v * v;
        }
    group_sums(squares, 0);
    float r = 1.0f / sqrtf(squares[0] / WIDTH + eps);
    if (!live) return;
    if (lane() == 0) inverse[row] = r;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        if (!inside(c)) continue;
        Piece ws = load(w + column(c)), out;
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            out.at[i] = narrow<Real>(widen(xs[c].at[i]) * r * widen(ws.at[i]));
        store(y + row * WIDTH + column(c), out);
    }
}

// With x̂ = x·r: dx = r·(dy·w − x̂·mean(dy·w·x̂)), on top of what dx holds when `add`. Block p sums
// dy·x̂ over rows p·per .. (p + 1)·per into parts[p, WIDTH].
KERNEL __launch_bounds__(THREADS, RESIDENT)
rms_norm_backward(const Real* x, const Real* dy, const Real* w, const float* inverse,
                         Real* dx, float* parts, i64 rows, i64 per, int add) {
    i64 first = blockIdx.x * per, last = first + per < rows ? first + per : rows;
    Piece ws[CHUNKS];
    load_row(ws, w, true);
    float dw[CHUNKS][VEC] = {};
    Piece xs[CHUNKS], dys[CHUNKS];
    load_row(xs, x + (first + group()) * WIDTH, first + group() < last);
    load_row(dys, dy + (first + group()) * WIDTH, first + group() < last);
    int turn = 0;
    for (i64 base = first; base < last; base += GROUPS) {
        i64 row = base + group(), next = row + GROUPS;
        bool live = row < last;
        // The next row's numbers are on their way while this one's are summed.
        Piece next_xs[CHUNKS], next_dys[CHUNKS], old[CHUNKS];
        load_row(next_xs, x + next * WIDTH, next < last);
        load_row(next_dys, dy + next * WIDTH, next < last);
        load_row(old, dx + row * WIDTH, live && add);
        float r = live ? inverse[row] : 0.0f;
        float along[1] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                float d = widen(dys[c].at[i]), normed = widen(xs[c].at[i]) * r;
                along[0] += d * widen(ws[c].at[i]) * normed;
                dw[c][i] += d * normed;
            }
        group_sums(along, turn++);
        float mean = along[0] / WIDTH;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (!live || !inside(c)) continue;
            Piece out;
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                float g = widen(dys[c].at[i]) * widen(ws[c].at[i]);
                float now = r * (g - widen(xs[c].at[i]) * r * mean);
                out.at[i] = narrow<Real>(widen(old[c].at[i]) + now);
            }
            store(dx + row * WIDTH + column(c), out);
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            xs[c] = next_xs[c];
            dys[c] = next_dys[c];
        }
    }
    store_columns(parts + (i64)blockIdx.x * WIDTH, dw);
}
