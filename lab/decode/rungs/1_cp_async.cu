// One decode step of one layer for 16-bit numbers: a cluster of blocks for each (row, KV head).
//
// The cluster's blocks split the keys. Each keeps the logits of its compressed blocks, exchanges
// its maxima and sums with the others through distributed shared memory, and so turns logits into
// importance without writing them anywhere. While four warps of a block (the choosers) rank blocks,
// the other four (the workers) attend to the window and to the blocks that are selected whatever
// their score. Last the chosen blocks, then the splits are merged in their order and gated.
//
// With DENSE there is one branch, causal or (WINDOW > 0) a window, and nothing is ranked.
#include "async.cuh"
#include "decode.cuh"
#ifndef DENSE
#include "select.cuh"
#endif

// Constants: REAL_BF16 or REAL_F16; GROUP, D, V; SPLITS (blocks that share the keys), SLOTS (tiles
// in flight), TILE (tokens in one, 32 or 64), CHOOSERS (threads), RESIDENT (blocks on a
// multiprocessor); of the spec COMPRESS_BLOCK, COMPRESS_STRIDE,
// SELECT_BLOCK, SELECT_COUNT, SELECT_INITIAL, SELECT_LOCAL, WINDOW; LOGITS_GLOBAL.
constexpr int HEADS = 16, WORKERS = 128, THREADS = WORKERS + CHOOSERS;
constexpr int HEAD_TILES = (GROUP + HEADS - 1) / HEADS, CLUSTER = SPLITS * HEAD_TILES;
constexpr int WIDER = D > V ? D : V, SLOT = TILE * WIDER * 2;
constexpr int STEPS = D / 16;        // products of one QK tile
constexpr int PARTS = TILE / 32;     // 8-wide tiles of a worker warp's keys
constexpr int COLUMNS = V / 32;      // 8-wide tiles of a worker warp's quarter of the output
constexpr bool HOLD_Q = D <= 128;
static_assert(SLOTS >= 3 && (TILE == 32 || TILE == 64) && D % 32 == 0 && V % 32 == 0, "tiles");
#ifdef DENSE
constexpr int BRANCHES = 1;
#else
constexpr int BRANCHES = 3;
#endif

// Which 16-byte chunk of a row holds chunk c, so that eight rows of one column are on all banks.
template <int DIM>
DEVICE u32 place(int row, int chunk) {
    return row * (DIM / 8) + (DIM % 64 == 0 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3));
}

// Copies a tile of tokens; rows outside low..high become zeros.
template <int DIM>
DEVICE void fetch(u32 slot, const Real* rows, i64 stride, int low, int high) {
    constexpr int CHUNKS = DIM / 8, COPIES = TILE * CHUNKS / WORKERS;
    if constexpr (WORKERS % CHUNKS == 0) {
        // A thread keeps its column; eight rows on, the place within the row is the same again.
        constexpr int ROWS = WORKERS / CHUNKS;
        const int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const Real* from = rows + first * stride + chunk * 8;
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int row = first + i * ROWS;
            const bool real = row >= low && row < high;
            copy_async(slot + place<DIM>(row, chunk) * 16, real ? from : rows, real);
            from += ROWS * stride;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int at = i * WORKERS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
            const bool real = row >= low && row < high;
            copy_async(slot + place<DIM>(row, chunk) * 16, rows + (real ? row : 0) * stride + chunk * 8, real);
        }
    }
}

template <int N>
struct Number {
    static constexpr int value = N;
};

struct Softmax {
    float max[2], sum[2];
};

// A branch's maxima and sums of one block, read by the others at the end.
struct Totals {
    float max[HEADS], sum[HEADS];
};

