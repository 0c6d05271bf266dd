// Gradients of a narrow weight, one for each group of a batch's rows, in one launch.
#include "types.cuh"

// Numbers of the narrow side that a thread sums at once, and rows between two roundings of a sum
// that may be long.
static constexpr int TILE = 8, RUN = 128;

// First row of each group of the launch, and the end; the same in group_product.rs.
struct Rows {
    u32 at[GROUPS + 1];
};

// out[g][n, w] (or [w, n] unless `across`) = Σ_t narrow[t, n]·wide[t, w] over the rows of group g, in
// their order, on top of what out holds when `add`. Grid: [width / 128, narrows / TILE, groups].
KERNEL group_product(const Real* wide, const Real* narrow, float* out,
                     const __grid_constant__ Rows rows, i64 width, i64 narrows, int across,
                     int add) {
    i64 w = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 first = (i64)blockIdx.y * TILE;
    int group = blockIdx.z;
    if (w >= width) return;
    float sums[TILE];
#pragma unroll
    for (int j = 0; j < TILE; ++j) sums[j] = 0.0f;
    i64 t = rows.at[group], end = rows.at[group + 1];
    while (t < end) {
        i64 stop = t + RUN < end ? t + RUN : end;
        float part[TILE];
#pragma unroll
        for (int j = 0; j < TILE; ++j) part[j] = 0.0f;
#pragma unroll 4
        for (; t < stop; ++t) {
            float x = widen(wide[t * width + w]);
#pragma unroll
            for (int j = 0; j < TILE; ++j)
                if (first + j < narrows) part[j] += x * widen(narrow[t * narrows + first + j]);
        }
#pragma unroll
        for (int j = 0; j < TILE; ++j) sums[j] += part[j];
    }
    float* to = out + group * width * narrows;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
        i64 n = first + j;
        if (n >= narrows) break;
        i64 at = across ? n * width + w : w * narrows + n;
        to[at] = add ? to[at] + sums[j] : sums[j];
    }
}
