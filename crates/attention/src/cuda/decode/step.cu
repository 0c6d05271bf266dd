// One decode step of one layer for 16-bit numbers: a cluster of blocks for each (row, KV head).
//
// The cluster's blocks split the keys. In a block one warp asks the copy engine for tiles, four
// warps (the workers) attend to them, and the rest (the choosers) rank blocks: they keep the logits
// of the block's compressed keys, exchange maxima and sums with the other blocks, turn logits into
// importance and send it to all of them, so that every block makes the same choice. Meanwhile the
// workers attend to the window and to the blocks that are selected whatever their score. Last come
// the chosen blocks; then each block gets its share of heads from all others, merges them in their
// order, and applies the gates. Blocks only ever send, so nobody waits for a round trip.
//
// With DENSE there is one branch, causal or (WINDOW > 0) a window, and nothing is ranked.
#include "cluster.cuh"
#include "decode.cuh"
#include "mma.cuh"

// Constants: REAL_BF16 or REAL_F16; GROUP, D, V; SPLITS (blocks that share the keys, a power of
// two), SLOTS (tiles of keys or values in flight), TILE (tokens in one, 32 or 64), CHOOSERS
// (threads), RESIDENT (blocks on a multiprocessor); of the spec COMPRESS_BLOCK, COMPRESS_STRIDE,
// SELECT_BLOCK (a multiple of TILE), SELECT_COUNT, SELECT_INITIAL, SELECT_LOCAL, WINDOW;
// LOGITS_GLOBAL, IMPORTANCE_GLOBAL: they do not fit in shared memory.
constexpr int HEADS = 16, WORKERS = 128, PRODUCERS = 32;
#ifdef DENSE
#undef CHOOSERS
#define CHOOSERS 0
constexpr int BRANCHES = 1;
#else
#include "select.cuh"
constexpr int BRANCHES = 3;
static_assert(SELECT_BLOCK % TILE == 0, "selection blocks are whole tiles");
#ifdef IMPORTANCE_GLOBAL
constexpr bool GLOBAL = true;
#else
constexpr bool GLOBAL = false;
#endif
#endif
constexpr int THREADS = WORKERS + PRODUCERS + CHOOSERS;
constexpr int HEAD_TILES = (GROUP + HEADS - 1) / HEADS, CLUSTER = SPLITS * HEAD_TILES;
constexpr int OWN = HEADS / SPLITS;  // heads that a block writes in the end
constexpr int K_PANELS = (D + 63) / 64, V_PANELS = (V + 63) / 64, PANEL = TILE * 128;
constexpr int SLOT = PANEL * (K_PANELS > V_PANELS ? K_PANELS : V_PANELS);
constexpr int STEPS = D / 16;     // products of one QK tile
constexpr int PARTS = TILE / 32;  // 8-wide tiles of a worker warp's keys
constexpr int COLUMNS = V / 32;   // 8-wide tiles of a worker warp's quarter of the output
static_assert(SLOTS >= 3 && (TILE == 32 || TILE == 64) && D % 32 == 0 && V % 32 == 0 && HEADS % SPLITS == 0, "tiles");

// Where chunk c (16 bytes) of a row of a swizzled tile lies.
DEVICE u32 chunk_at(int row, int chunk) { return chunk / 8 * PANEL + row * 128 + ((chunk ^ row) & 7) * 16; }
// The same for probabilities [16, TILE], which no copy engine touches.
DEVICE u32 weight_at(int row, int chunk) {
    return TILE == 64 ? row * 128 + ((chunk ^ row) & 7) * 16 : row * 64 + ((chunk ^ row >> 1) & 3) * 16;
}

struct Softmax {
    float max[2], sum[2];
};

