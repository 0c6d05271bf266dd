// dQ of one branch: a block takes tiles of 128 queries of one head, one after another, and walks the
// keys they see from the last to the first. Two warpgroups of 64 queries each compute S = Q·Kᵀ and
// dP = dOut·Vᵀ, dS in registers, and dQ += dS·K. The next tile's S is issued before this one's dQ,
// which runs, with the next dP, under the next exponentials.
//
// dQ of several branches ends in one buffer: launches follow each other in a fixed order and all but
// the first add to what is there. That rounds once a branch, as adding separate gradients would, and
// needs no f32 buffer of q's shape; where one is given, branches add up there and the last one rounds.
//
// Constants: see backward.cuh, BN (keys a tile), Q_STAGES, K_STAGES, V_STAGES. Grid: any number of blocks,
// best one a multiprocessor. Block: 384 threads.
#include "backward.cuh"
#include "sequences.cuh"

static constexpr int BM = 128, CONSUMERS = 2;
// Wide heads have no registers for the last dS beside the exponentials: each tile is finished alone.
static constexpr bool OVERLAP = D + V <= 320;
static constexpr int Q_BYTES = BM * DP * 2, O_BYTES = BM * VP * 2, K_BYTES = BN * DP * 2, V_BYTES = BN * VP * 2;

struct Params {
    Batch batch;
    int tile_count, heads, group, kv_heads;
    float scale_log2, scale;
    Visible visible;
    const float4* rows;  // [H, T]: log-sum-exp (base 2), gate, δ, 0
    int tokens;
    int first, last;  // whether this branch is the first, the last, that adds to dQ
    Real* dq;         // [T, H, D]
    float* sum;       // [T, H, D], or null
    const u32* not_finite;  // a flag that says: do nothing; or null
};

struct Shared {
    u8 q[Q_STAGES][Q_BYTES];
    u8 o[Q_STAGES][O_BYTES];  // dOut
    u8 k[K_STAGES][K_BYTES];
    u8 v[V_STAGES][V_BYTES];
    u64 q_full[Q_STAGES], q_empty[Q_STAGES], k_full[K_STAGES], k_empty[K_STAGES], v_full[V_STAGES], v_empty[V_STAGES];
};

// A ring of stages and the parity of the pass through it.
template <int STAGES>
struct Ring {
    int stage = 0;
    u32 parity = 0;
    DEVICE void step() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Tiles of queries that fall to a block, round by round.
struct Work {
    Tile tile;
    int head, kv_head, first, count;  // `count` tiles of keys from `first`
    int round = 0;

    // The next one. Longest first within a key-value head, the heads of a group together; every other
    // round backwards, so that no block always gets the longest. False when there is none left.
    DEVICE bool next(const Params& a) {
        for (;; round++) {
            i64 at = (i64)round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
            if (at >= (i64)a.tile_count * a.heads) return false;
            int g = (int)(at % a.group), rest = (int)(at / a.group);
            tile = find_tile<BM>(a.batch, a.tile_count - 1 - rest % a.tile_count);
            if (tile.rows == 0) continue;
            kv_head = rest / a.tile_count;
            head = kv_head * a.group + g;
            first = first_key(a.visible, tile.position);
            count = (last_key(a.visible, tile.position + tile.rows - 1) - first + BN - 1) / BN;
            round++;
            return true;
        }
    }
    // Says that all lanes have the same, which saves registers; for whole warps.
    DEVICE void settle() {
        tile.token = uniform(tile.token), tile.rows = uniform(tile.rows), tile.position = uniform(tile.position);
        head = uniform(head), first = uniform(first), count = uniform(count), round = uniform(round);
    }
};

DEVICE void produce(Shared& s, const TensorMap* q, const TensorMap* o, const TensorMap* k, const TensorMap* v,
                    const Params& a) {
    Ring<Q_STAGES> queries;
    Ring<K_STAGES> keys;
    Ring<V_STAGES> values;
    for (Work w; w.next(a); queries.step()) {
        u64* full = &s.q_full[queries.stage];
        barrier_wait(&s.q_empty[queries.stage], queries.parity ^ 1);
        barrier_expect(full, Q_BYTES + O_BYTES);
#pragma unroll
        for (int c = 0; c < DP / PANEL; c++)
            tma_load(s.q[queries.stage] + c * BM * 128, q, full, c * PANEL, w.head, w.tile.token);
#pragma unroll
        for (int c = 0; c < VP / PANEL; c++)
            tma_load(s.o[queries.stage] + c * BM * 128, o, full, c * PANEL, w.head, w.tile.token);
        for (int i = w.count - 1; i >= 0; i--) {
            int row = (MASK == COMPRESSED ? w.tile.block : w.tile.key) + w.first + i * BN;
            barrier_wait(&s.k_empty[keys.stage], keys.parity ^ 1);
            barrier_expect(&s.k_full[keys.stage], K_BYTES);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.k[keys.stage] + c * BN * 128, k, &s.k_full[keys.stage], c * PANEL, w.kv_head, row);
            keys.step();
            barrier_wait(&s.v_empty[values.stage], values.parity ^ 1);
            barrier_expect(&s.v_full[values.stage], V_BYTES);
#pragma unroll
            for (int c = 0; c < VP / PANEL; c++)
                tma_load(s.v[values.stage] + c * BN * 128, v, &s.v_full[values.stage], c * PANEL, w.kv_head, row);
            values.step();
        }
    }
}

