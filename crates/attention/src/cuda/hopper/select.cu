// Score and select in one kernel: nothing is written but the chosen blocks.
//
// Importance of a block (NSA, Eq. 8–10): softmax over the compressed keys, from the compressed
// branch's log-sum-exps, summed over the group's heads, pooled by how many strides a selection
// block shares with each compressed one. A block of BM = 192 rows is BM/GP queries × GP heads, so that
// the heads of one query lie in one warp's accumulators; a warp keeps the best blocks of its
// queries one a lane; what beats the worst of them waits until 32 can be merged at once.
//
// Constants: D, GP (group padded to a power of two, 1 to 64), BN (compressed keys a tile), L and R
// (l/d and l'/d; R divides BN). Grid: as many blocks as multiprocessors.
// Block: 512 threads. At most 32 blocks
// a query.
#include "products.cuh"
#include "sequences.cuh"

// With one head a query, what a warp keeps of its 16 queries takes the registers of a third warpgroup.
static constexpr int CONSUMERS = GP == 1 ? 2 : 3, BM = 64 * CONSUMERS;
static constexpr int DP = (D + 63) / 64 * 64;
static constexpr int STAGES = 2;
static constexpr int Q_BYTES = BM * DP * 2, K_BYTES = BN * DP * 2;
static constexpr int BLOCKS = BN / R;                          // selection blocks a tile
static constexpr int BEFORE = (L - 1 + 3) / 4 * 4;             // columns kept of the tile before
static constexpr int WARPS_A_QUERY = GP > 16 ? GP / 16 : 1;
static constexpr int QUERIES_A_WARP = GP < 16 ? 16 / GP : 1;
static constexpr int ROWS = 4 * CONSUMERS * QUERIES_A_WARP;  // rows of sums
static constexpr int WIDTH = BEFORE + BN;

struct Params {
    Batch batch;
    const float* lse;  // [T, H] of the compressed branch, natural log
    i32* indices;      // [T, K, S]
    int tile_count, heads, group;
    int block, stride;                        // l, d
    int select_block, count, initial, local;  // l', n
    float scale_log2;                         // softmax scale · log2(e)
};

static constexpr float HUGE = 1024.0f;

struct Shared {
    u8 q[Q_BYTES];
    u8 k[STAGES][K_BYTES];
    float sums[ROWS][WIDTH];
    u64 scratch[4 * CONSUMERS][64];
    u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES];
};

DEVICE int visible(const Params& a, int p) { return p + 1 < a.block ? 0 : (p + 1 - a.block) / a.stride + 1; }

// How many strides selection block j shares with compressed block R·j + offset.
DEVICE constexpr int shared_strides(int offset) {
    int a = R - (offset > 0 ? offset : 0), b = L + (offset < 0 ? offset : 0);
    int c = a < b ? a : b, d = R < L ? R : L;
    return c < d ? c : d;
}

// The best blocks of one query, one a lane, best first, and candidates that wait to be merged. A
// block and its score are one number: above, 0 for none, 1 for a NaN score, else the score's bits
// + 2, which rise with the score; below, the complement of the block, so that ties go to the lower.
struct Best {
    u64 best, waiting;
    u32 bar;  // what a candidate must beat
    int count;

