// Turns "query → its selected blocks" round: for each KV head and block, the queries that chose it,
// ascending. What dK and dV gather by.
//
// A stable counting sort with no order left to chance: tokens are cut into pieces; `inverse_count`
// counts each piece's choices per block, `inverse_pieces` sums over pieces, `inverse_blocks` over
// blocks, and in `inverse_fill` one warp walks a piece's queries in order, so that a query's place
// in its blocks' lists depends on nothing but the indices.
//
// Which entries of a query's list count: those inside 0..=its own block that stand for the first time. On a
// proper list (ascending, −1 padded) that is each block.
//
// Blocks of all sequences are numbered together: sequence b's begin at ⌊key/l'⌋ + b; some numbers
// belong to nobody.
#include "selected.cuh"

struct Sequences {
    const Sequence* at;
    int count;
    int block_tokens;  // l'
    DEVICE int first_block(int b) const { return at[b].key / block_tokens + b; }
};

// The last i of [0, count) with start(i) <= x; start ascends and start(0) <= x.
template <class Start>
DEVICE int find(int count, int x, Start start) {
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (start(middle) <= x) low = middle;
        else high = middle - 1;
    }
    return low;
}

// Whether the lane's entry, list[index], counts; `last` is the greatest block of the list so far.
DEVICE bool counts(int block, int current, int& last, const i32* list, int index) {
    int lane = threadIdx.x & 31;
    int candidate = block >= 0 && block <= current ? block : -1, top = candidate;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        int below = __shfl_up_sync(ALL_LANES, top, offset);
        if (lane >= offset) top = max(top, below);
    }
    int before = __shfl_up_sync(ALL_LANES, top, 1);
    before = lane == 0 ? last : max(before, last);
    last = max(last, __shfl_sync(ALL_LANES, top, 31));
    // Only a list that does not ascend has a block that is not greater than all before.
    bool first = candidate > before;
    if (candidate >= 0 && !first) {
        first = true;
        for (int i = 0; i < index; i++) first &= list[i] != block;
    }
    return first;
}

// Grid: pieces × K. Block: whole warps. pieces[piece][K][J] = how often each block is chosen.
KERNEL inverse_count(Sequences sequences, const i32* indices, int tokens, int kv_heads, int listed, int blocks,
                     int piece_tokens, u32* pieces) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, kv_head = blockIdx.y;
    u32* counter = pieces + ((i64)blockIdx.x * kv_heads + kv_head) * blocks;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) counter[i] = 0;
    __syncthreads();
    int begin = min((i64)blockIdx.x * piece_tokens, (i64)tokens), end = min((i64)begin + piece_tokens, (i64)tokens);
    for (int t = begin + warp; t < end; t += warps) {
        int b = find(sequences.count, t, [&](int i) { return sequences.at[i].query; });
        Sequence s = sequences.at[b];
        int current = (s.position + t - s.query) / sequences.block_tokens, last = -1;
        u32* own = counter + sequences.first_block(b);
        const i32* list = indices + ((i64)t * kv_heads + kv_head) * listed;
        for (int e = 0; e < listed; e += 32) {
            int block = e + lane < listed ? list[e + lane] : -1;
            if (counts(block, current, last, list, e + lane)) atomicAdd(own + block, 1u);
        }
    }
}

// One thread a (KV head, block): a piece's count becomes the count of all pieces before it.
KERNEL inverse_pieces(u32* pieces, u32* totals, int piece_count, int bins) {
    int bin = blockIdx.x * blockDim.x + threadIdx.x;
    if (bin >= bins) return;
    u32 sum = 0;
    for (int p = 0; p < piece_count; p += 16) {
        u32 here[16];
#pragma unroll
        for (int i = 0; i < 16; i++) here[i] = p + i < piece_count ? pieces[(i64)(p + i) * bins + bin] : 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (p + i < piece_count) pieces[(i64)(p + i) * bins + bin] = sum;
            sum += here[i];
        }
    }
    totals[bin] = sum;
}

// Inclusive sums over a block of 1024 threads.
DEVICE i64 block_scan(i64 x, i64* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    auto scan = [&](i64 y) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            i64 below = __shfl_up_sync(ALL_LANES, y, offset);
            if (lane >= offset) y += below;
        }
        return y;
    };
    x = scan(x);
    __syncthreads();
    if (lane == 31) scratch[warp] = x;
    __syncthreads();
    if (warp == 0) scratch[lane] = scan(scratch[lane]);
    __syncthreads();
    return x + (warp > 0 ? scratch[warp - 1] : 0);
}

