// Which blocks a query reads (Eq. 8–11), written as indices and nothing else.
//
// The compressed branch has left each head's log-sum-exp, so a second pass over q·k_cmp gives
// probabilities; they are summed over the heads of the group in shared memory, a tile of keys at a
// time, and one thread a query slides over the sums in ascending order: compressed block i owns
// the chunks i … i + l/d − 1, selection block j the chunks r·j … r·j + r − 1 (r = l'/d), and i
// counts for j as often as they share one (1, 2, 2, 2, 1 in the default spec). Finished blocks
// are offered to a heap of the best `free` so far, whose root is the worst: lowest score, and of
// equals the highest index.
//
// Constants: ROWS, KEYS, DIM_K, VECTOR.
#include "tile.cuh"

static constexpr int M = ROWS / SIDE, N = KEYS / SIDE;

struct Spec {
    int block, stride, select, count, initial, local;  // l, d, l', n
};

struct Heap {
    float* score;
    int* id;
    int size, room;

    DEVICE bool worse(int a, int b) const {
        return score[a] < score[b] || (score[a] == score[b] && id[a] > id[b]);
    }
    DEVICE void swap(int a, int b) {
        float s = score[a];
        int i = id[a];
        score[a] = score[b], id[a] = id[b];
        score[b] = s, id[b] = i;
    }
    // Blocks come in ascending order, so one that only equals the root is worse than it.
    DEVICE void offer(int block, float value) {
        if (room == 0) return;
        if (value != value) value = -INF;  // NaN ranks last
        if (size < room) {
            int at = size++;
            score[at] = value, id[at] = block;
            while (at > 0 && worse(at, (at - 1) / 2)) {
                swap(at, (at - 1) / 2);
                at = (at - 1) / 2;
            }
        } else if (value > score[0]) {
            score[0] = value, id[0] = block;
            int at = 0;
            while (true) {
                int child = 2 * at + 1;
                if (child >= size) break;
                if (child + 1 < size && worse(child + 1, child)) child++;
                if (!worse(child, at)) break;
                swap(child, at);
                at = child;
            }
        }
    }
    // Ids ascending; the scores are lost. Heapsort: lists may hold thousands.
    DEVICE void sort() {
        for (int start = size / 2 - 1; start >= 0; start--) sift(start, size);
        for (int end = size - 1; end > 0; end--) {
            int largest = id[0];
            id[0] = id[end], id[end] = largest;
            sift(0, end);
        }
    }
    DEVICE void sift(int at, int end) {
        while (true) {
            int child = 2 * at + 1;
            if (child >= end) return;
            if (child + 1 < end && id[child + 1] > id[child]) child++;
            if (id[child] <= id[at]) return;
            int x = id[at];
            id[at] = id[child], id[child] = x;
            at = child;
        }
    }
};