struct alignas(16) Shared {
    u16 weights[HEADS * TILE];
    u64 full[SLOTS], empty[SLOTS];
    int2 edges[SLOTS];  // first and last + 1 token of the tile that count
    float max[4][HEADS], sum[4][HEADS];
    float2 totals[BRANCHES][HEADS];  // of this block: maximum and sum
    // From all splits, this one's heads.
    u64 merged;
    float2 parts[SPLITS][BRANCHES][OWN];
    float factors[SPLITS][BRANCHES][OWN];
#ifndef DENSE
    u64 summed, scored;
    float2 peers[SPLITS][HEADS];  // the compressed branch's totals
    float most[HEADS], inverse[HEADS];
    i32 chosen[SELECT_COUNT];
    Choice choice;
#endif
};

// A tile of the stream.
struct Spot {
    int which, page, token, low, high;
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    decode_step(const __grid_constant__ TensorMap cmp_k, const __grid_constant__ TensorMap cmp_v,
                const __grid_constant__ TensorMap slc_k, const __grid_constant__ TensorMap slc_v,
                const __grid_constant__ TensorMap win_k, const __grid_constant__ TensorMap win_v,
                const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) u8 dynamic[];
    __shared__ Shared shared;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int rank = cluster_rank(), split = rank % SPLITS, head_tile = rank / SPLITS;
    const int pair = blockIdx.x / CLUSTER, row = pair / p.kv_heads, head = pair % p.kv_heads;
    const int heads = min(HEADS, GROUP - head_tile * HEADS);
    const i64 first_head = ((i64)row * p.kv_heads + head) * GROUP + head_tile * HEADS;
    const int position = p.positions[row], sequence = p.sequences ? p.sequences[row] : row;
    if (position < 0) {
        for (int i = split * THREADS + thread; i < heads * V; i += SPLITS * THREADS) p.out[first_head * V + i] = narrow<Real>(0.0f);
#ifndef DENSE
        if (rank == 0 && p.indices)
            for (int i = thread; i < SELECT_COUNT; i += THREADS) p.indices[(i64)pair * SELECT_COUNT + i] = -1;
#endif
        return;
    }

    // Shared memory: slots; [SPLITS, BRANCHES, OWN, V] from the others; importance; keys; logits.
    const u32 slots = shared_address(dynamic);
    float* inbox = (float*)(dynamic + SLOTS * SLOT);
#ifdef DENSE
    const int oldest = WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0;
    const int first = oldest / TILE, tiles = position / TILE + 1 - first, share = (tiles + SPLITS - 1) / SPLITS;
    const int mine = first + min(split * share, tiles), count = min(first + tiles, mine + share) - mine;
#else
    const int all = p.slice * SPLITS, row_of_logits = p.slice + 8;
#ifdef IMPORTANCE_GLOBAL
    u32* keys = (u32*)(inbox + (SPLITS > 1 ? HEADS * BRANCHES * V : 0));
    float* importance = p.scratch + (i64)gridDim.x * HEADS * row_of_logits + (i64)pair * HEAD_TILES * all;
#else
    float* importance = inbox + (SPLITS > 1 ? HEADS * BRANCHES * V : 0);
    u32* keys = (u32*)(importance + HEAD_TILES * all);
#endif
#ifdef LOGITS_GLOBAL
    float* logits = p.scratch + (i64)blockIdx.x * HEADS * row_of_logits;
#else
    float* logits = (float*)(keys + (p.blocks + 3 & ~3));
#endif
    const int visible = visible_compressed(position), current = position / SELECT_BLOCK;
    const bool ranked = !all_selected(position);
    const int local = current + 1 - SELECT_LOCAL;
    // Compressed tiles are cut in runs; window tiles and selected tiles are dealt to the splits
    // from opposite ends.
    auto dealt = [&](int count, int to) { return count > to ? (count - to - 1) / SPLITS + 1 : 0; };
    const int tiles = (visible + TILE - 1) / TILE, share = (tiles + SPLITS - 1) / SPLITS;
    const int cmp_first = min(split * share, tiles), cmp_count = min(cmp_first + share, tiles) - cmp_first;
    const int oldest = max(position - WINDOW + 1, 0), win_first = oldest / TILE;
    const int win_count = dealt(position / TILE + 1 - win_first, SPLITS - 1 - split);
    constexpr int TILES = SELECT_BLOCK / TILE;  // of a selection block
    const int sure = ranked ? SELECT_INITIAL + SELECT_LOCAL : current + 1;
    const int sure_count = dealt(sure * TILES, split);
    const int rest_start = (split + SPLITS - sure * TILES % SPLITS) % SPLITS;
    const int rest_count = ranked ? dealt((SELECT_COUNT - sure) * TILES, rest_start) : 0;
#endif

