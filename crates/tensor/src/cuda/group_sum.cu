// Gradients of groups: their squared lengths, and their weighted sum on a grid of integers.
#include "slots.cuh"

// A slot of the gradients, f32 [groups, len]; the same as in group_sum.rs. `first` is its first
// element among those of all slots.
struct Slot {
    const float* gradients;
    i64 len;
    i64 first_block;
    i64 first;
};

// squares[g, slot] = Σ x², in f64 and one order. Grid: [groups, slots]; block: 256.
KERNEL group_squares(const Slot* table, int slots, double* squares) {
    __shared__ double sums[SLOT_THREADS];
    Slot slot = table[blockIdx.y];
    const float* own = slot.gradients + (i64)blockIdx.x * slot.len;
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < slot.len; i += SLOT_THREADS) sum += (double)own[i] * own[i];
    sums[threadIdx.x] = sum;
    for (int half = SLOT_THREADS / 2; half > 0; half >>= 1) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) squares[(i64)blockIdx.x * slots + blockIdx.y] = sums[0];
}

// Adds round(weight·x) of every group, a whole number below 2⁸¹ in size, cut into high·2⁴⁰ + low; the
// product is rounded to a double first, as on a CPU. What has the weight 0 is left out, whatever it
// is. weights is [groups, slots].
KERNEL group_add(const Slot* table, int slots, const double* weights, int groups, i64* high,
                 i64* low) {
    const Slot& slot = slot_of(table, slots);
    int which = (int)(&slot - table);
    i64 start = ((i64)blockIdx.x - slot.first_block) * SPAN;
    i64 end = start + SPAN < slot.len ? start + SPAN : slot.len;
    for (i64 i = start + threadIdx.x; i < end; i += SLOT_THREADS) {
        i64 highs = 0, lows = 0;
        for (int group = 0; group < groups; ++group) {
            double weight = weights[(i64)group * slots + which];
            if (weight == 0.0) continue;
            double x = __dmul_rn((double)slot.gradients[(i64)group * slot.len + i], weight);
            double upper = rint(__dmul_rn(x, 0x1p-40));
            highs += __double2ll_rn(upper);
            lows += __double2ll_rn(__dsub_rn(x, __dmul_rn(upper, 0x1p40)));
        }
        high[slot.first + i] += highs;
        low[slot.first + i] += lows;
    }
}
