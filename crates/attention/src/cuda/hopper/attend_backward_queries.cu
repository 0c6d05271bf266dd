// dQ of one branch: a block takes tiles of 128 queries of one head, one after another, and walks the
// keys they see from the last to the first. Two warpgroups of 64 queries each compute S = Q·Kᵀ and
// dP = dOut·Vᵀ, dS in registers, and dQ += dS·K. The next tile's S is issued before this one's dQ,
// which runs, with the next dP, under the next exponentials.
//
// dQ of several branches ends in one buffer: launches follow each other in a fixed order and all but
// the first add to what is there. That rounds once a branch, as adding separate gradients would, and
// needs no f32 buffer of q's shape.
//
// Constants: see backward.cuh, BN (keys a tile), STAGES. Grid: any number of blocks,
// best one a multiprocessor. Block: 384 threads.
#include "backward.cuh"

static constexpr int BM = 128, CONSUMERS = 2;
// Wide heads have no registers for the last dS and the exponentials at once.
static constexpr int PENDING = D > 192 ? 1 : 2;
static constexpr int Q_BYTES = BM * DP * 2, O_BYTES = BM * VP * 2, K_BYTES = BN * DP * 2, V_BYTES = BN * VP * 2;

// Queries `token..token+rows` at positions `position..` of a sequence whose keys start at row `key`.
struct Tile {
    int token, rows, position, key;
};

struct Params {
    const Tile* tiles;  // by position, ascending
    int tile_count, heads, group, kv_heads;
    float scale_log2, scale;
    Visible visible;
    const float* rows;  // [H, 3, pitch]: log-sum-exp (base 2), gate, δ
    int pitch;
    int add;   // to what dq holds
    Real* dq;  // [T, H, D]
};

struct Shared {
    u8 q[Q_BYTES];
    u8 o[O_BYTES];  // dOut
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// A ring of stages and the parity of the pass through it.
struct Ring {
    int stage = 0;
    u32 parity = 0;
    DEVICE void step() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// The block's n-th tile of queries.
struct Work {
    Tile tile;
    int head, kv_head, first, count;  // `count` tiles of keys from `first`

    // Longest first within a key-value head, the heads of a group together; every other round
    // backwards, so that no block always gets the longest. False when there is none left.
    DEVICE bool find(const Params& a, int n) {
        i64 at = (i64)n * gridDim.x + (n & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (at >= (i64)a.tile_count * a.heads) return false;
        int g = (int)(at % a.group), rest = (int)(at / a.group);
        tile = a.tiles[a.tile_count - 1 - rest % a.tile_count];
        kv_head = rest / a.tile_count;
        head = kv_head * a.group + g;
        first = first_key(a.visible, tile.position);
        count = (last_key(a.visible, tile.position + tile.rows - 1) - first + BN - 1) / BN;
        return true;
    }
};

DEVICE void produce(Shared& s, const TensorMap* q, const TensorMap* o, const TensorMap* k, const TensorMap* v,
                    const Params& a) {
    Ring keys, values;
    Work w;
    // The last rounds may leave some blocks one tile short: work ends at the first round without.
    for (int n = 0; w.find(a, n); n++) {
        barrier_wait(&s.q_empty, (n & 1) ^ 1);
        barrier_expect(&s.q_full, Q_BYTES + O_BYTES);
#pragma unroll
        for (int c = 0; c < DP / PANEL; c++)
            tma_load(s.q + c * BM * 128, q, &s.q_full, c * PANEL, w.head, w.tile.token);
#pragma unroll
        for (int c = 0; c < VP / PANEL; c++)
            tma_load(s.o + c * BM * 128, o, &s.q_full, c * PANEL, w.head, w.tile.token);
        for (int i = w.count - 1; i >= 0; i--) {
            int row = w.tile.key + w.first + i * BN;
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

DEVICE void consume(Shared& s, const Params& a) {
    int warpgroup = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
    int row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8
    bool leader = lane == 0;
    u64 q = descriptor_rows(s.q + warpgroup * 64 * 128), o = descriptor_rows(s.o + warpgroup * 64 * 128);
    Ring keys, values;
    Work w;
    for (int n = 0; w.find(a, n); n++) {
        float dq[D / 2], scores[BN / 2], dp[BN / 2], lse[2], delta[2];
        u32 ds[BN / 4];
        const float* info = a.rows + (i64)w.head * 3 * a.pitch + w.tile.token;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            bool inside = row + 8 * r < w.tile.rows;
            lse[r] = inside ? info[row + 8 * r] : INF;
            delta[r] = inside ? info[2 * a.pitch + row + 8 * r] : 0.0f;
        }
        clear(dq);
        int key = w.first + w.count * BN;
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
            int position = w.tile.position + warpgroup * 64, mine = w.tile.position + row;
            if (key < first_key(a.visible, position + 63) || key + BN > last_key(a.visible, position)) {
                int column = key + 2 * (lane & 3);
                int from[2] = {first_key(a.visible, mine) - column, first_key(a.visible, mine + 8) - column};
                int to[2] = {last_key(a.visible, mine) - column, last_key(a.visible, mine + 8) - column};
                hide<BN>(scores, from, to);
            }
#pragma unroll
            for (int i = 0; i < BN / 2; i++)
                scores[i] = exp2_approx(fmaf(scores[i], a.scale_log2, -lse[i / 2 & 1]));
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
        barrier_wait(&s.q_full, n & 1);
        if (w.count > 0) {
            begin_scores();
            begin_dp();
            wgmma_wait<1>();
            exponentials();
            settle();
            for (int i = 1; i < w.count; i++) {
                int last = keys.stage;
                keys.step();
                begin_scores();
                add_product<D, BN>(dq, ds, descriptor_columns(s.k[last], BN * 128));
                begin_dp();
                wgmma_wait<PENDING>();
                exponentials();
                settle();
                if (leader) barrier_arrive(&s.k_empty[last]);
            }
            add_product<D, BN>(dq, ds, descriptor_columns(s.k[keys.stage], BN * 128));
            wgmma_wait<0>();
            if (leader) barrier_arrive(&s.k_empty[keys.stage]);
            keys.step();
        }
        wgmma_hold(dq);
        if (leader) barrier_arrive(&s.q_empty);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int at = row + 8 * r;
            bool inside = at < w.tile.rows;
            float gate = inside ? info[a.pitch + at] : 0.0f;
            Real* to = a.dq + ((i64)(w.tile.token + at) * a.heads + w.head) * D;
            store_row<D>(dq, r, gate * a.scale, to, inside, a.add);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend_backward_queries(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap o,
                            const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                            const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    if (threadIdx.x == 0) {
        barrier_init(&s.q_full, 1);
        barrier_init(&s.q_empty, CONSUMERS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.k_empty[i], CONSUMERS * 4);
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