struct Shared {
    alignas(16) u16 p[HEADS * TILE];
    float max[4][HEADS], sum[4][HEADS];
    Totals totals[BRANCHES];
    float weight[BRANCHES][SPLITS][HEADS];
#ifndef DENSE
    i32 chosen[SELECT_COUNT];
    Totals peers[SPLITS];
    float lse_max[HEADS], lse_inverse[HEADS];
    u64 summed, scored;
    Choice choice;
#endif
};

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, RESIDENT)
    decode_step(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 dynamic[];
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

    const u32 slots = shared_at(dynamic), q_at = slots + SLOTS * SLOT;
#ifndef DENSE
    const int row_of_logits = p.slice + 8;
    // Importance takes the place of the first head's logits; it is read by peers, so it stands in
    // shared memory whatever the logits do. Keys follow it.
    float* importance = (float*)(dynamic + SLOTS * SLOT + HEADS * D * 2);
    u32* keys = (u32*)(importance + row_of_logits);
#ifdef LOGITS_GLOBAL
    float* logits = p.scratch + (i64)blockIdx.x * HEADS * row_of_logits;
#else
    float* logits = importance;
#endif
    const int visible = visible_compressed(position), current = position / SELECT_BLOCK;
    const bool ranked = !all_selected(position);
    const int local = current + 1 - SELECT_LOCAL;
    const int tiles = (visible + TILE - 1) / TILE, share = (tiles + SPLITS - 1) / SPLITS;
    const int cmp_first = min(split * share, tiles), cmp_count = min(cmp_first + share, tiles) - cmp_first;
    if (thread == 0) {
        signal_init(&shared.summed, SPLITS);
        signal_init(&shared.scored, CLUSTER);
        signal_init_done();
    }
#endif
    if (thread < WORKERS) {
        for (int i = thread; i < HEADS * D / 8; i += WORKERS) {
            int r = i / (D / 8), chunk = i % (D / 8);
            copy_async(q_at + place<D>(r, chunk) * 16, p.q + (first_head + (r < heads ? r : 0)) * D + chunk * 8, r < heads);
        }
        copy_commit();
    }
    __syncwarp();
    cluster_arrive();

    float acc[BRANCHES][COLUMNS][4];
#pragma unroll
    for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[b][n][e] = 0.0f;

    if (thread < WORKERS) {
        const float scale = p.scale * 1.4426950408889634f;
        const int top = lane >> 2, left = (lane & 3) * 2;  // of a product's accumulator
        u32 q[HOLD_Q ? STEPS : 1][4];
        auto load_q = [&](u32(&x)[4], int step) {
            load_matrices(x, q_at + place<D>((lane >> 3 & 1) * 8 + (lane & 7), step * 2 + (lane >> 4)) * 16);
        };

        auto multiply_q = [&](float(&s)[4], int step, u32 b0, u32 b1) {
            if constexpr (HOLD_Q) {
                multiply(s, q[step], b0, b1);
            } else {
                u32 a[4];
                load_q(a, step);
                multiply(s, a, b0, b1);
            }
        };

        // One tile of the stream: waits for its keys, weighs its values, and asks for later tiles.
        // `ask(values, tile)` copies and commits, `seen(column)` masks, `keep` is shown the logits.
        auto tile = [&](int t, float(&o)[COLUMNS][4], Softmax& state, auto ask, auto seen, auto keep) {
            copy_wait<SLOTS - 2>();
            group_sync<1, WORKERS>();
            ask(((SLOTS - 1) & 1) != 0, t + (SLOTS - 1) / 2, 2 * t - 1 + SLOTS);
            const u32 k_at = slots + (2 * t) % SLOTS * SLOT, v_at = slots + (2 * t + 1) % SLOTS * SLOT;
            float s[PARTS][4] = {};
            // Four 8×8 matrices: two key tiles of a step, or one of two steps.
#pragma unroll
            for (int step = 0; step < STEPS; step += 3 - PARTS) {
                u32 k[4];
                const int r = PARTS == 2 ? warp * 16 + (lane >> 4) * 8 + (lane & 7) : warp * 8 + (lane & 7);
                load_matrices(k, k_at + place<D>(r, step * 2 + (PARTS == 2 ? lane >> 3 & 1 : lane >> 3)) * 16);
                multiply_q(s[0], step, k[0], k[1]);
                multiply_q(s[PARTS - 1], PARTS == 2 ? step : step + 1, k[2], k[3]);
            }
            float most[2] = {-INF, -INF};
#pragma unroll
            for (int j = 0; j < PARTS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    s[j][e] = seen((warp * PARTS + j) * 8 + left + (e & 1)) ? s[j][e] * scale : -INF;
                    most[e >> 1] = fmaxf(most[e >> 1], s[j][e]);
                }
            keep(s);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                most[i] = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 1));
                most[i] = fmaxf(most[i], __shfl_xor_sync(ALL_LANES, most[i], 2));
                if ((lane & 3) == 0) shared.max[warp][top + i * 8] = most[i];
            }
            group_sync<1, WORKERS>();
            ask((SLOTS & 1) != 0, t + SLOTS / 2, 2 * t + SLOTS);
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
                    const int r = top + i * 8;
                    *(u32*)&shared.p[place<TILE>(r, warp * PARTS + j) * 8 + left] = pack<Real>(a, b);
                }
                state.sum[i] = state.sum[i] * fade[i] + sum;
            }
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[n][e] *= fade[e >> 1];
            copy_wait<SLOTS - 1>();
            group_sync<1, WORKERS>();
            const u32 p_at = shared_at(shared.p);
