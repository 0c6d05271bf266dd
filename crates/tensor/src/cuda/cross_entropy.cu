// Rows of logits to losses and, in place or beside, to the gradient of the mean loss.
#include "pieces.cuh"

// VECTOR logits at once: 4 where rows are aligned, else 1.
typedef Vec<float, VECTOR> Logits;
typedef Vec<Real, VECTOR> Slopes;

// losses[r] = ln Σ_v e^{z_rv} − z_r,target, 0 for an ignored target (−100), and, unless dz is
// null, dz_rv = (softmax(z_r)_v − [v = target])·factor. dz may be z. One block a row.
KERNEL cross_entropy(const float* z, const i32* targets, float* losses, Real* dz, float factor,
                     i64 vocab) {
    __shared__ float scratch[32];
    __shared__ float shared_highest;
    i64 row = blockIdx.x;
    int target = targets[row];
    z += row * vocab;
    if (dz) dz += row * vocab;
    i64 vectors = vocab / VECTOR;
    if (target < 0) {
        if (threadIdx.x == 0) losses[row] = 0.0f;
        Slopes zeros;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) zeros.at[j] = narrow<Real>(0.0f);
        if (dz)
            for (i64 i = threadIdx.x; i < vectors; i += blockDim.x)
                reinterpret_cast<Slopes*>(dz)[i] = zeros;
        return;
    }

    // The thread's highest logit and its sum of e^{z − highest}.
    float highest = -INF, sum = 0.0f;
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) {
        Logits x = reinterpret_cast<const Logits*>(z)[i];
        float higher = highest;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) higher = fmaxf(higher, x.at[j]);
        sum *= exponential(highest - higher);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum += exponential(x.at[j] - higher);
        highest = higher;
    }
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float top = warp_max(highest);
    if (lane == 0) scratch[warp] = top;
    __syncthreads();
    if (warp == 0) {
        top = warp_max(lane < (int)(blockDim.x >> 5) ? scratch[lane] : -INF);
        if (lane == 0) shared_highest = top;
    }
    __syncthreads();
    top = shared_highest;
    // A thread without logits has the sum 0 of nothing.
    sum = block_sum((i64)threadIdx.x < vectors ? sum * exponential(highest - top) : 0.0f, scratch);
    if (threadIdx.x == 0) losses[row] = logf(sum) - (z[target] - top);
    if (!dz) return;
    // In place, the target's logit is overwritten below.
    __syncthreads();
    float scale = factor / sum;
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) {
        Logits x = reinterpret_cast<const Logits*>(z)[i];
        Slopes y;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            float slope = exponential(x.at[j] - top) * scale;
            if (i * VECTOR + j == target) slope -= factor;
            y.at[j] = narrow<Real>(slope);
        }
        reinterpret_cast<Slopes*>(dz)[i] = y;
    }
}

// *out = Σ losses / counted, 0 when none is counted; one block of 1024 threads.
KERNEL mean_loss(const float* losses, float* out, i64 n, double counted) {
    __shared__ double sums[1024];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < n; i += 1024) sum += losses[i];
    sums[threadIdx.x] = sum;
    for (int half = 512; half > 0; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *out = counted > 0.0 ? (float)(sums[0] / counted) : 0.0f;
}
