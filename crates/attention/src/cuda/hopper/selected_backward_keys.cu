// dK and dV of the selected branch: a block of threads owns 64 keys of one KV head and walks the queries
// that chose them (the lists of inverse.cu), gathered into shared memory, their group's heads together.
//
// Keys are rows of the products and (query, head) columns, 64 a step: Sᵀ = K·Qᵀ, P = exp(Sᵀ − lse),
// dPᵀ = V·dOutᵀ, dSᵀ = gP·(dPᵀ − δ), so that gP and dS leave the registers of one product for the next
// (dV += gP·dOut, dK += dSᵀ·Q). Sums stay in registers: no atomics, the same bits every time.
//  * D, V ≤ 128: the two warpgroups take steps in turn, each with a dK and a dV, added at the end.
//  * larger:     both take every step; one has dV, the other dK, and both compute Sᵀ.
//
// A list longer than a chunk is several items; each writes f32 sums, which `selected_backward_keys_sum`
// adds in order.
//
// Constants: D, V, G (heads a group, 1 to 64), SB (l', a multiple of 64), STAGES. Grid: items ·
// (SB/64). Block: 384 threads.
#include "selected.cuh"

static constexpr int KEYS = 64, COLUMNS = 64, PARTS = SB / KEYS;
static constexpr int GP = G <= 1 ? 1 : G <= 2 ? 2 : G <= 4 ? 4 : G <= 8 ? 8 : G <= 16 ? 16 : G <= 32 ? 32 : 64;
static constexpr int QUERIES = COLUMNS / GP;
static constexpr bool SPLIT = D > 128 || V > 128;
// Groups that fill swizzled rows come by TMA, smaller ones 16 bytes at a time.
static constexpr bool BY_TMA = GP >= 8;
static constexpr int Q_BYTES = COLUMNS * DP * 2, O_BYTES = COLUMNS * VP * 2;
static constexpr int PANELS = DP / PANEL + VP / PANEL;
static constexpr int AHEAD = 4;
#ifndef SHARES_ONCE
#define SHARES_ONCE true
#endif
#ifdef WITH_QUERIES
static_assert(!SPLIT && PARTS == 1, "dQ comes along for head dims up to 128 and blocks of 64");
#endif

struct Params {
    const Item* items;
    const i32* heads;    // [K + 1] where KV heads' items start
    const i64* starts;   // [K·blocks + 1] where lists start
    const i32* queries;  // the lists
    const u32* places;   // [T, K, S] where a query stands in the list of each of its blocks
    const Real* q;       // [T, H, D]
    const Real* d_out;   // [T, H, V]
    const Real* gate;    // [T, H, 3], or null: 1
    const float* lse;    // [T, H], natural log
    const float* delta;  // [T, H]: gate · dOut·O of the branch
    Real* dk;            // [T, K, D]
    Real* dv;            // [T, K, V]
    float* sums;         // [slots, SB/64, 64, D + V]
    Real* shares;        // [entries of the lists of KV heads first_head.., G, D]: each one's share of dQ / scale
    Real* dq;            // [T, H, D]
    float* dq_sum;       // [T, H, D] where branches add up before the last one rounds into dq; or null: in dq
    const u32* not_finite;  // see `attend.cu`
    int tokens, query_heads, kv_heads, gate_index;
    int first_head, end_head, blocks, listed;  // KV heads [first_head, end_head) in this launch
    int first, last;     // whether this branch is the first, the last, that adds to dQ
    float scale;
};

struct Shared {
    u8 k[KEYS * DP * 2];
    u8 v[KEYS * VP * 2];
    u8 q[STAGES][Q_BYTES];
    u8 o[STAGES][O_BYTES];
    float lse[STAGES][COLUMNS], gate[STAGES][COLUMNS], delta[STAGES][COLUMNS];  // lse in base 2
    int last[STAGES][COLUMNS];  // the last key of the tile that the column sees
#ifdef WITH_QUERIES
    u8 ds[2][KEYS * COLUMNS * 2];  // dSᵀ of each warpgroup
    Real* shares;                  // the item's, and its entries: registers are short in the loop
    int count, spare;
#endif
    u64 keys_full, full[STAGES], empty[STAGES];
    Issued issued;  // steps
};

DEVICE void copy_16(void* target, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
                 "r"(bytes)
                 : "memory");
}

// What one item's walk needs.
struct Walk {
    const i32* list;
    int count, steps, head, position, origin;
};