// dQ by way of its f32 sum; `place` is a thread's first column.
DEVICE void store_sums(const Params& a, const float (&dq)[D / 2], const float (&factor)[2], i64 place, i64 pitch,
                       const bool (&inside)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++, place += 8 * pitch) {
        if (!inside[r]) continue;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float2* sum = (float2*)(a.sum + place + 8 * j);
            float2 x = make_float2(dq[4 * j + 2 * r] * factor[r], dq[4 * j + 2 * r + 1] * factor[r]);
            if (!a.first) x.x += sum->x, x.y += sum->y;
            if (a.last) *(u32*)(a.dq + place + 8 * j) = pack<Real>(x.x, x.y);
            else *sum = x;
        }
    }
}

DEVICE void consume(Shared& s, const Params& a) {
    int warpgroup = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
    int row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8
    bool leader = lane == 0;
    Ring<Q_STAGES> queries;
    Ring<K_STAGES> keys;
    Ring<V_STAGES> values;
    // Tiles that the warpgroup sees nothing of.
    auto pass = [&](int tiles) {
        for (; tiles > 0; tiles--) {
            barrier_wait(&s.k_full[keys.stage], keys.parity);
            barrier_wait(&s.v_full[values.stage], values.parity);
            if (leader) barrier_arrive(&s.k_empty[keys.stage]), barrier_arrive(&s.v_empty[values.stage]);
            keys.step();
            values.step();
        }
    };
    for (Work w; w.next(a); queries.step()) {
        w.settle();
        u64 q = descriptor_rows(s.q[queries.stage] + warpgroup * 64 * 128);
        u64 o = descriptor_rows(s.o[queries.stage] + warpgroup * 64 * 128);
        float dq[D / 2], scores[BN / 2], dp[BN / 2], lse[2], delta[2];
        u32 ds[BN / 4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bool inside = row + 8 * r < w.tile.rows;
            float4 info = make_float4(INF, 0.0f, 0.0f, 0.0f);
            if (inside) info = a.rows[(i64)w.head * a.tokens + w.tile.token + row + 8 * r];
            lse[r] = info.x, delta[r] = info.z;
        }
        clear(dq);
        int position = w.tile.position + warpgroup * 64;
        // Keys that all queries of the warpgroup see, and where the thread's own end.
        int whole_from = uniform(first_key(a.visible, position + 63)), whole_to = uniform(last_key(a.visible, position));
        int last[2];
#pragma unroll
        for (int r = 0; r < 2; r++) last[r] = last_key(a.visible, w.tile.position + row + 8 * r);
        // Tiles before `before` and from `after` on are not for the warpgroup.
        int after = min(w.count, (uniform(last_key(a.visible, position + 63)) - w.first + BN - 1) / BN);
        int before = min(after, (uniform(first_key(a.visible, position)) - w.first) / BN);
        if (warpgroup * 64 >= w.tile.rows) before = after = 0;
        int count = after - before, key = w.first + after * BN;
        auto begin_scores = [&] {
            barrier_wait(&s.k_full[keys.stage], keys.parity);
            multiply_rows<BN, D, BM * 128, BN * 128>(scores, q, descriptor_rows(s.k[keys.stage]));
        };
        auto begin_dp = [&] {
            barrier_wait(&s.v_full[values.stage], values.parity);
            multiply_rows<BN, V, BM * 128, BN * 128>(dp, o, descriptor_rows(s.v[values.stage]));
        };
        auto exponentials = [&] {
            wgmma_hold(scores);
            key -= BN;
            if (key < whole_from || key + BN > whole_to) {
                int column = key + 2 * (lane & 3), mine = w.tile.position + row;
                int from[2] = {first_key(a.visible, mine) - column, first_key(a.visible, mine + 8) - column};
                int to[2] = {last[0] - column, last[1] - column};
                hide<BN>(scores, from, to);
            }
#pragma unroll
            for (int i = 0; i < BN / 2; i++)
                scores[i] = exp2_approx(fmaf(scores[i], a.scale_log2, -lse[i / 2 & 1]));
            wgmma_hold(scores);  // now, not after the wait that follows
        };
        auto settle = [&] {
            wgmma_wait<0>();
            wgmma_hold(dp);
            if (leader) barrier_arrive(&s.v_empty[values.stage]);
            values.step();
#pragma unroll
            for (int i = 0; i < BN / 4; i++) {
                float at = delta[i & 1];
                ds[i] = pack<Real>(scores[2 * i] * (dp[2 * i] - at), scores[2 * i + 1] * (dp[2 * i + 1] - at));
            }
        };
        barrier_wait(&s.q_full[queries.stage], queries.parity);
        pass(w.count - after);
        if (OVERLAP && count > 0) {
            begin_scores();
            begin_dp();
            wgmma_wait<1>();
            exponentials();
            settle();
            for (int i = 1; i < count; i++) {
                int last_stage = keys.stage;
                keys.step();
                begin_scores();
                add_product<D, BN>(dq, ds, descriptor_columns(s.k[last_stage], BN * 128));
                begin_dp();
                wgmma_wait<2>();
                exponentials();
                settle();
                if (leader) barrier_arrive(&s.k_empty[last_stage]);
            }
            add_product<D, BN>(dq, ds, descriptor_columns(s.k[keys.stage], BN * 128));
            wgmma_wait<0>();
            if (leader) barrier_arrive(&s.k_empty[keys.stage]);
            keys.step();
        }
        for (int i = 0; !OVERLAP && i < count; i++) {
            begin_scores();
            begin_dp();
            wgmma_wait<1>();
            exponentials();
            settle();
            add_product<D, BN>(dq, ds, descriptor_columns(s.k[keys.stage], BN * 128));
            wgmma_wait<0>();
            if (leader) barrier_arrive(&s.k_empty[keys.stage]);
            keys.step();
        }
        wgmma_hold(dq);
        if (leader) barrier_arrive(&s.q_empty[queries.stage]);
        pass(before);
        float factor[2] = {0.0f, 0.0f};
        bool inside[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            inside[r] = row + 8 * r < w.tile.rows;
            if (inside[r]) factor[r] = a.scale * a.rows[(i64)w.head * a.tokens + w.tile.token + row + 8 * r].y;
        }
        i64 pitch = (i64)a.heads * D, place = (w.tile.token + row) * pitch + w.head * D;
        if (a.sum == nullptr) {
            Real* to[2] = {a.dq + place, a.dq + place + 8 * pitch};
            store_rows<D>(dq, factor, to, inside, !a.first);
        } else {
            store_sums(a, dq, factor, place + 2 * (lane & 3), pitch, inside);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend_backward_queries(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap o,
                            const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                            const __grid_constant__ Params a) {
    if (a.not_finite != nullptr && *a.not_finite) return;
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Q_STAGES; i++) {
            barrier_init(&s.q_full[i], 1);
            barrier_init(&s.q_empty[i], CONSUMERS * 4);
        }
        for (int i = 0; i < K_STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.k_empty[i], CONSUMERS * 4);
        }
        for (int i = 0; i < V_STAGES; i++) {
            barrier_init(&s.v_full[i], 1);
            barrier_init(&s.v_empty[i], CONSUMERS * 4);
        }
        barrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<24>();
        if (threadIdx.x == 0) produce(s, &q, &o, &k, &v, a);
    } else {
        registers_grow<240>();
        consume(s, a);
    }
}