// `indices` [T, K, n]. `spill` [T, K, free] takes the scores of heaps too large for shared memory.
KERNEL __launch_bounds__(THREADS, 1)
    select_blocks(const Real* q, const Real* k, const float* lse, int* indices, float* spill,
                  const Sequence* sequences, int count, int heads, int kv_heads, int dim_k, int dim_v,
                  float scale, int compress_block,
                  int compress_stride, int select_block, int select_count, int initial, int local_count) {
    Spec spec = {compress_block, compress_stride, select_block, select_count, initial, local_count};
    extern __shared__ float shared[];
    int group = heads / kv_heads, packed = min(group, ROWS), queries = ROWS / packed;
    int parts = (group + ROWS - 1) / ROWS;
    int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
    i64 id = (i64)gridDim.x - 1 - blockIdx.x;
    int kv_head = (int)(id % kv_heads);
    Item item = find_item(count, id / kv_heads, queries, [&](int b) { return (i64)sequences[b].query; });
    Sequence s = sequences[item.sequence];
    if (item.index * queries >= s.queries) return;
    int first = (int)(item.index * queries), last = min(first + queries, s.queries) - 1;

    float* q_tile = shared;
    float* k_tile = q_tile + ROWS * Width<DIM_K>::row;
    float* p = k_tile + KEYS * Width<DIM_K>::row;  // [ROWS, KEYS + 4]
    float* sums = p + ROWS * (KEYS + 4);           // [queries, KEYS + 1]
    float* heaps = sums + ROWS * (KEYS + 1);

    // The thread's own query.
    int free_count = spec.count - spec.initial - spec.local;
    int r = spec.select / spec.stride, overlap = spec.block / spec.stride;
    bool mine = threadIdx.x < queries && first + (int)threadIdx.x <= last;
    int position = s.position + first + (int)threadIdx.x, current = position / spec.select;
    int* list = mine ? indices + ((i64)(s.query + first + threadIdx.x) * kv_heads + kv_head) * spec.count : nullptr;
    bool ranked = mine && current >= spec.count;
    int local = current + 1 - spec.local;  // the first of the forced last blocks
    Heap heap = {nullptr, nullptr, 0, ranked ? free_count : 0};
    if (ranked) {
        if (spill) {
            heap.score = spill + ((i64)(s.query + first + threadIdx.x) * kv_heads + kv_head) * free_count;
            heap.id = list + spec.initial;
        } else {
            heap.score = heaps + threadIdx.x * 2 * free_count;
            heap.id = (int*)heap.score + free_count;
        }
    }
    Mask mask = {COMPRESSED, 0, spec.block, spec.stride};
    // Compressed blocks that count for a candidate.
    auto limit = [&](int position) -> int {
        i64 end = (i64)r * (position / spec.select + 1 - spec.local);
        return (int)min((i64)visible(mask, position, s.blocks).to, end);
    };
    int start = max(0, (int)min((i64)r * spec.initial - (overlap - 1), (i64)MAX_INT));
    int end = free_count > 0 && (s.position + last) / spec.select >= spec.count ? limit(s.position + last) : 0;
    int stop = ranked && free_count > 0 ? limit(position) : 0;

    // The sum of the block that is being passed, and of the one after, which an overlap reaches.
    int block = start / r, offset = start % r;
    float now = 0.0f, next = 0.0f;
    for (int from = start; from < end; from += KEYS) {
        load_rows<DIM_K, KEYS>(k_tile, k, dim_k, [&](int n) -> i64 {
            return from + n < s.blocks ? (i64)(s.block + from + n) * kv_heads + kv_head : -1;
        });
        for (int part = 0; part < parts; part++) {
            auto row_of = [&](int n) -> i64 {
                int query = first + n / packed, head = part * ROWS + n % packed;
                if (n >= queries * packed || query > last || head >= group) return -1;
                return (i64)(s.query + query) * heads + kv_head * group + head;
            };
            if (from == start || parts > 1) load_rows<DIM_K, ROWS>(q_tile, q, dim_k, row_of);
            __syncthreads();
            float scores[M][N];
            multiply<DIM_K>(q_tile, k_tile, scores);
#pragma unroll
            for (int i = 0; i < M; i++) {
                int n = ty + SIDE * i;
                i64 row = row_of(n);
                float total = row < 0 ? -INF : lse[row];
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float x = total == -INF ? 0.0f : expf(fmaf(scale, scores[i][j], -total));
                    p[n * (KEYS + 4) + tx + SIDE * j] = x;
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < queries * KEYS; i += THREADS) {
                int query = i / KEYS, key = i % KEYS;
                float sum = part == 0 ? 0.0f : sums[query * (KEYS + 1) + key];
                for (int h = 0; h < packed; h++) sum += p[(query * packed + h) * (KEYS + 4) + key];
                sums[query * (KEYS + 1) + key] = sum;
            }
            __syncthreads();
        }
        for (int i = from; i < min(from + KEYS, stop); i++) {
            float x = sums[threadIdx.x * (KEYS + 1) + i - from];
            now += (float)min(r - offset, overlap) * x;
            int ahead = offset - r;  // where i stands before the next block
            if (ahead > -overlap) next += (float)(overlap + ahead) * x;
            if (++offset == r) {
                if (block >= spec.initial && block < local) heap.offer(block, now);
                block++, offset = 0, now = next, next = 0.0f;
            }
        }
        __syncthreads();
    }
    if (!mine) return;
    if (!ranked) {
        for (int i = 0; i < spec.count; i++) list[i] = i <= current ? i : -1;
        return;
    }
    if (free_count > 0) {
        // Blocks that no visible compressed block reaches score what has come in so far.
        for (; block < local; block++) {
            if (block >= spec.initial) heap.offer(block, now);
            now = next, next = 0.0f;
        }
    }
    heap.sort();
    for (int i = 0; i < spec.initial; i++) list[i] = i;
    if (heap.id != list + spec.initial)
        for (int i = 0; i < free_count; i++) list[spec.initial + i] = heap.id[i];
    for (int i = 0; i < spec.local; i++) list[spec.initial + free_count + i] = local + i;
}
