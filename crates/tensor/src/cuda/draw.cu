// Tokens chosen from rows of logits, one block a row.
#include "types.cuh"

// Logits whose exponentials are added in f32 before they join a sum in f64, as in exponentials.rs;
// a row has RUNS runs of them. RUN and THREADS are the same in draw.rs.
static constexpr int RUN = 1024, THREADS = 1024, WARPS = THREADS / 32;

// How a row's token is chosen; the same in draw.rs.
struct Ask {
    float temperature;
    int wanted;
    double at;
};

// The token, −1 where the logits are not numbers, and its ln p.
struct Drawn {
    int token;
    float log_prob;
};

// The first place of the highest.
DEVICE void higher(float& highest, int& place) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffff, highest, offset);
        int at = __shfl_xor_sync(0xffffffff, place, offset);
        if (other > highest || (other == highest && at < place)) {
            highest = other;
            place = at;
        }
    }
}

// drawn[r] is the token at which the running sum of e^{(z_rv − max)/temperature} over v first exceeds
// the share `at` of the whole, or the first of the highest logits when the temperature is 0. A row's
// sums are cut at the same places whatever the other rows are.
KERNEL __launch_bounds__(THREADS)
    draw(const float* z, const Ask* asks, Drawn* drawn, i64 vocab) {
    __shared__ float runs[RUNS];
    __shared__ double sums[WARPS];
    __shared__ float highest_of[WARPS];
    __shared__ int place_of[WARPS];
    Ask ask = asks[blockIdx.x];
    if (!ask.wanted) return;
    z += blockIdx.x * vocab;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    float highest = -INF;
    int place = 0, odd = 0;
#pragma unroll 4
    for (i64 i = threadIdx.x; i < vocab; i += THREADS) {
        float x = z[i];
        // NaN too.
        odd |= !(x < INF);
        if (x > highest) {
            highest = x;
            place = (int)i;
        }
    }
    higher(highest, place);
    if (lane == 0) {
        highest_of[warp] = highest;
        place_of[warp] = place;
    }
    odd = __syncthreads_or(odd);
    highest = highest_of[lane];
    place = place_of[lane];
    higher(highest, place);
    if (odd || highest == -INF) {
        if (threadIdx.x == 0) drawn[blockIdx.x] = {-1, highest - highest};
        return;
    }

    // Sums by run at the temperature, and all together without.
    float scale = ask.temperature > 0.0f ? 1.0f / ask.temperature : 1.0f;
    double plain = 0.0;
#pragma unroll 1
    for (int run = warp; run < RUNS; run += WARPS) {
        float own = 0.0f, whole = 0.0f;
#pragma unroll 4
        for (int j = lane; j < RUN; j += 32) {
            i64 i = (i64)run * RUN + j;
            if (i >= vocab) break;
            float below = z[i] - highest;
            own += expf(below * scale);
            whole += expf(below);
        }
        own = warp_sum(own);
        plain += warp_sum(whole);
        if (lane == 0) runs[run] = own;
    }
    if (lane == 0) sums[warp] = plain;
    __syncthreads();
    if (warp > 0) return;

    if (ask.temperature > 0.0f) {
        // Lane 0 finds the run; all lanes the token in it.
        int run = 0;
        double left = 0.0;
        if (lane == 0) {
            double whole = 0.0;
#pragma unroll 4
            for (int r = 0; r < RUNS; ++r) whole += runs[r];
            left = ask.at * whole;
            int last = 0;
#pragma unroll 1
            for (run = 0; run < RUNS && left >= runs[run]; ++run) {
                left -= runs[run];
                if (runs[run] > 0.0f) last = run;
            }
            if (run == RUNS) {
                // Rounding took the share past the end.
                run = last;
                left = INF;
            }
        }
        run = __shfl_sync(0xffffffff, run, 0);
        left = __shfl_sync(0xffffffff, left, 0);
        // A temperature whose inverse is no number leaves the highest.
#pragma unroll 1
        for (int j = lane; j < RUN; j += 32) {
            i64 i = (i64)run * RUN + j;
            float weight = i < vocab ? expf((z[i] - highest) * scale) : 0.0f;
            double sum = weight;
#pragma unroll
            for (int offset = 1; offset < 32; offset <<= 1) {
                double before = __shfl_up_sync(0xffffffff, sum, offset);
                if (lane >= offset) sum += before;
            }
            u32 past = __ballot_sync(0xffffffff, left - sum < 0.0);
            u32 positive = __ballot_sync(0xffffffff, weight > 0.0f);
            if (past) {
                place = run * RUN + j - lane + __ffs(past) - 1;
                break;
            }
            if (positive) place = run * RUN + j - lane + 31 - __clz(positive);
            left -= __shfl_sync(0xffffffff, sum, 31);
        }
    }
    if (lane > 0) return;
    double whole = 0.0;
    for (int w = 0; w < WARPS; ++w) whole += sums[w];
    drawn[blockIdx.x] = {place, (float)((double)(z[place] - highest) - log(whole))};
}
