// The best blocks of a row, by CHOOSERS threads: a radix search for the last score that gets in, then
// the blocks above it, ascending. Ties go to the lower index.
#pragma once
#include "cluster.cuh"
#include "decode.cuh"

// CHOOSERS: a constant, a multiple of 32.

struct Choice {
    u32 counts[256];
    u32 low[CHOOSERS / 32], high[CHOOSERS / 32];
    u32 above[CHOOSERS / 32], equal[CHOOSERS / 32];
    u32 digit, taken, here;
};

// Writes to `chosen` the `wanted` (fewer than `count`, at least 1) indices of the greatest keys,
// ascending, each plus `first`. Every thread of the group comes here; `thread` is
// 0..CHOOSERS.
template <int BARRIER>
DEVICE void choose(const u32* keys, int count, int wanted, int first, i32* chosen, Choice& shared, int thread) {
    const int lane = thread & 31, warp = thread >> 5;
    constexpr int WARPS = CHOOSERS / 32;
    u32 low = 0xffffffffu, high = 0;
    for (int i = thread; i < count; i += CHOOSERS) {
        low = min(low, keys[i]);
        high = max(high, keys[i]);
    }
    low = __reduce_min_sync(ALL_LANES, low);
    high = __reduce_max_sync(ALL_LANES, high);
    if (lane == 0) {
        shared.low[warp] = low;
        shared.high[warp] = high;
    }
    group_sync<BARRIER, CHOOSERS>();
    for (int i = 0; i < WARPS; ++i) {
        low = min(low, shared.low[i]);
        high = max(high, shared.high[i]);
    }

    // Keys agree above bit `bits`; `prefix` are those of the last key that gets in. A key whose
    // bits from `bits` up exceed the prefix is in, `wanted` of those that equal it are.
    int bits = 32 - __clz(low ^ high);
    u32 prefix = bits == 32 ? 0 : high >> bits;
    u32 need = wanted;
    bool all = false;
    while (bits > 0 && !all) {
        const int width = min(bits, 8), next = bits - width;
        for (int i = thread; i < 256; i += CHOOSERS) shared.counts[i] = 0;
        group_sync<BARRIER, CHOOSERS>();
        for (int i = thread; i < count; i += CHOOSERS) {
            u32 key = keys[i];
            if (bits == 32 || key >> bits == prefix) atomicAdd(&shared.counts[(key >> next) & ((1u << width) - 1)], 1u);
        }
        group_sync<BARRIER, CHOOSERS>();
        if (warp == 0) {
            // Lane 0 has the eight highest digits.
            u32 sum = 0;
            for (int i = 0; i < 8; ++i) sum += shared.counts[255 - (lane * 8 + i)];
            u32 before = sum;
            for (int offset = 1; offset < 32; offset <<= 1) {
                u32 other = __shfl_up_sync(ALL_LANES, before, offset);
                if (lane >= offset) before += other;
            }
            before -= sum;
            if (before < need && before + sum >= need) {
                int digit = 255 - lane * 8;
                while (before + shared.counts[digit] < need) before += shared.counts[digit--];
                shared.digit = digit;
                shared.taken = before;
                shared.here = shared.counts[digit];
            }
        }
        group_sync<BARRIER, CHOOSERS>();
        prefix = (bits == 32 ? 0 : prefix << width) | shared.digit;
        need -= shared.taken;
        all = shared.here == need;
        bits = next;
    }

    // Each warp takes a run of the blocks.
    const int part = ((count + CHOOSERS - 1) / CHOOSERS) * 32;
    const int from = warp * part, to = min(from + part, count);
    u32 above = 0, equal = 0;
    for (int i = from + lane; i < to; i += 32) {
        u32 key = keys[i] >> bits;
        above += key > prefix;
        equal += key == prefix;
    }
    above = __reduce_add_sync(ALL_LANES, above);
    equal = __reduce_add_sync(ALL_LANES, equal);
    if (lane == 0) {
        shared.above[warp] = above;
        shared.equal[warp] = equal;
    }
    group_sync<BARRIER, CHOOSERS>();
    above = equal = 0;
    for (int i = 0; i < warp; ++i) {
        above += shared.above[i];
        equal += shared.equal[i];
    }
    const u32 earlier = (1u << lane) - 1;
    for (int i = from; i < to; i += 32) {
        u32 key = i + lane < to ? keys[i + lane] >> bits : 0;
        bool over = i + lane < to && key > prefix, same = i + lane < to && key == prefix;
        u32 overs = __ballot_sync(ALL_LANES, over), sames = __ballot_sync(ALL_LANES, same);
        u32 rank = equal + __popc(sames & earlier);
        if (over || (same && rank < need)) chosen[above + __popc(overs & earlier) + min(rank, need)] = first + i + lane;
        above += __popc(overs);
        equal += __popc(sames);
    }
}