    if (thread == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(&shared.full[i], 1);
            barrier_init(&shared.empty[i], WORKERS / 32);
        }
        barrier_init(&shared.merged, 1);
        barrier_expect(&shared.merged, SPLITS * BRANCHES * OWN * (V * 4 + 8));
#ifndef DENSE
        barrier_init(&shared.summed, 1);
        barrier_expect(&shared.summed, SPLITS * HEADS * 8);
#ifdef IMPORTANCE_GLOBAL
        barrier_init(&shared.scored, CLUSTER);
#else
        barrier_init(&shared.scored, 1);
        barrier_expect(&shared.scored, HEAD_TILES * tiles * TILE * 4);
#endif
#endif
        barrier_fence_init();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_arrive();

    if (thread < WORKERS) {
        const float scale = p.scale * 1.4426950408889634f;
        const int top = lane >> 2, left = (lane & 3) * 2;  // of a product's accumulator
        u32 q[STEPS][4];
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int h = top + (i & 1) * 8;
                q[step][i] = h < heads ? *(const u32*)(p.q + (first_head + h) * D + step * 16 + (i >> 1) * 8 + left) : 0;
            }
        float acc[BRANCHES][COLUMNS][4];
#pragma unroll
        for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[b][n][e] = 0.0f;
        const u32 weights = shared_address(shared.weights);
        int load = 0, round = 0;  // the slot of the next tile, and how often slots came round
        auto next = [&] {
            if (++load == SLOTS) {
                load = 0;
                ++round;
            }
        };
        auto release = [&](int slot) {
            __syncwarp();
            if (lane == 0) barrier_arrive(&shared.empty[slot]);
        };

        // Attends to the next tile; keeps its logits in rows from `kept` on, unless null.
        auto tile = [&](float(&o)[COLUMNS][4], Softmax& state, float* kept) {
            barrier_wait(&shared.full[load], round & 1);
            const int2 edges = shared.edges[load];
            const u32 k_at = slots + load * SLOT;
            float s[PARTS][4] = {}, odd[PARTS][4] = {};
            // Four 8×8 matrices: two key tiles of a step, or one of two steps.
#pragma unroll
            for (int step = 0; step < STEPS; step += 2) {
                u32 k[4];
                if constexpr (PARTS == 2) {
                    const int r = warp * 16 + (lane >> 4) * 8 + (lane & 7);
                    load_tiles(k, k_at + chunk_at(r, step * 2 + (lane >> 3 & 1)));
                    mma_16_8_16(s[0], q[step], k[0], k[1]);
                    mma_16_8_16(s[1], q[step], k[2], k[3]);
                    load_tiles(k, k_at + chunk_at(r, step * 2 + 2 + (lane >> 3 & 1)));
                    mma_16_8_16(odd[0], q[step + 1], k[0], k[1]);
                    mma_16_8_16(odd[1], q[step + 1], k[2], k[3]);
                } else {
                    load_tiles(k, k_at + chunk_at(warp * 8 + (lane & 7), step * 2 + (lane >> 3)));
                    mma_16_8_16(s[0], q[step], k[0], k[1]);
                    mma_16_8_16(odd[0], q[step + 1], k[2], k[3]);
                }
            }
            release(load);
            next();
            float most[2] = {-INF, -INF};
#pragma unroll
            for (int j = 0; j < PARTS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = (warp * PARTS + j) * 8 + left + (e & 1);
                    s[j][e] = column >= edges.x && column < edges.y ? (s[j][e] + odd[j][e]) * scale : -INF;
                    most[e >> 1] = fmaxf(most[e >> 1], s[j][e]);
                }
#ifndef DENSE
            if (kept)
#pragma unroll
                for (int j = 0; j < PARTS; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *(float2*)&kept[(top + half * 8) * row_of_logits + (warp * PARTS + j) * 8 + left] =
                            make_float2(s[j][half * 2], s[j][half * 2 + 1]);
#endif
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                most[i] = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 1));
                most[i] = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 2));
                if ((lane & 3) == 0) shared.max[warp][top + i * 8] = most[i];
            }
            group_sync<1, WORKERS>();
            float fade[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float m = state.max[i];
#pragma unroll
                for (int w = 0; w < 4; ++w) m = fmaxf(m, shared.max[w][top + i * 8]);
                const float base = m == -INF ? 0.0f : m;
                fade[i] = exp2_approx(state.max[i] - base);
                state.max[i] = m;
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < PARTS; ++j) {
                    float a = exp2_approx(s[j][i * 2] - base), b = exp2_approx(s[j][i * 2 + 1] - base);
                    sum += a + b;
                    *(u32*)((u8*)shared.weights + weight_at(top + i * 8, warp * PARTS + j) + left * 2) = pack<Real>(a, b);
                }
                state.sum[i] = state.sum[i] * fade[i] + sum;
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[n][e] *= fade[e >> 1];
            const u32 v_at = slots + load * SLOT;
            barrier_wait(&shared.full[load], round & 1);
            if (edges.x > 0 || edges.y < TILE) {
                // What lies outside may be anything, and 0 · NaN is NaN.
                for (int i = thread; i < V_PANELS * TILE * 8; i += WORKERS) {
                    const int r = i / 8 % TILE;
                    if (r < edges.x || r >= edges.y) *(uint4*)(dynamic + load * SLOT + i * 16) = make_uint4(0, 0, 0, 0);
                }
                fence_proxy_async();
            }
            group_sync<1, WORKERS>();
