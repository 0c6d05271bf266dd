// The squared length of all gradients in two launches, in f64 and one order.
#include "slots.cuh"

// The same as `Slot` in norm.rs.
struct Slot {
    const float* gradient;
    i64 len;
    i64 first_block;
};

// Sum over a block of `blockDim.x` threads, a power of two; the result is thread 0's.
DEVICE double block_total(double x, double* sums) {
    sums[threadIdx.x] = x;
    for (int half = blockDim.x / 2; half > 0; half >>= 1) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

KERNEL squares(const Slot* table, int slots, double* parts) {
    __shared__ double sums[SLOT_THREADS];
    const Slot slot = slot_of(table, slots);
    i64 start = ((i64)blockIdx.x - slot.first_block) * SPAN;
    typedef Vec<float, 4> Four;
    double sum = 0.0;
#pragma unroll
    for (int step = 0; step < SLOT_STEPS; ++step) {
        i64 at = start + (step * SLOT_THREADS + threadIdx.x) * 4;
        if (at + 4 <= slot.len) {
            Four g = *reinterpret_cast<const Four*>(slot.gradient + at);
#pragma unroll
            for (int j = 0; j < 4; ++j) sum += (double)g.at[j] * g.at[j];
        } else {
            for (i64 i = at; i < slot.len; ++i) sum += (double)slot.gradient[i] * slot.gradient[i];
        }
    }
    sum = block_total(sum, sums);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// One block of 1024 threads.
KERNEL total(const double* parts, double* out, i64 count) {
    __shared__ double sums[1024];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < count; i += 1024) sum += parts[i];
    sum = block_total(sum, sums);
    if (threadIdx.x == 0) *out = sum;
}