    DEVICE void reset(int places) {
        best = waiting = 0;
        bar = places > 0 ? 0u : 0xffffffffu;
        count = 0;
    }
    DEVICE static u64 exchange(u64 x, int other, bool keep_larger) {
        u64 y = __shfl_xor_sync(ALL_LANES, x, other);
        return (x > y) == keep_larger ? x : y;
    }
    // Merges what waits; all 32 lanes hold a candidate or 0.
    DEVICE void merge(int places) {
        int lane = threadIdx.x & 31;
        // Bitonic sort, smallest first.
#pragma unroll
        for (int size = 2; size <= 32; size *= 2)
#pragma unroll
            for (int other = size / 2; other > 0; other /= 2)
                waiting = exchange(waiting, other, ((lane & other) != 0) == ((lane & size) == 0));
        // The larger of each pair are the 32 best of both, a bitonic sequence; sorted largest first.
        best = best > waiting ? best : waiting;
#pragma unroll
        for (int other = 16; other > 0; other /= 2) best = exchange(best, other, (lane & other) == 0);
        waiting = 0;
        count = 0;
        if (places > 0) bar = (u32)(__shfl_sync(ALL_LANES, best, places - 1) >> 32);
    }
    // `scratch` holds 64 numbers of this warp.
    DEVICE void offer(u32 key, int block, int places, u64* scratch) {
        int lane = threadIdx.x & 31;
        u32 better = __ballot_sync(ALL_LANES, key > bar);
        if (better == 0) return;
        if (key > bar) scratch[count + __popc(better & ((1u << lane) - 1))] = (u64)key << 32 | (u32)~block;
        __syncwarp();
        int total = count + __popc(better);
        if (lane >= count && lane < total) waiting = scratch[lane];
        if (total >= 32) {
            merge(places);
            count = total - 32;
            if (lane < count) waiting = scratch[32 + lane];
        } else {
            count = total;
        }
        __syncwarp();
    }
};

// Lanes 4 << STEP apart hold the same columns of other heads: each keeps one half of the COUNT columns
// and gives away the other, STEPS times. Returns the first column kept.
template <int COUNT, int STEP, int STEPS, int N>
DEVICE int share_sum(float (&x)[N]) {
    if constexpr (STEP == STEPS) {
        return 0;
    } else {
        constexpr int HALF = COUNT / 2;
        bool upper = threadIdx.x >> (2 + STEP) & 1;
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            float keep = upper ? x[HALF + i] : x[i], give = upper ? x[i] : x[HALF + i];
            x[i] = keep + __shfl_xor_sync(ALL_LANES, give, 4 << STEP);
        }
        return (upper ? HALF : 0) + share_sum<HALF, STEP + 1, STEPS>(x);
    }
}

// Adds the rows of each query's heads and writes the sums of this warp's queries (or its part of them).
DEVICE void sum_heads(Shared& s, const float (&p)[BN / 2], int warp) {
    constexpr int SETS = GP >= 16 ? 1 : 2, STEPS = GP >= 8 ? 3 : GP == 4 ? 2 : GP == 2 ? 1 : 0;
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        float x[BN / 4];
#pragma unroll
        for (int i = 0; i < BN / 4; i++) {
            int j = i / 2, c = i % 2;
            x[i] = GP >= 16 ? p[4 * j + c] + p[4 * j + 2 + c] : p[4 * j + 2 * set + c];
        }
        int base = share_sum<BN / 4, 0, STEPS>(x);
        int query = GP >= 16 ? 0 : (lane >> 2) / GP + 8 / GP * set;
        float* row = s.sums[warp * QUERIES_A_WARP + query] + BEFORE + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < BN / 4 >> STEPS; i += 2) *(float2*)(row + 8 * ((base + i) / 2)) = make_float2(x[i], x[i + 1]);
    }
}

// The importance of block j of the tile; `row` is the query's (first) row of sums.
DEVICE float pool(const Shared& s, int row, int j) {
    float score = 0.0f;
#pragma unroll
    for (int offset = 1 - L; offset < R; offset++) {
        float p = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS_A_QUERY; w++) p += s.sums[row + w][BEFORE + R * j + offset];
        score += (float)shared_strides(offset) * p;
    }
    return score;
}

// One piece of work: a tile of queries of one KV head.
struct Item {
    Tile tile;
    int kv_head, count;

    // Longest tiles first. Candidates lie below `current + 1 - local`; nothing is ranked where all is
    // selected.
    DEVICE Item(const Params& a, int i) {
        kv_head = i / a.tile_count;
        tile = find_tile<BM / GP>(a.batch, a.tile_count - 1 - i % a.tile_count);
        int last = tile.position + tile.rows - 1, current = last / a.select_block;
        int columns = min(visible(a, last), (current + 1 - a.local) * R);
        count = tile.rows == 0 || current < a.count ? 0 : (columns + BN - 1) / BN;
    }
};