#pragma unroll
            for (int step = 0; step < TILE / 16; ++step) {
                u32 a[4];
                load_tiles(a, weights + weight_at((lane >> 3 & 1) * 8 + (lane & 7), step * 2 + (lane >> 4)));
                const int r = step * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
                for (int n = 0; n < COLUMNS; n += 2) {
                    u32 b[4];
                    // With an odd number of columns the last pair reads one column twice.
                    load_tiles_transposed(b, v_at + chunk_at(r, warp * COLUMNS + min(n + (lane >> 4), COLUMNS - 1)));
                    mma_16_8_16(o[n], a, b[0], b[1]);
                    if (n + 1 < COLUMNS) mma_16_8_16(o[n + 1 < COLUMNS ? n + 1 : n], a, b[2], b[3]);
                }
            }
            release(load);
            next();
        };

        // Adds a branch's state over the warps into `totals`; ends with every worker seeing it.
        auto total = [&](const Softmax& state, float2(&totals)[HEADS]) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = state.sum[i];
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if ((lane & 3) == 0) {
                    shared.sum[warp][top + i * 8] = sum;
                    if (warp == 0) totals[top + i * 8].x = state.max[i];
                }
            }
            group_sync<1, WORKERS>();
            if (thread < HEADS)
                totals[thread].y = (shared.sum[0][thread] + shared.sum[1][thread]) + (shared.sum[2][thread] + shared.sum[3][thread]);
            group_sync<1, WORKERS>();
        };
        const Softmax empty = {{-INF, -INF}, {0.0f, 0.0f}};
        Softmax state = empty;

#ifdef DENSE
        for (int i = 0; i < count; ++i) tile(acc[0], state, nullptr);
        total(state, shared.totals[0]);
        if constexpr (CLUSTER > 1) cluster_wait();
