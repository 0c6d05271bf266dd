// LayerNorm: y = x̂·w + b, x̂ = (x − mean)·r, r = 1/√(var + eps). As rms_norm.cu.
#include "rows.cuh"

// x, y [rows, WIDTH]; w, b [WIDTH]; moments [rows, 2] takes mean and r. Grid: rows / GROUPS.
KERNEL layer_norm_forward(const Real* x, const Real* w, const Real* b, Real* y, float* moments,
                          i64 rows, float eps) {
    i64 row = (i64)blockIdx.x * GROUPS + group();
    bool live = row < rows;
    Piece xs[CHUNKS];
    load_row(xs, x + row * WIDTH, live);
    float sum[1] = {}, squares[1] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[0] += widen(xs[c].at[i]);
    group_sums(sum, 0);
    float mean = sum[0] / WIDTH;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        if (!inside(c)) continue;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            float v = widen(xs[c].at[i]) - mean;
            squares[0] += v * v;
        }
    }
    group_sums(squares, 1);
    float r = 1.0f / sqrtf(squares[0] / WIDTH + eps);
    if (!live) return;
    if (lane() == 0) {
        moments[2 * row] = mean;
        moments[2 * row + 1] = r;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        if (!inside(c)) continue;
        Piece ws = load(w + column(c)), bs = load(b + column(c)), out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            float normed = (widen(xs[c].at[i]) - mean) * r;
            out.at[i] = narrow<Real>(normed * widen(ws.at[i]) + widen(bs.at[i]));
        }
        store(y + row * WIDTH + column(c), out);
    }
}

// With g = dy·w: dx = r·(g − mean(g) − x̂·mean(g·x̂)), on top of what dx holds when `add`. Block p
// sums dy·x̂ and dy over rows p·per .. (p + 1)·per into dw_parts[p, WIDTH] and db_parts[p, WIDTH].
KERNEL __launch_bounds__(THREADS, RESIDENT)
layer_norm_backward(const Real* x, const Real* dy, const Real* w, const float* moments,
                           Real* dx, float* dw_parts, float* db_parts, i64 rows, i64 per,
                           int add) {
    i64 first = blockIdx.x * per, last = first + per < rows ? first + per : rows;
    Piece ws[CHUNKS];
    load_row(ws, w, true);
    float dw[CHUNKS][VEC] = {}, db[CHUNKS][VEC] = {};
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
        float mean = live ? moments[2 * row] : 0.0f, r = live ? moments[2 * row + 1] : 0.0f;
        float sums[2] = {};  // of g and of g·x̂
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                // Beyond the row's end dy and w are zeros.
                float d = widen(dys[c].at[i]), normed = (widen(xs[c].at[i]) - mean) * r;
                float g = d * widen(ws[c].at[i]);
                sums[0] += g;
                sums[1] += g * normed;
                dw[c][i] += d * normed;
                db[c][i] += d;
            }
        group_sums(sums, turn++);
        float total = sums[0] / WIDTH, along = sums[1] / WIDTH;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (!live || !inside(c)) continue;
            Piece out;
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                float g = widen(dys[c].at[i]) * widen(ws[c].at[i]);
                float normed = (widen(xs[c].at[i]) - mean) * r;
                out.at[i] = narrow<Real>(widen(old[c].at[i]) + r * (g - total - normed * along));
            }
            store(dx + row * WIDTH + column(c), out);
        }
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            xs[c] = next_xs[c];
            dys[c] = next_dys[c];
        }
    }
    store_columns(dw_parts + (i64)blockIdx.x * WIDTH, dw);
    store_columns(db_parts + (i64)blockIdx.x * WIDTH, db);
}