#pragma unroll
            for (int step = 0; step < TILE / 16; ++step) {
                u32 a[4];
                load_matrices(a, p_at + place<TILE>((lane >> 3 & 1) * 8 + (lane & 7), step * 2 + (lane >> 4)) * 16);
                const int r = step * 16 + (lane >> 3 & 1) * 8 + (lane & 7);
#pragma unroll
                for (int n = 0; n < COLUMNS; n += 2) {
                    u32 b[4];
                    // With an odd number of columns the last pair reads one column twice.
                    const int chunk = warp * COLUMNS + min(n + (lane >> 4), COLUMNS - 1);
                    load_transposed(b, v_at + place<V>(r, chunk) * 16);
                    multiply(o[n], a, b[0], b[1]);
                    if (n + 1 < COLUMNS) multiply(o[n + 1 < COLUMNS ? n + 1 : n], a, b[2], b[3]);
                }
            }
        };
        auto ignore = [](const float(&)[PARTS][4]) {};

        // Adds a branch's state over the warps into `totals`; ends with every worker seeing it.
        auto total = [&](const Softmax& state, Totals& totals) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = state.sum[i];
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if ((lane & 3) == 0) {
                    shared.sum[warp][top + i * 8] = sum;
                    if (warp == 0) totals.max[top + i * 8] = state.max[i];
                }
            }
            group_sync<1, WORKERS>();
            if (thread < HEADS)
                totals.sum[thread] = (shared.sum[0][thread] + shared.sum[1][thread]) + (shared.sum[2][thread] + shared.sum[3][thread]);
            group_sync<1, WORKERS>();
        };
        const Softmax empty = {{-INF, -INF}, {0.0f, 0.0f}};

        // Copies tokens that lie together.
        auto ask_tokens = [&](const Cache& cache, bool values, u32 slot, int token, int low, int high) {
            if (values) fetch<V>(slot, cache.v + token_start(cache, sequence, token, head, p.kv_heads, V), token_stride(cache, p.kv_heads, V), low, high);
            else fetch<D>(slot, cache.k + token_start(cache, sequence, token, head, p.kv_heads, D), token_stride(cache, p.kv_heads, D), low, high);
        };
        auto ask_ring = [&](const Cache& cache, bool values, u32 slot, int tile, int oldest) {
            const int token = cache.ring ? (u32)(tile * TILE) % (u32)cache.page : tile * TILE;
            ask_tokens(cache, values, slot, token, max(oldest - tile * TILE, 0), min(position + 1 - tile * TILE, TILE));
        };