#else
        for (int i = 0; i < cmp_count; ++i) tile(acc[0], state, ranked ? logits + i * TILE : nullptr);
        total(state, shared.totals[0]);
        if constexpr (CLUSTER > 1) cluster_wait();
        if (ranked) {
            if constexpr (SPLITS > 1)
                for (int i = thread; i < SPLITS * HEADS; i += WORKERS) {
                    const u32 to = head_tile * SPLITS + i / HEADS;
                    peer_store(peer_address(shared_address(&shared.peers[split][i % HEADS]), to),
                               peer_address(shared_address(&shared.summed), to), shared.totals[0][i % HEADS]);
                }
            group_arrive<4, WORKERS + CHOOSERS>();
        }
        state = empty;
        for (int i = 0; i < win_count; ++i) tile(acc[2], state, nullptr);
        total(state, shared.totals[2]);
        state = empty;
        for (int i = 0; i < sure_count + rest_count; ++i) tile(acc[1], state, nullptr);
        total(state, shared.totals[1]);
#endif

        auto gate = [&](int h, int b) {
#ifdef DENSE
            return 1.0f;
#else
            return widen(p.gate[(first_head + h) * 3 + b]);
#endif
        };
        if constexpr (SPLITS == 1) {
            float weight[BRANCHES][2];
#pragma unroll
            for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int h = top + i * 8;
                    const float sum = shared.totals[b][h].y;
                    weight[b][i] = h < heads && sum != 0.0f ? gate(h, b) / sum : 0.0f;
                }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float x = 0.0f, y = 0.0f;
