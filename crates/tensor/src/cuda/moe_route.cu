// Router of a mixture of experts; a warp holds a token's EXPERTS numbers, lane i those of the
// experts i, i + 32, …
#include "types.cuh"

static constexpr int PER_LANE = (EXPERTS + 31) / 32;

DEVICE i64 warp_index() { return ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int expert(int i) { return i * 32 + lane(); }
DEVICE bool exists(int i) { return EXPERTS % 32 == 0 || expert(i) < EXPERTS; }

// p [tokens, EXPERTS] = softmax(logits); the `choices` most probable experts of each token, lower
// index on ties, and their weights: p, or p over the sum of the chosen when `normalise`.
KERNEL moe_route_forward(const Real* logits, float* p, i32* experts, Real* weights, i64 tokens,
                         int choices, int normalise) {
    i64 token = warp_index();
    if (token >= tokens) return;
    float ps[PER_LANE], highest = -INF;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        ps[i] = exists(i) ? widen(logits[token * EXPERTS + expert(i)]) : -INF;
        highest = fmaxf(highest, ps[i]);
    }
    highest = warp_max(highest);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        ps[i] = exists(i) ? expf(ps[i] - highest) : 0.0f;
        sum += ps[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        ps[i] /= sum;
        if (exists(i)) p[token * EXPERTS + expert(i)] = ps[i];
    }
    // Chosen experts are marked by a bit, not by their number, which may be NaN.
    u64 taken = 0;
    float total = 0.0f;
    for (int j = 0; j < choices; ++j) {
        float best = 0.0f;
        int at = EXPERTS;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            // In a row of NaN the free expert of lowest index is taken.
            bool free = exists(i) && !(taken >> i & 1);
            if (free && (at == EXPERTS || ps[i] > best)) {
                best = ps[i];
                at = expert(i);
            }
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            float other = __shfl_xor_sync(ALL_LANES, best, offset);
            int other_at = __shfl_xor_sync(ALL_LANES, at, offset);
            bool better = at == EXPERTS || other > best || (!(best > other) && other_at < at);
            if (other_at < EXPERTS && better) {
                best = other;
                at = other_at;
            }
        }
        if (at % 32 == lane()) taken |= 1ull << (at / 32);
        total += best;
        if (lane() == 0) {
            experts[token * choices + j] = at;
            if (!normalise) weights[token * choices + j] = narrow<Real>(best);
        }
    }
    if (!normalise) return;
    __syncwarp();
    for (int j = lane(); j < choices; j += 32) {
        float chosen = p[token * EXPERTS + experts[token * choices + j]];
        weights[token * choices + j] = narrow<Real>(chosen / total);
    }
}

// load[e] = EXPERTS/rows · (times e was chosen) and balance = Σ load·mean over tokens of p, from
// the column sums of p. One warp.
KERNEL moe_route_balance(const float* sums, const i32* starts, float* load, float* balance,
                         i64 tokens, i64 rows) {
    double total = 0.0, even = (double)(rows > 0 ? rows : 1) / EXPERTS;
    for (int e = 0; e < EXPERTS; ++e) {
        float share = (float)((starts[e + 1] - starts[e]) / even);
        if (e % 32 == lane()) load[e] = share;
        total += (double)sums[e] * (double)share;
    }
    if (lane() == 0) *balance = (float)(total / (double)(tokens > 0 ? tokens : 1));
}

// d_logits = p∘(dp − Σ p·dp) from the gradients of the weights and of the balance loss (or null).
KERNEL moe_route_backward(const float* p, const float* load, const i32* experts,
                          const Real* d_weights, const float* d_balance, Real* d_logits,
                          i64 tokens, int choices, int normalise) {
    i64 token = warp_index();
    if (token >= tokens) return;
    float share = d_balance ? *d_balance / (float)tokens : 0.0f;
    float ps[PER_LANE], dps[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        ps[i] = exists(i) ? p[token * EXPERTS + expert(i)] : 0.0f;
        dps[i] = exists(i) ? share * load[expert(i)] : 0.0f;
    }
    if (d_weights) {
        float total = 0.0f, along = 0.0f;
        for (int j = 0; j < choices; ++j) {
            float chosen = p[token * EXPERTS + experts[token * choices + j]];
            total += chosen;
            along += chosen * widen(d_weights[token * choices + j]);
        }
        along /= total;
        for (int j = 0; j < choices; ++j) {
            int at = experts[token * choices + j];
            float d = widen(d_weights[token * choices + j]);
            if (normalise) d = (d - along) / total;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
                if (at == expert(i)) dps[i] += d;
        }
    }
    float mean = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) mean += ps[i] * dps[i];
    mean = warp_sum(mean);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        if (exists(i)) d_logits[token * EXPERTS + expert(i)] = narrow<Real>(ps[i] * (dps[i] - mean));
}