// One CTA of 1024 threads. `starts` [K·J + 1] says where each block's list starts. Lists longer than
// `chunk` are cut into items of `chunk`, each with a slot for partial sums. `items` holds `capacity`; those of
// KV head i are numbers heads[i] to heads[i + 1].
KERNEL __launch_bounds__(1024, 1)
    inverse_blocks(Sequences sequences, const u32* totals, i64* starts, Item* items, i32* heads, int capacity,
                   int chunk, int kv_heads, int blocks) {
    __shared__ i64 scratch[32];
    __shared__ i64 carry[2];
    int thread = threadIdx.x, bins = kv_heads * blocks;
    if (thread < 2) carry[thread] = 0;
    for (int base = 0; base < bins; base += 1024) {
        int bin = base + thread;
        Item item;
        int count = 0, runs = 0;
        if (bin < bins) {
            count = totals[bin];
            int number = bin % blocks;
            int b = find(sequences.count, number, [&](int i) { return sequences.first_block(i); });
            Sequence s = sequences.at[b];
            item.position = (number - sequences.first_block(b)) * sequences.block_tokens;
            item.key = s.key + item.position;
            item.keys = min(sequences.block_tokens, s.keys - item.position);
            item.kv_head = bin / blocks;
            item.origin = s.query - s.position;
            item.spare = 0;
            runs = item.keys > 0 ? max(1, (count + chunk - 1) / chunk) : 0;
        }
        item.slots = runs;
        int slots = runs > 1 ? runs : 0;
        // Two sums in one: there are fewer than 2³¹ of either.
        i64 both = (i64)slots << 32 | runs;
        i64 after = block_scan(count, scratch), both_after = block_scan(both, scratch);
        __syncthreads();
        after += carry[0], both_after += carry[1];
        __syncthreads();
        if (thread == 1023) carry[0] = after, carry[1] = both_after;
        if (bin >= bins) continue;
        i64 first = after - count;
        starts[bin] = first;
        int place = (int)(both_after & 0x7fffffff) - runs, slot = (int)(both_after >> 32) - slots;
        if (bin % blocks == 0) heads[bin / blocks] = place;
        for (int r = 0; r < runs && place + r < capacity; r++) {
            item.run = r;
            item.first = first + (i64)r * chunk;
            item.count = min(chunk, count - r * chunk);
            item.slot = runs > 1 ? slot + r : -1;
            items[place + r] = item;
        }
    }
    __syncthreads();
    if (thread == 0) starts[bins] = carry[0], heads[kv_heads] = (int)(carry[1] & 0x7fffffff);
}

// Grid: pieces × K. Block: one warp. Shared: J counters, or none, and they stay in `pieces`. `queries`
// are rows of q. `places` [T, K, S], if not null, says where each entry went, counted from its KV head's first
// list; those that do not count went to −1.
KERNEL inverse_fill(Sequences sequences, const i32* indices, int tokens, int kv_heads, int listed, int blocks,
                    int piece_tokens, u32* pieces, const i64* starts, i32* queries, u32* places, int in_shared) {
    extern __shared__ u32 shared_counter[];
    int lane = threadIdx.x, kv_head = blockIdx.y;
    i64 begin = min((i64)blockIdx.x * piece_tokens, (i64)tokens), end = min(begin + piece_tokens, (i64)tokens);
    if (begin >= end) return;
    u32* row = pieces + ((i64)blockIdx.x * kv_heads + kv_head) * blocks;
    u32* counter = in_shared ? shared_counter : row;
    // Places count from the KV head's first list.
    const i64* start = starts + (i64)kv_head * blocks;
    i64 own = start[0];
    for (int i = lane; i < blocks; i += 32) counter[i] = row[i] + (u32)(start[i] - own);
    queries += own;
    __syncwarp();
    int b = find(sequences.count, (int)begin, [&](int i) { return sequences.at[i].query; });
    Sequence s = sequences.at[b];
    int base = sequences.first_block(b);
    i64 step = (i64)kv_heads * listed;
    const i32* list = indices + begin * step + (i64)kv_head * listed;
    u32* own_places = places + begin * step + (i64)kv_head * listed;
    // The first 32 entries of the next queries are on their way while this one is placed.
    static constexpr int AHEAD = 8;
    i32 coming[AHEAD];
    auto fetch = [&](i64 t) { return t < end && lane < listed ? list[(t - begin) * step + lane] : -1; };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) coming[i] = fetch(begin + i);
    for (i64 group = begin; group < end; group += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            i64 t = group + i;
            if (t >= end) break;
            while (t >= s.query + s.queries) s = sequences.at[++b], base = sequences.first_block(b);
            int current = (s.position + (int)(t - s.query)) / sequences.block_tokens, last = -1, block = coming[i];
            coming[i] = fetch(t + AHEAD);
            const i32* own_list = list + (t - begin) * step;
            for (int e = 0;;) {
                u32 place = 0xffffffffu;
                if (counts(block, current, last, own_list, e + lane)) {
                    place = counter[base + block];
                    counter[base + block] = place + 1;
                    queries[place] = (i32)t;
                }
                if (places != nullptr && e + lane < listed) own_places[(t - begin) * step + e + lane] = place;
                __syncwarp();
                e += 32;
                if (e >= listed) break;
                block = e + lane < listed ? own_list[e + lane] : -1;
            }
        }
    }
}