// One warp: gathers by TMA; rows of queries that the last step lacks come from beyond the tensor, as zeros.
DEVICE void gather_boxes(Shared& s, const TensorMap* q, const TensorMap* o, const Params& a, const Walk& w) {
    int lane = threadIdx.x & 31, slot = lane % QUERIES;
    auto fetch = [&](int i) {
        int n = i * QUERIES + slot;
        return n < w.count ? w.list[n] : a.tokens;
    };
    int coming[AHEAD], stage = 0;
    u32 parity = 1;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) coming[i] = fetch(i);
    for (int group = 0; group < w.steps; group += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (group + i >= w.steps) break;
            int token = coming[i];
            coming[i] = fetch(group + i + AHEAD);
            barrier_wait(&s.empty[stage], parity);
            if (lane == 0) {
                barrier_expect(&s.full[stage], QUERIES * G * (DP + VP) * 2);
                s.issued.publish(group + i + 1);
            }
            __syncwarp();
#pragma unroll
            for (int p = lane / QUERIES; p < PANELS; p += 32 / QUERIES) {
                bool is_q = p < DP / PANEL;
                int c = is_q ? p : p - DP / PANEL;
                u8* to = (is_q ? s.q[stage] : s.o[stage]) + c * COLUMNS * 128 + slot * GP * 128;
                tma_load(to, is_q ? q : o, &s.full[stage], c * PANEL, w.head, token);
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// Two warps, 32 rows each: gathers by 16-byte copies; what no query or head fills becomes zeros.
DEVICE void gather_rows(Shared& s, const Params& a, const Walk& w, int half) {
    static constexpr int LAG = STAGES < 3 ? 1 : 2;
    int lane = threadIdx.x & 31, chunk = lane % 8;
    int stage = 0, done = 0;
    u32 parity = 1;
    auto finish = [&] {
        fence_proxy_async();
        barrier_arrive(&s.full[done]);
        if (++done == STAGES) done = 0;
    };
    for (int i = 0; i < w.steps; i++) {
        barrier_wait(&s.empty[stage], parity);
        if (half == 0 && lane == 0) s.issued.publish(i + 1);
#pragma unroll 2
        for (int r = 0; r < 8; r++) {
            int row = half * 32 + 4 * r + lane / 8, n = i * QUERIES + row / GP;
            bool here = n < w.count && row % GP < G;
            i64 place = here ? (i64)w.list[n] * a.query_heads + w.head + row % GP : 0;
            int offset = row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
            for (int p = 0; p < DP / PANEL; p++) {
                int column = p * PANEL + chunk * 8;
                bool in = here && column < D;
                copy_16(s.q[stage] + p * COLUMNS * 128 + offset, a.q + (in ? place * D + column : 0), in ? 16 : 0);
            }
#pragma unroll
            for (int p = 0; p < VP / PANEL; p++) {
                int column = p * PANEL + chunk * 8;
                bool in = here && column < V;
                copy_16(s.o[stage] + p * COLUMNS * 128 + offset, a.d_out + (in ? place * V + column : 0), in ? 16 : 0);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (i >= LAG) {
            asm volatile("cp.async.wait_group %0;" ::"n"(LAG) : "memory");
            finish();
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    for (int i = min(w.steps, LAG); i > 0; i--) finish();
}

// Two warps, 32 columns each: what softmax needs of every column.
DEVICE void gather_columns(Shared& s, const Params& a, const Walk& w, int half) {
    int column = half * 32 + (threadIdx.x & 31), slot = column / GP, head = column % GP;
    int coming[AHEAD], stage = 0;
    u32 parity = 1;
    auto fetch = [&](int i) {
        int n = i * QUERIES + slot;
        return n < w.count && head < G ? w.list[n] : -1;
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) coming[i] = fetch(i);
    for (int group = 0; group < w.steps; group += AHEAD) {
        float lse[AHEAD], gate[AHEAD], delta[AHEAD];
        int last[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int token = coming[i];
            lse[i] = -INF, gate[i] = 0.0f, delta[i] = 0.0f, last[i] = -1;
            coming[i] = fetch(group + i + AHEAD);
            if (token < 0) continue;
            i64 row = (i64)token * a.query_heads + w.head + head;
            lse[i] = a.lse[row];
            delta[i] = a.delta[row];
            gate[i] = a.gate != nullptr ? widen(a.gate[row * 3 + a.gate_index]) : 1.0f;
            last[i] = token - w.origin - w.position;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (group + i >= w.steps) break;
            // What gP·(dP − δ) wants is dOut·O.
            delta[i] = gate[i] == 0.0f ? 0.0f : delta[i] / gate[i];
            barrier_wait(&s.empty[stage], parity);
            // A row that saw nothing weighs nothing.
            s.lse[stage][column] = lse[i] == -INF ? INF : lse[i] * 1.4426950408889634f;
            s.gate[stage][column] = gate[i];
            s.delta[stage][column] = delta[i];
            s.last[stage][column] = last[i];
            barrier_arrive(&s.full[stage]);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// Writes the thread's two rows of a 64×N sum: rounded to `out` or as it is to `sums`.
template <int N>
DEVICE void write_sums(const float (&d)[N / 2], float factor, int row, int rows, Real* out, i64 step, float* sums) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int at = row + 8 * r;
        if (sums == nullptr) {
            store_row<N>(d, r, factor, out + at * step, at < rows, false);
            continue;
        }
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            float2 pair = make_float2(d[4 * j + 2 * r], d[4 * j + 2 * r + 1]);
            *(float2*)(sums + at * (D + V) + 8 * j + 2 * (lane & 3)) = pair;
        }
    }
}

template <bool DO_K, bool DO_V>
DEVICE void consume(Shared& s, const Params& a, int steps, int from, int by) {
    int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    float dk[DO_K ? D / 2 : 1], dv[DO_V ? V / 2 : 1];
    clear(dk);
    clear(dv);
    u32 issued = 0;
    float scale_log2 = a.scale * 1.4426950408889634f;
    barrier_wait(&s.keys_full, 0);
    for (int i = from; i < steps; i += by) {
        int stage = i % STAGES;
        float scores[COLUMNS / 2], d_p[DO_K ? COLUMNS / 2 : 1];
        if (by > 1) s.issued.wait(i, issued);
        barrier_wait(&s.full[stage], i / STAGES & 1);
        multiply_rows<COLUMNS, D, KEYS * 128, COLUMNS * 128>(scores, descriptor_rows(s.k), descriptor_rows(s.q[stage]));
        if constexpr (DO_K) {
            multiply_rows<COLUMNS, V, KEYS * 128, COLUMNS * 128>(d_p, descriptor_rows(s.v), descriptor_rows(s.o[stage]));
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        wgmma_hold(scores);
        // Queries ascend, so the first one sees least.
        bool partly = s.last[stage][0] < KEYS - 1;
        u32 p[COLUMNS / 4];
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            int column = 8 * j + 2 * (lane & 3);
            float2 lse = *(const float2*)&s.lse[stage][column], gate = *(const float2*)&s.gate[stage][column];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float& x = scores[4 * j + 2 * r];
                float& y = scores[4 * j + 2 * r + 1];
                x = gate.x * exp2_approx(fmaf(x, scale_log2, -lse.x));
                y = gate.y * exp2_approx(fmaf(y, scale_log2, -lse.y));
            }
            if (partly) {
                int2 last = *(const int2*)&s.last[stage][column];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (row + 8 * r > last.x) scores[4 * j + 2 * r] = 0.0f;
                    if (row + 8 * r > last.y) scores[4 * j + 2 * r + 1] = 0.0f;
                }
            }
            p[2 * j] = pack<Real>(scores[4 * j], scores[4 * j + 1]);
            p[2 * j + 1] = pack<Real>(scores[4 * j + 2], scores[4 * j + 3]);
        }
#ifdef WITH_QUERIES
        add_product<V, COLUMNS>(dv, p, descriptor_columns(s.o[stage], COLUMNS * 128));
        wgmma_wait<1>();
        wgmma_hold(d_p);
        // dS goes through shared memory: its columns are the rows of dQ.
        u8* own = s.ds[from];
        named_sync(2 + from, 128);  // all warps have read the last step's
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            float2 delta = *(const float2*)&s.delta[stage][8 * j + 2 * (lane & 3)];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float2 x = unpack<Real>(p[2 * j + r]);
                int at = row + 8 * r;
                *(u32*)(own + at * 128 + ((j ^ (at & 7)) << 4) + (lane & 3) * 4) =
                    pack<Real>(x.x * (d_p[4 * j + 2 * r] - delta.x), x.y * (d_p[4 * j + 2 * r + 1] - delta.y));
            }
        }
        fence_proxy_async();
        wgmma_wait<0>();
        wgmma_hold(dv);
        named_sync(2 + from, 128);
        float dq[D / 2];
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++)
            Wgmma<D>::template ss<0, 1>(dk, descriptor_step(descriptor_rows(own), n * 32),
                                        descriptor_step(descriptor_columns(s.q[stage], COLUMNS * 128), n * 2048), 1);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++)
            Wgmma<D>::template ss<1, 1>(dq, descriptor_step(descriptor_columns(own, KEYS * 128), n * 2048),
                                        descriptor_step(descriptor_columns(s.k, KEYS * 128), n * 2048), n > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(dk);
        wgmma_hold(dq);
        if (lane == 0) barrier_arrive(&s.empty[stage]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = row + 8 * r, n = i * QUERIES + at / GP, line = G == GP ? i * COLUMNS + at : n * G + at % GP;
            store_row<D, SHARES_ONCE>(dq, r, 1.0f, s.shares + (i64)line * D, n < s.count && at % GP < G, false);
        }
#else
        u32 ds[DO_K ? COLUMNS / 4 : 1];
        if constexpr (DO_K) {
            wgmma_wait<0>();
            wgmma_hold(d_p);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++) {
                float2 delta = *(const float2*)&s.delta[stage][8 * j + 2 * (lane & 3)];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float2 x = unpack<Real>(p[2 * j + r]);
                    ds[2 * j + r] = pack<Real>(x.x * (d_p[4 * j + 2 * r] - delta.x), x.y * (d_p[4 * j + 2 * r + 1] - delta.y));
                }
            }
        }
        if constexpr (DO_V) add_product<V, COLUMNS>(dv, p, descriptor_columns(s.o[stage], COLUMNS * 128));
        if constexpr (DO_K) add_product<D, COLUMNS>(dk, ds, descriptor_columns(s.q[stage], COLUMNS * 128));
        wgmma_wait<0>();
        if constexpr (DO_V) wgmma_hold(dv);
        if constexpr (DO_K) wgmma_hold(dk);
        if (lane == 0) barrier_arrive(&s.empty[stage]);
#endif
    }

    if constexpr (DO_K && DO_V) {
        // Warpgroup 0 finishes dK and warpgroup 1 dV; what each gives the other passes through the stages.
        float* mail = (float*)s.q;
        named_sync(1, 256);
        if (from == 0) {
#pragma unroll
            for (int i = 0; i < V / 2; i++) mail[i * 128 + thread] = dv[i];
        } else {
#pragma unroll
            for (int i = 0; i < D / 2; i++) mail[(V / 2 + i) * 128 + thread] = dk[i];
        }
        named_sync(1, 256);
        if (from == 0) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) dk[i] += mail[(V / 2 + i) * 128 + thread];
        } else {
#pragma unroll
            for (int i = 0; i < V / 2; i++) dv[i] = mail[i * 128 + thread] + dv[i];
        }
    }
    // Read again, not kept: registers are short in the loop.
    Item item = a.items[a.heads[a.first_head] + blockIdx.x / PARTS];
    int part = blockIdx.x % PARTS, rows = item.keys - part * KEYS;
    i64 place = (i64)(item.key + part * KEYS) * a.kv_heads + item.kv_head;
    float* sums = item.slot < 0 ? nullptr : a.sums + ((i64)item.slot * PARTS + part) * KEYS * (D + V);
    if (DO_K && (!DO_V || from == 0)) {
        if constexpr (DO_K) write_sums<D>(dk, a.scale, row, rows, a.dk + place * D, (i64)a.kv_heads * D, sums);
    } else {
        if constexpr (DO_V)
            write_sums<V>(dv, 1.0f, row, rows, a.dv + place * V, (i64)a.kv_heads * V, sums == nullptr ? nullptr : sums + D);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    selected_backward_keys(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap o,
                           const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                           const __grid_constant__ Params a) {
    if (*a.not_finite) return;
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    int number = a.heads[a.first_head] + blockIdx.x / PARTS;
    if (number >= a.heads[a.end_head]) return;
    Item item = a.items[number];
    int part = blockIdx.x % PARTS, key = item.key + part * KEYS;
    if (item.keys <= part * KEYS) return;
    Walk w;
    w.list = a.queries + item.first;
    w.count = item.count;
    w.steps = (item.count + QUERIES - 1) / QUERIES;
    w.head = item.kv_head * G;
    w.position = item.position + part * KEYS;
    w.origin = item.origin;

    if (threadIdx.x == 0) {
        barrier_init(&s.keys_full, 1);
        s.issued.count = 0;
#ifdef WITH_QUERIES
        s.shares = a.shares + (item.first - a.starts[(i64)a.first_head * a.blocks]) * (G * D);
        s.count = item.count;
#endif
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], BY_TMA ? 1 + 64 : 64 + 64);
            barrier_init(&s.empty[i], SPLIT ? 8 : 4);
        }
        barrier_fence_init();
    }
    if (BY_TMA && G < GP) {
        // Rows of heads that the group lacks are never written: they must not hold a NaN.
        for (int i = threadIdx.x; i < (int)sizeof(s.q) / 16; i += 384) ((Vec<u32, 4>*)s.q)[i] = {};
        for (int i = threadIdx.x; i < (int)sizeof(s.o) / 16; i += 384) ((Vec<u32, 4>*)s.o)[i] = {};
        fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<56>();
        int warp = threadIdx.x / 32;
        if (threadIdx.x == 0) {
            barrier_expect(&s.keys_full, KEYS * (DP + VP) * 2);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.k + c * KEYS * 128, &k, &s.keys_full, c * PANEL, item.kv_head, key);
#pragma unroll
            for (int c = 0; c < VP / PANEL; c++)
                tma_load(s.v + c * KEYS * 128, &v, &s.keys_full, c * PANEL, item.kv_head, key);
        }
        __syncwarp();
        if (warp == 1 || warp == 2) {
            gather_columns(s, a, w, warp - 1);
        } else if (BY_TMA) {
            if (warp == 0) gather_boxes(s, &q, &o, a, w);
        } else {
            gather_rows(s, a, w, warp / 3);
        }
    } else {
        registers_grow<224>();
        int warpgroup = threadIdx.x / 128 - 1;
        if constexpr (SPLIT) {
            if (warpgroup == 0) consume<false, true>(s, a, w.steps, 0, 1);
            else consume<true, false>(s, a, w.steps, 0, 1);
        } else {
            consume<true, true>(s, a, w.steps, warpgroup, 2);
        }
    }
}

