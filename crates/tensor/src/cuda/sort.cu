// Stable sort of small keys, eight bits a pass from the lowest: count, scan, scatter. Tiles of
// TILE keys belong to one block of eight warps, each with an eighth of the tile.
#include "types.cuh"

static constexpr int WARPS = 8, DIGITS = 256, TILE = 2048, PER_WARP = TILE / WARPS;

// Keys outside 0..limit become `limit`, which sorts last.
DEVICE int key_at(const i32* keys, i64 i, i32 limit) {
    i32 key = keys[i];
    return key < 0 || key > limit ? limit : key;
}

// counts[digit, tile] = how often the digit occurs in the tile.
KERNEL sort_count(const i32* keys, i32* counts, i64 n, i32 limit, int shift) {
    __shared__ int found[DIGITS];
    found[threadIdx.x] = 0;
    __syncthreads();
    i64 first = (i64)blockIdx.x * TILE;
    for (i64 i = first + threadIdx.x; i < n && i < first + TILE; i += DIGITS)
        atomicAdd(&found[key_at(keys, i, limit) >> shift & 255], 1);
    __syncthreads();
    counts[(i64)threadIdx.x * gridDim.x + blockIdx.x] = found[threadIdx.x];
}

// The sum over lanes up to and with this one.
DEVICE int inclusive(int x) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int other = __shfl_up_sync(ALL_LANES, x, offset);
        if (lane >= offset) x += other;
    }
    return x;
}

// counts[i] = counts[0] + … + counts[i − 1], in one block of 1024 threads; a warp has a stretch.
KERNEL sort_scan(i32* counts, i64 n) {
    __shared__ int sums[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    i64 per = (n + 1023) / 1024 * 32, first = warp * per;
    i64 last = first + per < n ? first + per : n;
    int total = 0;
#pragma unroll 8
    for (i64 i = first + lane; i < last; i += 32) total += counts[i];
    total = inclusive(total);
    if (lane == 31) sums[warp] = total;
    __syncthreads();
    int start = 0;
    for (int w = 0; w < warp; ++w) start += sums[w];
#pragma unroll 8
    for (i64 base = first; base < last; base += 32) {
        i64 i = base + lane;
        int here = i < last ? counts[i] : 0, before = inclusive(here);
        if (i < last) counts[i] = start + before - here;
        start += __shfl_sync(ALL_LANES, before, 31);
    }
}

// Moves keys and their places (null: the place itself) to where `starts`, the scanned counts,
// puts them; equal digits keep their order. `inverse` (or null) takes the new place of each old
// one.
KERNEL sort_scatter(const i32* keys, const i32* places, const i32* starts, i32* keys_out,
                    i32* places_out, i32* inverse, i64 n, i32 limit, int shift) {
    __shared__ int next[WARPS][DIGITS];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int w = 0; w < WARPS; ++w) next[w][threadIdx.x] = 0;
    __syncthreads();
    i64 first = (i64)blockIdx.x * TILE + warp * PER_WARP;
    for (i64 i = first + lane; i < n && i < first + PER_WARP; i += 32)
        atomicAdd(&next[warp][key_at(keys, i, limit) >> shift & 255], 1);
    __syncthreads();
    int start = starts[(i64)threadIdx.x * gridDim.x + blockIdx.x];
    for (int w = 0; w < WARPS; ++w) {
        int here = next[w][threadIdx.x];
        next[w][threadIdx.x] = start;
        start += here;
    }
    __syncthreads();
    for (i64 base = first; base < n && base < first + PER_WARP; base += 32) {
        i64 i = base + lane;
        bool live = i < n;
        int key = live ? key_at(keys, i, limit) : 0;
        // Lanes without a key must not match a digit.
        u32 same = __match_any_sync(ALL_LANES, live ? key >> shift & 255 : DIGITS + lane);
        int rank = __popc(same & ((1u << lane) - 1));
        int* slot = &next[warp][key >> shift & 255];
        int to = live ? *slot + rank : 0;
        __syncwarp();
        if (live && rank == 0) *slot += __popc(same);
        __syncwarp();
        if (live) {
            i32 place = places ? places[i] : (i32)i;
            keys_out[to] = key;
            places_out[to] = place;
            if (inverse) inverse[place] = to;
        }
    }
}

// starts[v] = the first place whose key is at least v, for v in 0..=count.
KERNEL sort_starts(const i32* keys, i32* starts, i64 n, i64 count) {
    i64 v = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (v > count) return;
    i64 low = 0, high = n;
    while (low < high) {
        i64 middle = (low + high) / 2;
        if (keys[middle] < v) low = middle + 1; else high = middle;
    }
    starts[v] = (i32)low;
}
