// Rows of logits to log-probabilities of their targets, and back to the logits' gradient.
#include "pieces.cuh"

// VECTOR logits at once: 4 where rows are aligned, else 1.
typedef Vec<float, VECTOR> Logits;
typedef Vec<Real, VECTOR> Slopes;

// The lowest finite number: what a thread without logits has as its highest.
#define LOWEST (-3.402823466e38f)

// With h = highest[r] = max_v z_rv and S = Σ_v e^{z_rv − h}:
// best[r] = −ln S, log_probs[r] = z_r,target − h − ln S, entropy[r] = ln S − Σ_v e^{z−h}(z−h)/S,
// hits[r] = 1 when the target is the first v of the highest logit, else 0. Rows without a target
// (−100) are left alone. One block a row. Log-probabilities are f32 whatever the storage, so the
// exponential is the exact one.
KERNEL token_rows(const float* z, const i32* targets, float* log_probs, float* best,
                  float* entropy, float* hits, float* highest_of, i64 vocab) {
    __shared__ float scratch[32];
    __shared__ float shared_highest;
    i64 row = blockIdx.x;
    int target = targets[row];
    if (target < 0) return;
    z += row * vocab;
    i64 vectors = vocab / VECTOR;

    // The thread's highest logit h, Σ e^{z − h} and Σ e^{z − h}(z − h).
    float highest = LOWEST, sum = 0.0f, moment = 0.0f;
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) {
        Logits x = reinterpret_cast<const Logits*>(z)[i];
        float higher = highest;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) higher = fmaxf(higher, x.at[j]);
        float shift = highest - higher, fade = expf(shift);
        // Nothing is left of sums that fade wholly, and ∞·0 must not come of them.
        moment = fade > 0.0f ? fade * (moment + shift * sum) : 0.0f * sum;
        sum *= fade;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            float below = x.at[j] - higher, e = expf(below);
            sum += e;
            moment += e * below;
        }
        highest = higher;
    }
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float top = warp_max(highest);
    if (lane == 0) scratch[warp] = top;
    __syncthreads();
    if (warp == 0) {
        top = warp_max(lane < (int)(blockDim.x >> 5) ? scratch[lane] : LOWEST);
        if (lane == 0) shared_highest = top;
    }
    __syncthreads();
    top = shared_highest;
    float shift = highest - top, fade = expf(shift);
    bool any = (i64)threadIdx.x < vectors && fade > 0.0f;
    moment = block_sum(any ? fade * (moment + shift * sum) : 0.0f * sum, scratch);
    sum = block_sum(any ? fade * sum : 0.0f * sum, scratch);

    float score = z[target];
    int earlier = 0;
    if (score == top)
        for (i64 i = threadIdx.x; i < target; i += blockDim.x) earlier |= z[i] == top;
    earlier = __syncthreads_or(earlier);
    if (threadIdx.x == 0) {
        float log_sum = logf(sum);
        highest_of[row] = top;
        best[row] = -log_sum;
        log_probs[row] = (score - top) - log_sum;
        entropy[row] = log_sum - moment / sum;
        hits[row] = score == top && !earlier ? 1.0f : 0.0f;
    }
}

// dz_rv = slopes[r]·([v = target] − e^{z_rv − highest[r] + best[r]}), 0 in rows without a target or
// with a slope of 0. dz may be z. One block a row.
KERNEL token_slopes(const float* z, const i32* targets, const float* slopes, const float* highest,
                    const float* best, Real* dz, i64 vocab) {
    i64 row = blockIdx.x;
    int target = targets[row];
    float slope = slopes[row], top = highest[row], most = best[row];
    z += row * vocab;
    dz += row * vocab;
    bool asked = target >= 0 && slope != 0.0f;
    i64 vectors = vocab / VECTOR;
    for (i64 i = threadIdx.x; i < vectors; i += blockDim.x) {
        Slopes y;
        if (asked) {
            Logits x = reinterpret_cast<const Logits*>(z)[i];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                float d = -slope * exponential((x.at[j] - top) + most);
                if (i * VECTOR + j == target) d += slope;
                y.at[j] = narrow<Real>(d);
            }
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) y.at[j] = narrow<Real>(0.0f);
        }
        reinterpret_cast<Slopes*>(dz)[i] = y;
    }
}
