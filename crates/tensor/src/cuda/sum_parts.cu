// Sums of columns in a fixed order.
#include "types.cuh"

static constexpr int COLUMNS = 32, SLICES = 32;

// out[y, c] = Σ_p parts[p, c] over p in y·per .. (y + 1)·per, on top of what out holds when `add`.
// Slice s of a block adds every 32nd part from the s-th; the slices are then added in order.
// Grid: [width / 32, count / per]; block: [32, 32].
template <class T>
DEVICE void sum_columns(const T* parts, float* out, i64 count, i64 width, i64 per, int add) {
    __shared__ float sums[SLICES][COLUMNS + 1];
    i64 column = (i64)blockIdx.x * COLUMNS + threadIdx.x;
    i64 first = blockIdx.y * per, last = first + per < count ? first + per : count;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (i64 p = first + threadIdx.y; p < last; p += SLICES)
            sum += widen(parts[p * width + column]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= width) return;
    float* at = out + blockIdx.y * width + column;
    float total = add ? *at : 0.0f;
    for (int s = 0; s < SLICES; ++s) total += sums[s][threadIdx.x];
    *at = total;
}

KERNEL sum_parts(const float* parts, float* out, i64 count, i64 width, i64 per, int add) {
    sum_columns(parts, out, count, width, per, add);
}

// Rows of x [count, width], stored as Real: what a bias gets.
KERNEL sum_rows(const Real* x, float* out, i64 count, i64 width, i64 per, int add) {
    sum_columns(x, out, count, width, per, add);
}