#ifdef DENSE
        const int oldest = WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0;
        const int first = oldest / TILE, tiles = position / TILE + 1 - first, share = (tiles + SPLITS - 1) / SPLITS;
        const int mine = first + min(split * share, tiles), count = min(first + tiles, mine + share) - mine;
        auto ask = [&](bool values, int t, int load) {
            if (t < count) ask_ring(p.slc, values, slots + load % SLOTS * SLOT, mine + t, oldest);
            copy_commit();
        };
        for (int load = 0; load < SLOTS - 1; ++load) ask(load & 1, load >> 1, load);
        copy_wait<SLOTS - 1>();
        group_sync<1, WORKERS>();
        if constexpr (HOLD_Q) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) load_q(q[step], step);
        }
        Softmax state = empty;
        for (int t = 0; t < count; ++t) {
            const int low = oldest - (mine + t) * TILE, high = position + 1 - (mine + t) * TILE;
            tile(t, acc[0], state, ask, [&](int column) { return column >= low && column < high; }, ignore);
        }
        total(state, shared.totals[0]);
        cluster_wait();
#else
        const int oldest = max(position - WINDOW + 1, 0), win_first = oldest / TILE;
        // Window tiles and selected tiles are dealt to the splits from opposite ends.
        auto dealt = [&](int count, int to) { return count > to ? (count - to - 1) / SPLITS + 1 : 0; };
        const int win_count = dealt(position / TILE + 1 - win_first, SPLITS - 1 - split);
        auto window_tile = [&](int t) { return win_first + SPLITS - 1 - split + t * SPLITS; };
        auto tiles_of = [&](int blocks) { return (blocks * SELECT_BLOCK + TILE - 1) / TILE; };
        const int sure = ranked ? SELECT_INITIAL + SELECT_LOCAL : current + 1;
        const int sure_tiles = tiles_of(sure), sure_count = dealt(sure_tiles, split);
        auto sure_block = [&](int i) { return ranked && i >= SELECT_INITIAL ? local + i - SELECT_INITIAL : i; };
        const int rest = ranked ? SELECT_COUNT - sure : 0;
        const int rest_start = (split + SPLITS - sure_tiles % SPLITS) % SPLITS, rest_count = dealt(tiles_of(rest), rest_start);

        // Selected keys are counted through; `block(i)` is the i-th block of `count`.
        auto selected_token = [&](int key, int count, auto block) {
            return key < count * SELECT_BLOCK ? block(key / SELECT_BLOCK) * SELECT_BLOCK + key % SELECT_BLOCK : position + 1;
        };
        auto ask_selected = [&](bool values, u32 slot, int tile, int count, auto block) {
            if constexpr (SELECT_BLOCK % TILE == 0) {
                const int token = selected_token(tile * TILE, count, block);
                ask_tokens(p.slc, values, slot, min(token, position), 0, min(position + 1 - token, TILE));
            } else {
                auto each = [&](auto dim, const Real* base) {
                    constexpr int DIM = decltype(dim)::value, CHUNKS = DIM / 8;
                    for (int i = thread; i < TILE * CHUNKS; i += WORKERS) {
                        const int r = i / CHUNKS, chunk = i % CHUNKS, token = selected_token(tile * TILE + r, count, block);
                        const i64 at = token_start(p.slc, sequence, min(token, position), head, p.kv_heads, DIM);
                        copy_async(slot + place<DIM>(r, chunk) * 16, base + at + chunk * 8, token <= position);
                    }
                };
                if (values) each(Number<V>{}, p.slc.v);
                else each(Number<D>{}, p.slc.k);
            }
        };
        auto ask = [&](bool values, int t, int load) {
            const u32 slot = slots + load % SLOTS * SLOT;
            if (t < cmp_count) {
                const int block = (cmp_first + t) * TILE;
                ask_tokens(p.cmp, values, slot, block, 0, min(visible - block, TILE));
            } else if ((t -= cmp_count) < win_count) {
                ask_ring(p.win, values, slot, window_tile(t), oldest);
            } else if ((t -= win_count) < sure_count) {
                ask_selected(values, slot, split + t * SPLITS, sure, sure_block);
            }
            copy_commit();
        };
        for (int load = 0; load < SLOTS - 1; ++load) ask(load & 1, load >> 1, load);
        copy_wait<SLOTS - 1>();
        cluster_wait();
        group_sync<1, WORKERS>();
        if constexpr (HOLD_Q) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) load_q(q[step], step);
        }

        int t = 0;
        Softmax state = empty;
        for (; t < cmp_count; ++t) {
            const int high = visible - (cmp_first + t) * TILE;
            auto keep = [&](const float(&s)[PARTS][4]) {
#pragma unroll
                for (int j = 0; j < PARTS; ++j)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        *(float2*)&logits[(top + i * 8) * row_of_logits + t * TILE + (warp * PARTS + j) * 8 + left] =
                            make_float2(s[j][i * 2], s[j][i * 2 + 1]);
            };
            tile(t, acc[0], state, ask, [&](int column) { return column < high; }, keep);
        }
        total(state, shared.totals[0]);
        if (ranked && warp == 0) {
            for (int i = lane; i < SPLITS * HEADS; i += 32) {
                const u32 at = peer_at(shared_at(&shared.peers[split]), head_tile * SPLITS + i / HEADS);
                peer_store(at + i % HEADS * 4, shared.totals[0].max[i % HEADS]);
                peer_store(at + (HEADS + i % HEADS) * 4, shared.totals[0].sum[i % HEADS]);
            }
            asm volatile("fence.acq_rel.cluster;" ::: "memory");
            __syncwarp();
            if (lane < SPLITS) signal_peer(&shared.summed, head_tile * SPLITS + lane);
        }

        state = empty;
        for (int i = 0; i < win_count; ++i, ++t) {
            const int low = oldest - window_tile(i) * TILE, high = position + 1 - window_tile(i) * TILE;
            tile(t, acc[2], state, ask, [&](int column) { return column >= low && column < high; }, ignore);
        }
        total(state, shared.totals[2]);

        state = empty;
        auto attend = [&](int tile_index, int t, int count, auto ask, auto block) {
            if constexpr (SELECT_BLOCK % TILE == 0) {
                const int high = position + 1 - selected_token(tile_index * TILE, count, block);
                tile(t, acc[1], state, ask, [&](int column) { return column < high; }, ignore);
            } else {
                auto seen = [&](int column) { return selected_token(tile_index * TILE + column, count, block) <= position; };
                tile(t, acc[1], state, ask, seen, ignore);
            }
        };
        for (int i = 0; i < sure_count; ++i, ++t) attend(split + i * SPLITS, t, sure, ask, sure_block);

        if (ranked) {
            group_sync<3, THREADS>();
            auto chosen_block = [&](int i) { return shared.chosen[i]; };
            auto ask_rest = [&](bool values, int t, int load) {
                if (t < rest_count) ask_selected(values, slots + load % SLOTS * SLOT, rest_start + t * SPLITS, rest, chosen_block);
                copy_commit();
            };
            for (int load = 0; load < SLOTS - 1; ++load) ask_rest(load & 1, load >> 1, load);
            for (int i = 0; i < rest_count; ++i) attend(rest_start + i * SPLITS, i, rest, ask_rest, chosen_block);
        }
        total(state, shared.totals[1]);