#pragma unroll
                    for (int b = 0; b < BRANCHES; ++b) {
                        x += weight[b][i] * acc[b][n][i * 2];
                        y += weight[b][i] * acc[b][n][i * 2 + 1];
                    }
                    const int h = top + i * 8;
                    if (h < heads) *(u32*)(p.out + (first_head + h) * V + (warp * COLUMNS + n) * 8 + left) = pack<Real>(x, y);
                }
        } else {
            // Each block merges OWN heads; what it sends itself goes the same way.
            for (int i = thread; i < BRANCHES * HEADS; i += WORKERS) {
                const int b = i / HEADS, h = i % HEADS;
                const u32 to = head_tile * SPLITS + h / OWN;
                peer_store(peer_address(shared_address(&shared.parts[split][b][h % OWN]), to),
                           peer_address(shared_address(&shared.merged), to), shared.totals[b][h]);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int h = top + i * 8;
                const u32 to = head_tile * SPLITS + h / OWN;
                const u32 barrier = peer_address(shared_address(&shared.merged), to);
#pragma unroll
                for (int b = 0; b < BRANCHES; ++b) {
                    const u32 at = peer_address(
                        shared_address(inbox + ((split * BRANCHES + b) * OWN + h % OWN) * V + warp * COLUMNS * 8 + left), to);
#pragma unroll
                    for (int n = 0; n < COLUMNS; ++n)
                        peer_store(at + n * 32, barrier, make_float2(acc[b][n][i * 2], acc[b][n][i * 2 + 1]));
                }
            }
            barrier_wait_peers(&shared.merged);
            if (thread < BRANCHES * OWN) {
                const int b = thread / OWN, own = thread % OWN, h = split * OWN + own;
                float most = -INF, sum = 0.0f;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) most = fmaxf(most, shared.parts[s][b][own].x);
                most = most == -INF ? 0.0f : most;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) sum += shared.parts[s][b][own].y * exp2_approx(shared.parts[s][b][own].x - most);
                const float factor = h < heads && sum != 0.0f ? gate(h, b) / sum : 0.0f;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) shared.factors[s][b][own] = factor * exp2_approx(shared.parts[s][b][own].x - most);
            }
            group_sync<1, WORKERS>();
            for (int i = thread; i < OWN * V / 2; i += WORKERS) {
                const int own = i / (V / 2), column = i % (V / 2) * 2, h = split * OWN + own;
                float x = 0.0f, y = 0.0f;
#pragma unroll
                for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
                    for (int s = 0; s < SPLITS; ++s) {
                        const float2 part = *(float2*)(inbox + ((s * BRANCHES + b) * OWN + own) * V + column);
                        x += shared.factors[s][b][own] * part.x;
                        y += shared.factors[s][b][own] * part.y;
                    }
                if (h < heads) *(u32*)(p.out + (first_head + h) * V + column) = pack<Real>(x, y);
            }
        }
    } else if (warp == WORKERS / 32) {
        if constexpr (CLUSTER > 1) cluster_wait();
        int load = 0, round = 0;
#ifdef READ_ONCE
        const u64 policy = policy_of(true);
#else
        const u64 policy = policy_of(false);
#endif
        auto place = [&](int which, const Cache& cache, int token, int low, int high) {
            const u32 page = (u32)token / (u32)cache.page, inside = (u32)token % (u32)cache.page;
            const int at = cache.table ? cache.table[(i64)sequence * cache.width + page] : sequence;
            return Spot{which, at, (int)inside, max(low, 0), min(high, TILE)};
        };
#ifdef DENSE
        auto known_spot = [&](int i) {
            const int token = (mine + i) * TILE;
            return place(1, p.slc, token, oldest - token, position + 1 - token);
        };
        auto chosen_spot = known_spot;
#else
        auto known_spot = [&](int i) {
            if (i < cmp_count) {
                const int block = (cmp_first + i) * TILE;
                return place(0, p.cmp, block, 0, visible - block);
            }
            i -= cmp_count;
            if (i < win_count) {
                const int token = (win_first + SPLITS - 1 - split + i * SPLITS) * TILE;
                return place(2, p.win, token, oldest - token, position + 1 - token);
            }
            i = split + (i - win_count) * SPLITS;
            const int block = i / TILES, token = (ranked && block >= SELECT_INITIAL ? local + block - SELECT_INITIAL : block) * SELECT_BLOCK + i % TILES * TILE;
            return place(1, p.slc, min(token, position), 0, position + 1 - token);
        };
        auto chosen_spot = [&](int i) {
            i = rest_start + i * SPLITS;
            const int token = shared.chosen[i / TILES] * SELECT_BLOCK + i % TILES * TILE;
            return place(1, p.slc, min(token, position), 0, position + 1 - token);
        };
#endif
        // Lanes find 32 tiles' places at once, then one lane asks for them.
        auto stream = [&](int count, bool known) {
            for (int base = 0; base < count; base += 32) {
                Spot spot = {};
                if (base + lane < count) spot = known ? known_spot(base + lane) : chosen_spot(base + lane);
                for (int i = 0; i < min(count - base, 32); ++i) {
                    const int which = __shfl_sync(ALL_LANES, spot.which, i), page = __shfl_sync(ALL_LANES, spot.page, i);
                    const int token = __shfl_sync(ALL_LANES, spot.token, i);
                    const int low = __shfl_sync(ALL_LANES, spot.low, i), high = __shfl_sync(ALL_LANES, spot.high, i);
                    if (lane == 0) {
#pragma unroll
                        for (int values = 0; values < 2; ++values) {
                            if (round > 0) barrier_wait(&shared.empty[load], round - 1 & 1);
                            shared.edges[load] = make_int2(low, high);
                            const int panels = values ? V_PANELS : K_PANELS;
                            barrier_expect(&shared.full[load], panels * PANEL);
                            const TensorMap* map = values ? which == 0 ? &cmp_v : which == 1 ? &slc_v : &win_v
                                                          : which == 0 ? &cmp_k : which == 1 ? &slc_k : &win_k;
#pragma unroll
                            for (int panel = 0; panel < panels; ++panel)
                                load_tokens(slots + load * SLOT + panel * PANEL, map, &shared.full[load], panel * 64, token, head, page, policy);
                            if (++load == SLOTS) {
                                load = 0;
                                ++round;
                            }
                        }
                    }
                }
            }
        };
#ifdef DENSE
        stream(count, true);
#else
        stream(cmp_count + win_count + sure_count, true);
        if (ranked && SELECT_COUNT > SELECT_INITIAL + SELECT_LOCAL) {
            group_sync<3, PRODUCERS + CHOOSERS>();
            stream(rest_count, false);
        }
#endif
    }