// Grid as above. Block: whole warps. Adds the sums of blocks that have several items.
KERNEL __launch_bounds__(256) selected_backward_keys_sum(const Params a) {
    if (*a.not_finite) return;
    int number = a.heads[a.first_head] + blockIdx.x / PARTS;
    if (number >= a.heads[a.end_head]) return;
    Item item = a.items[number];
    int part = blockIdx.x % PARTS, key = item.key + part * KEYS, rows = min(KEYS, item.keys - part * KEYS);
    if (rows <= 0 || item.slot < 0 || item.run != 0) return;
    i64 step = (i64)PARTS * KEYS * (D + V);
    const float* sums = a.sums + item.slot * step + (i64)part * KEYS * (D + V);
    for (int i = threadIdx.x; i < rows * (D + V); i += blockDim.x) {
        int row = i / (D + V), column = i % (D + V);
        float total = 0.0f;
        for (int slot = 0; slot < item.slots; slot++) total += sums[slot * step + i];
        i64 place = (i64)(key + row) * a.kv_heads + item.kv_head;
        if (column < D) a.dk[place * D + column] = narrow<Real>(total * a.scale);
        else a.dv[place * V + column - D] = narrow<Real>(total);
    }
}

// dQ of a query and the heads of a KV head: what its blocks' shares add up to, in the list's order. Grid:
// T · KV heads of the launch. Block: G·D/8 threads, rounded up to warps.
KERNEL selected_backward_queries_sum(const Params a) {
    if (*a.not_finite) return;
    int heads = a.end_head - a.first_head, kv_head = a.first_head + blockIdx.x % heads, chunk = threadIdx.x;
    i64 token = blockIdx.x / heads;
    if (chunk >= G * D / 8) return;
    const u32* places = a.places + (token * a.kv_heads + kv_head) * a.listed;
    const Real* shares = a.shares + (a.starts[(i64)kv_head * a.blocks] - a.starts[(i64)a.first_head * a.blocks]) * (G * D) + chunk * 8;
    float total[8] = {};
#pragma unroll 8
    for (int i = 0; i < a.listed; i++) {
        u32 place = places[i];
        if (place == 0xffffffffu) continue;
        auto share = *(const Vec<Real, 8>*)(shares + (i64)place * (G * D));
#pragma unroll
        for (int c = 0; c < 8; c++) total[c] += widen(share.at[c]);
    }
    i64 to = (token * a.query_heads + (i64)kv_head * G) * D + chunk * 8;
    Vec<Real, 8> rounded;
    if (a.dq_sum == nullptr && !a.first) rounded = *(const Vec<Real, 8>*)(a.dq + to);
    auto* sum = (Vec<float, 4>*)(a.dq_sum + to);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Vec<float, 4> before = {};
        if (a.dq_sum != nullptr && !a.first) before = sum[half];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int at = 4 * half + c;
            float x = total[at] * a.scale;
            if (!a.first) x += a.dq_sum != nullptr ? before.at[c] : widen(rounded.at[at]);
            before.at[c] = x;
            rounded.at[at] = narrow<Real>(x);
        }
        if (a.dq_sum != nullptr && !a.last) sum[half] = before;
    }
    if (a.dq_sum == nullptr || a.last) *(Vec<Real, 8>*)(a.dq + to) = rounded;
}