// One item; `n` tiles have gone before.
DEVICE void rank_item(Shared& s, const Params& a, const Item& item, int round, int n) {
    const Tile& tile = item.tile;
    int kv_head = item.kv_head, count = item.count, kv_heads = a.heads / a.group;
    int warpgroup = uniform(threadIdx.x / 128) - 1, warp = (threadIdx.x - 128) / 32, lane = threadIdx.x % 32;
    bool owner = warp % WARPS_A_QUERY == 0;
    int first_query = warp * 16 / GP;  // of this warp, within the tile

    // log-sum-exps of the thread's two rows; rows that are no head of no query weigh nothing.
    float base[2];
    int seen[2];
    bool vast = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + 8 * r, query = row / GP, head = row % GP;
        bool real = query < tile.rows && head < a.group;
        i64 at = (i64)(tile.token + query) * a.heads + kv_head * a.group + head;
        base[r] = real ? a.lse[at] * 1.44269504088896341f : INF;
        // Where logits are so large that rounding hides what is near the top, all of that weighs 1.
        if (fabsf(base[r]) > HUGE && real) base[r] -= fabsf(base[r]) * 0x1p-21f, vast = true;
        seen[r] = real ? visible(a, tile.position + query) : 0;
    }
    Best best[QUERIES_A_WARP];
    int free = a.count - a.initial - a.local;
#pragma unroll
    for (int i = 0; i < QUERIES_A_WARP; i++) best[i].reset(free);
    for (int i = lane; i < BEFORE * QUERIES_A_WARP; i += 32)
        s.sums[warp * QUERIES_A_WARP + i / max(BEFORE, 1)][i % max(BEFORE, 1)] = 0.0f;
    int whole = visible(a, tile.position);  // columns that every row sees

    barrier_wait(&s.q_full, round & 1);
    u64 q = descriptor_rows(s.q + warpgroup * 64 * 128);
    float scores[BN / 2];

    // Probabilities of tile i from its products, summed over heads.
    auto weigh = [&](float (&p)[BN / 2], int i) {
        int column = i * BN + 2 * (lane & 3);
        bool trim = (i + 1) * BN > whole;
        if (vast) {
#pragma unroll
            for (int j = 0; j < BN / 2; j++) {
                float x = fmaf(p[j], a.scale_log2, -base[j / 2 % 2]);
                p[j] = exp2_approx(x > 0.0f ? 0.0f : x);
            }
        } else {
#pragma unroll
            for (int j = 0; j < BN / 2; j++) p[j] = exp2_approx(fmaf(p[j], a.scale_log2, -base[j / 2 % 2]));
        }
        if (trim) {
#pragma unroll
            for (int j = 0; j < BN / 2; j++)
                if (column + 8 * (j / 4) + j % 2 >= seen[j / 2 % 2]) p[j] = 0.0f;
        }
        sum_heads(s, p, warp);
    };
    // The blocks of tile i from those sums.
    auto rank = [&](int i) {
        if (WARPS_A_QUERY > 1) named_sync(1 + warpgroup, 128);
        else __syncwarp();
        if (owner) {
#pragma unroll
            for (int i_query = 0; i_query < QUERIES_A_WARP; i_query++) {
                int position = tile.position + first_query + i_query;
                int first = a.initial, last = position / a.select_block + 1 - a.local;
                for (int c = 0; c < BLOCKS; c += 32) {
                    int j = c + lane, block = i * BLOCKS + j;
                    u32 key = 0;
                    if (j < BLOCKS && block >= first && block < last) {
                        float score = pool(s, warp * QUERIES_A_WARP + i_query, j);
                        key = score == score ? __float_as_uint(score) + 2 : 1;
                    }
                    best[i_query].offer(key, block, free, s.scratch[warp]);
                }
            }
        }
        if (WARPS_A_QUERY > 1) named_sync(1 + warpgroup, 128);
        else __syncwarp();
        for (int k = lane; k < (L - 1) * QUERIES_A_WARP; k += 32) {
            float* row = s.sums[warp * QUERIES_A_WARP + k / max(L - 1, 1)];
            int at = k % max(L - 1, 1) + BEFORE - (L - 1);
            row[at] = row[at + BN];
        }
        __syncwarp();
    };
    for (int i = 0; i < count; i++) {
        int stage = (n + i) % STAGES;
        barrier_wait(&s.k_full[stage], (n + i) / STAGES & 1);
        multiply_rows<BN, DP, BM * 128, BN * 128>(scores, q, descriptor_rows(s.k[stage]));
        if (i > 0) rank(i - 1);  // while the products run
        wgmma_wait<0>();
        wgmma_hold(scores);
        if (lane == 0) {
            barrier_arrive(&s.k_empty[stage]);
            if (i + 1 == count) barrier_arrive(&s.q_empty);
        }
        weigh(scores, i);
    }
    if (count > 0) rank(count - 1);
    if (count == 0 && lane == 0) barrier_arrive(&s.q_empty);

    if (!owner) return;
