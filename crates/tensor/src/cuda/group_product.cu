// Gradients of a narrow weight, one for each group of a batch's rows, in one launch.
#include "types.cuh"

// Numbers of the narrow side that a thread sums at once, slices of a group's rows that are summed
// beside one another, and rows of a slice between two roundings of a sum that may be long; the
// first two are the same in group_product.rs.
static constexpr int TILE = 8, SLICES = 4, RUN = 64;
static constexpr int WIDE = 128;

// First row of each group of the launch, and the end; the same in group_product.rs.
struct Rows {
    u32 at[GROUPS + 1];
};

// out[g][n, w] (or [w, n] unless `across`) = Σ_t narrow[t, n]·wide[t, w] over the rows of group g, on
// top of what out holds when `add`. Slice s sums every SLICES-th row from the s-th in their order;
// the slices are then added in theirs. Grid: [width / WIDE, narrows / TILE, groups]; block: [WIDE,
// SLICES].
KERNEL group_product(const Real* wide, const Real* narrow, float* out,
                     const __grid_constant__ Rows rows, i64 width, i64 narrows, int across,
                     int add) {
    __shared__ float parts[SLICES - 1][TILE][WIDE];
    i64 w = (i64)blockIdx.x * WIDE + threadIdx.x;
    i64 first = (i64)blockIdx.y * TILE;
    int group = blockIdx.z, slice = threadIdx.y;
    i64 start = rows.at[group] + slice, end = rows.at[group + 1];
    float sums[TILE];
#pragma unroll
    for (int j = 0; j < TILE; ++j) sums[j] = 0.0f;
    for (i64 t = start; w < width && t < end;) {
        i64 stop = t + SLICES * RUN < end ? t + SLICES * RUN : end;
        float part[TILE];
#pragma unroll
        for (int j = 0; j < TILE; ++j) part[j] = 0.0f;
#pragma unroll 4
        for (; t < stop; t += SLICES) {
            float x = widen(wide[t * width + w]);
#pragma unroll
            for (int j = 0; j < TILE; ++j)
                if (first + j < narrows) part[j] += x * widen(narrow[t * narrows + first + j]);
        }
#pragma unroll
        for (int j = 0; j < TILE; ++j) sums[j] += part[j];
    }
    if (slice > 0) {
#pragma unroll
        for (int j = 0; j < TILE; ++j) parts[slice - 1][j][threadIdx.x] = sums[j];
    }
    __syncthreads();
    if (slice > 0 || w >= width) return;
    float* to = out + group * width * narrows;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
        i64 n = first + j;
        if (n >= narrows) break;
        float sum = sums[j];
#pragma unroll
        for (int s = 0; s < SLICES - 1; ++s) sum += parts[s][j][threadIdx.x];
        i64 at = across ? n * width + w : w * narrows + n;
        to[at] = add ? to[at] + sum : sum;
    }
}