#endif

        copy_wait<0>();
        group_sync<1, WORKERS>();
        float* partial = (float*)dynamic;  // [BRANCHES, 16, V]
#pragma unroll
        for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
            for (int n = 0; n < COLUMNS; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    *(float2*)&partial[(b * HEADS + top + i * 8) * V + (warp * COLUMNS + n) * 8 + left] =
                        make_float2(acc[b][n][i * 2], acc[b][n][i * 2 + 1]);
    } else {
        cluster_wait();
#ifndef DENSE
        const int chooser = thread - WORKERS;
        if (ranked) {
            signal_wait(&shared.summed);
            if (chooser < HEADS) {
                float most = -INF, sum = 0.0f;
                for (int s = 0; s < SPLITS; ++s) most = fmaxf(most, shared.peers[s].max[chooser]);
                most = most == -INF ? 0.0f : most;
                for (int s = 0; s < SPLITS; ++s) sum += shared.peers[s].sum[chooser] * exp2_approx(shared.peers[s].max[chooser] - most);
                shared.lse_max[chooser] = most;
                shared.lse_inverse[chooser] = sum != 0.0f ? 1.0f / sum : 0.0f;
            }
            group_sync<2, CHOOSERS>();
            // A head's share of a block is its probability; heads are added in their order.
            for (int i = chooser * 4; i < cmp_count * TILE; i += CHOOSERS * 4) {
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
                for (int h = 0; h < heads; ++h) {
                    const float4 x = *(const float4*)&logits[h * row_of_logits + i];
                    const float most = shared.lse_max[h], inverse = shared.lse_inverse[h];
                    sum.x += exp2_approx(x.x - most) * inverse;
                    sum.y += exp2_approx(x.y - most) * inverse;
                    sum.z += exp2_approx(x.z - most) * inverse;
                    sum.w += exp2_approx(x.w - most) * inverse;
                }
                *(float4*)&importance[i] = sum;
            }
            group_sync<2, CHOOSERS>();
            if (chooser < CLUSTER) signal_peer(&shared.scored, chooser);
            signal_wait(&shared.scored);

            constexpr int R = SELECT_BLOCK / COMPRESS_STRIDE, S = COMPRESS_BLOCK / COMPRESS_STRIDE;
            const int candidates = local - SELECT_INITIAL, width = share * TILE;
            for (int i = chooser; i < candidates; i += CHOOSERS) {
                int block = (i + SELECT_INITIAL) * R + 1 - S, offset = 1 - S;
                if (block < 0) {
                    offset -= block;
                    block = 0;
                }
                int owner = block / width, inside = block % width;
                float score = 0.0f;
                for (; offset < R && block < visible; ++offset, ++block, ++inside) {
                    if (inside == width) {
                        inside = 0;
                        ++owner;
                    }
                    float x = peer_load(peer_at(shared_at(importance + inside), owner));
                    for (int m = 1; m < HEAD_TILES; ++m) x += peer_load(peer_at(shared_at(importance + inside), m * SPLITS + owner));
                    score = __fadd_rn(score, __fmul_rn((float)overlap(offset), x));
                }
                keys[i] = score_key(score);
            }
            group_sync<2, CHOOSERS>();
            constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
            if constexpr (FREE > 0) choose<2>(keys, candidates, FREE, SELECT_INITIAL, shared.chosen, shared.choice, chooser);
            group_sync<3, THREADS>();
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
#endif
    }

    __syncwarp();
    cluster_arrive();
    cluster_wait();
    // Every block's share of the output is merged from all splits, in their order.
    for (int i = thread; i < BRANCHES * HEADS; i += THREADS) {
        const int b = i / HEADS, h = i % HEADS;
        float most = -INF, sum = 0.0f, part[SPLITS];
        for (int s = 0; s < SPLITS; ++s) most = fmaxf(most, peer_load(peer_at(shared_at(&shared.totals[b].max[h]), head_tile * SPLITS + s)));
        most = most == -INF ? 0.0f : most;
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) {
            part[s] = exp2_approx(peer_load(peer_at(shared_at(&shared.totals[b].max[h]), head_tile * SPLITS + s)) - most);
            sum += part[s] * peer_load(peer_at(shared_at(&shared.totals[b].sum[h]), head_tile * SPLITS + s));
        }
        float factor = sum != 0.0f ? 1.0f / sum : 0.0f;
#ifndef DENSE
        if (h < heads) factor *= widen(p.gate[(first_head + h) * 3 + b]);
#endif
#pragma unroll
        for (int s = 0; s < SPLITS; ++s) shared.weight[b][s][h] = part[s] * factor;
    }
    __syncthreads();
    for (int i = split * THREADS + thread; i < heads * V / 4; i += SPLITS * THREADS) {
        const int h = i / (V / 4), column = i % (V / 4) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int b = 0; b < BRANCHES; ++b)
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
                const u32 at = slots + ((b * HEADS + h) * V + column) * 4;
                const float4 x = peer_load4(peer_at(at, head_tile * SPLITS + s));
                const float w = shared.weight[b][s][h];
                sum.x += w * x.x;
                sum.y += w * x.y;
                sum.z += w * x.z;
                sum.w += w * x.w;
            }
        *(uint2*)(p.out + (first_head + h) * V + column) = make_uint2(pack<Real>(sum.x, sum.y), pack<Real>(sum.z, sum.w));
    }
    cluster_arrive();
    cluster_wait();
}
