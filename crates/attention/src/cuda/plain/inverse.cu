// The inverse index: for each KV head and block the queries that chose it, ascending; what dK and
// dV of the selected branch gather by. Integers only, each written to its one place, so the order
// is the same on every run.
//
// Tokens are cut into chunks. `count` makes one histogram a chunk, `offsets` turns them into
// running sums over chunks, `scan` the totals into starts, `fill` writes the lists, a warp a chunk.
// Blocks of all sequences are numbered together: sequence b's begin at ⌊key/l'⌋ + b.
#include "tile.cuh"

DEVICE i64 first_block(const Sequence& s, int b, int block) { return s.key / block + b; }

// `counts` [chunks, K, J], zero before.
KERNEL count(const int* indices, int* counts, const Sequence* sequences, int sequence_count, int tokens, int chunk,
             int kv_heads, int length, int block, int blocks, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    int kv_head = blockIdx.x % kv_heads, number = blockIdx.x / kv_heads, lane = threadIdx.x & 31;
    i64 end = min((i64)(number + 1) * chunk, (i64)tokens);
    int* row = counts + ((i64)number * kv_heads + kv_head) * blocks;
    for (i64 token = (i64)number * chunk + threadIdx.x / 32; token < end; token += blockDim.x / 32) {
        int b = find_sequence(sequences, sequence_count, (int)token);
        Sequence s = sequences[b];
        int current = (s.position + (int)token - s.query) / block;
        const int* list = indices + (token * kv_heads + kv_head) * length;
        bool ascending = is_ascending(list, length);
        for (int i = lane; i < length; i += 32)
            if (counts_once(list, i, current, ascending)) atomicAdd(row + first_block(s, b, block) + list[i], 1);
    }
}

// `totals` [K, J].
KERNEL offsets(int* counts, i64* totals, int chunks, int entries, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    int entry = blockIdx.x * blockDim.x + threadIdx.x;
    if (entry >= entries) return;
    int sum = 0;
    for (int chunk = 0; chunk < chunks; chunk++) {
        int* place = counts + (i64)chunk * entries + entry;
        int n = *place;
        *place = sum;
        sum += n;
    }
    totals[entry] = sum;
}

// `starts` [entries + 1]: totals before, exclusive sums after. One block of 1024 threads.
KERNEL scan(i64* starts, int entries, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    extern __shared__ i64 partial[];
    int each = (entries + 1023) / 1024, first = min((int)threadIdx.x * each, entries), end = min(first + each, entries);
    i64 sum = 0;
    for (int i = first; i < end; i++) sum += starts[i];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int step = 1; step < 1024; step *= 2) {
        i64 before = (int)threadIdx.x >= step ? partial[threadIdx.x - step] : 0;
        __syncthreads();
        partial[threadIdx.x] += before;
        __syncthreads();
    }
    i64 at = partial[threadIdx.x] - sum;
    for (int i = first; i < end; i++) {
        i64 n = starts[i];
        starts[i] = at;
        at += n;
    }
    if (threadIdx.x == 1023) starts[entries] = partial[1023];
}

// `queries` holds each list's queries, counted from the first of their sequence.
KERNEL fill(const int* indices, int* counts, const i64* starts, int* queries, const Sequence* sequences,
            int sequence_count, int tokens, int chunk, int kv_heads, int length, int block, int blocks,
          const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    int kv_head = blockIdx.x % kv_heads, number = blockIdx.x / kv_heads, lane = threadIdx.x;
    i64 begin = (i64)number * chunk, end = min(begin + chunk, (i64)tokens);
    int* row = counts + ((i64)number * kv_heads + kv_head) * blocks;
    const i64* start = starts + (i64)kv_head * blocks;
    for (i64 token = begin; token < end; token++) {
        int b = find_sequence(sequences, sequence_count, (int)token);
        Sequence s = sequences[b];
        int query = (int)token - s.query, current = (s.position + query) / block;
        const int* list = indices + (token * kv_heads + kv_head) * length;
        bool ascending = is_ascending(list, length);
        for (int i = lane; i < length; i += 32) {
            if (!counts_once(list, i, current, ascending)) continue;
            i64 id = first_block(s, b, block) + list[i];
            queries[start[id] + row[id]] = query;
            row[id]++;
        }
        __syncwarp();
    }
}