#ifndef DENSE
    else {
        if constexpr (CLUSTER > 1) cluster_wait();
        const int chooser = thread - WORKERS - PRODUCERS;
        if (ranked) {
            group_sync<4, WORKERS + CHOOSERS>();
            if constexpr (SPLITS > 1) barrier_wait_peers(&shared.summed);
            if (chooser < HEADS) {
                auto part = [&](int s) { return SPLITS > 1 ? shared.peers[s][chooser] : shared.totals[0][chooser]; };
                float most = -INF, sum = 0.0f;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) most = fmaxf(most, part(s).x);
                most = most == -INF ? 0.0f : most;
#pragma unroll
                for (int s = 0; s < SPLITS; ++s) sum += part(s).y * exp2_approx(part(s).x - most);
                shared.most[chooser] = most;
                shared.inverse[chooser] = chooser < heads && sum != 0.0f ? 1.0f / sum : 0.0f;
            }
            group_sync<2, CHOOSERS>();
            // A head's share of a block is its probability; heads are added in their order.
            for (int i = chooser * 4; i < cmp_count * TILE; i += CHOOSERS * 4) {
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f), x[HEADS];
                constexpr int LOADED = GROUP < HEADS ? GROUP : HEADS;
#pragma unroll
                for (int h = 0; h < LOADED; ++h) x[h] = *(const float4*)&logits[h * row_of_logits + i];
#pragma unroll
                for (int h = 0; h < LOADED; ++h) {
                    if (h >= heads) break;
                    const float most = shared.most[h], inverse = shared.inverse[h];
                    sum.x += exp2_approx(x[h].x - most) * inverse;
                    sum.y += exp2_approx(x[h].y - most) * inverse;
                    sum.z += exp2_approx(x[h].z - most) * inverse;
                    sum.w += exp2_approx(x[h].w - most) * inverse;
                }
                float* to = importance + head_tile * all + cmp_first * TILE + i;
                if constexpr (CLUSTER > 1 && !GLOBAL) {
#pragma unroll
                    for (int r = 0; r < CLUSTER; ++r)
                        peer_store(peer_address(shared_address(to), r), peer_address(shared_address(&shared.scored), r), sum);
                } else {
                    *(float4*)to = sum;
                }
            }
            if constexpr (CLUSTER == 1 || GLOBAL) group_sync<2, CHOOSERS>();
            if constexpr (CLUSTER > 1 && GLOBAL)
                if (chooser < CLUSTER) peer_arrive(peer_address(shared_address(&shared.scored), chooser));
            if constexpr (CLUSTER > 1) barrier_wait_peers(&shared.scored);

            constexpr int R = SELECT_BLOCK / COMPRESS_STRIDE, S = COMPRESS_BLOCK / COMPRESS_STRIDE;
            constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
            if constexpr (FREE > 0) {
                const int candidates = local - SELECT_INITIAL;
                for (int i = chooser; i < candidates; i += CHOOSERS) {
                    float score = 0.0f;
#pragma unroll 8
                    for (int offset = 1 - S; offset < R; ++offset) {
                        const int block = (i + SELECT_INITIAL) * R + offset;
                        if (block < 0 || block >= visible) continue;
                        float x = importance[block];
#pragma unroll
                        for (int m = 1; m < HEAD_TILES; ++m) x += importance[m * all + block];
                        score = __fadd_rn(score, __fmul_rn((float)overlap(offset), x));
                    }
                    keys[i] = score_key(score);
                }
                group_sync<2, CHOOSERS>();
                choose<2>(keys, candidates, FREE, SELECT_INITIAL, shared.chosen, shared.choice, chooser);
                group_sync<3, PRODUCERS + CHOOSERS>();
            }
        }
        if (rank == 0 && p.indices) {
            i32* out = p.indices + (i64)pair * SELECT_COUNT;
            constexpr int LAST = SELECT_COUNT - SELECT_LOCAL;
            for (int i = chooser; i < SELECT_COUNT; i += CHOOSERS) {
                int block = i <= current ? i : -1;
                if (ranked && i >= LAST) block = local + i - LAST;
                else if (ranked && i >= SELECT_INITIAL) block = shared.chosen[i - SELECT_INITIAL];
                out[i] = block;
            }
        }
    }
#endif
}