#pragma unroll
    for (int i = 0; i < QUERIES_A_WARP; i++) {
        int query = first_query + i;
        if (query >= tile.rows) continue;
        i64 token = tile.token + query;
        i32* out = a.indices + (token * kv_heads + kv_head) * a.count;
        int current = (tile.position + query) / a.select_block;
        if (current < a.count) {  // everything is selected
            if (lane < a.count) out[lane] = lane <= current ? lane : -1;
            continue;
        }
        // Lanes below `free` hold the best; the forced blocks follow. Each writes to its rank.
        best[i].merge(free);
        int block = (int)~(u32)best[i].best, forced = lane - free;
        if (forced >= 0) block = forced < a.initial ? forced : current + 1 - a.local + (forced - a.initial);
        bool valid = lane < a.count;
        int rank = 0;
        for (int other = 0; other < a.count; other++) rank += __shfl_sync(ALL_LANES, block, other) < block;
        if (valid) out[rank] = block;
    }
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
    select(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    int items = a.tile_count * (a.heads / a.group);
    if (threadIdx.x == 0) {
        barrier_init(&s.q_full, 1);
        barrier_init(&s.q_empty, CONSUMERS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.k_empty[i], CONSUMERS * 4);
        }
        barrier_fence_init();
    }
    __syncthreads();
    int n = 0, round = 0;
    if (threadIdx.x < 128) {
        registers_shrink<32>();
        if (threadIdx.x != 0) return;
        for (int i = blockIdx.x; i < items; i += gridDim.x, round++) {
            Item item(a, i);
            barrier_wait(&s.q_empty, round & 1 ^ 1);
            barrier_expect(&s.q_full, Q_BYTES);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.q + c * BM * 128, &q, &s.q_full, c * PANEL, item.kv_head * a.group, item.tile.token);
            for (int j = 0; j < item.count; j++, n++) {
                int stage = n % STAGES;
                barrier_wait(&s.k_empty[stage], (n / STAGES & 1) ^ 1);
                barrier_expect(&s.k_full[stage], K_BYTES);
#pragma unroll
                for (int c = 0; c < DP / PANEL; c++)
                    tma_load(s.k[stage] + c * BN * 128, &k, &s.k_full[stage], c * PANEL, item.kv_head,
                             item.tile.block + j * BN);
            }
        }
    } else {
        registers_grow<GP == 1 ? 224 : 152>();
        for (int i = blockIdx.x; i < items; i += gridDim.x, round++) {
            Item item(a, i);
            item.count = uniform(item.count);
            rank_item(s, a, item, round, n);
            n += item.count;
        }
    }
}
