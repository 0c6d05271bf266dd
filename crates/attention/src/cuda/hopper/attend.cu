// Attention of one head over contiguous keys, masked: dense causal, compressed or window.
//
// FlashAttention-3's shape (arXiv 2407.08608): one producer warp feeds K and V tiles through TMA;
// two consumer warpgroups of 64 queries each compute S = q·kᵀ by wgmma, the online softmax in
// registers, and O += P·v with P kept in registers. A warpgroup starts S of the next tile before
// O of this one, and the two warpgroups take turns at the tensor cores. Blocks stay: each walks its
// share of the work, so that one item's loads and output hide behind the products of another.
//
// Constants: D, V (head dims, multiples of 8, at most 256), BN (keys a tile), MASK (0 causal,
// 1 compressed, 2 window). Grid: as many blocks as multiprocessors; items are (KV head,
// tile, head of the group), the heads of a group neighbours, so that they share K and V in L2. Block:
// 384 threads.
#include "products.cuh"
#include "sequences.cuh"

static constexpr int BM = 128, STAGES = 2, CONSUMERS = 2;
static constexpr int DP = (D + 63) / 64 * 64, VP = (V + 63) / 64 * 64;
static constexpr int K_BYTES = BN * DP * 2, V_BYTES = BN * VP * 2;
static constexpr int Q_BYTES = BM * DP * 2;
static constexpr int OUT_PITCH = V * 2 + 16;  // bytes of a staged row, padded against bank conflicts
static constexpr int COMPRESSED = 1, WINDOW = 2;  // 0 is causal

struct Params {
    Batch batch;
    // Set where a value is not finite. A hidden key weighs nothing here, but nothing times NaN is NaN:
    // then the work is the plain kernel's.
    const u32* not_finite;
    Real* branch;      // [T, H, V] this branch's output, or null
    Real* out;         // [T, H, V] gated output, or null
    const Real* gate;  // [T, H, 3]
    float* lse;        // [T, H] natural log, or null
    int tile_count, heads, group;
    int window;         // w
    int block, stride;  // l, d
    int gate_index;
    int accumulate;    // add to `out`
    float scale_log2;  // softmax scale · log2(e)
};

struct Shared {
    u8 q[Q_BYTES];
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u8 out[BM][OUT_PITCH];
    u64 q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Keys [first_key, last_key) are visible to position p.
DEVICE int last_key(const Params& a, int p) {
    if (MASK == COMPRESSED) return p + 1 < a.block ? 0 : (p + 1 - a.block) / a.stride + 1;
    return p + 1;
}
DEVICE int first_key(const Params& a, int p) {
    return MASK == WINDOW ? max(0, p - a.window + 1) : 0;
}

// One piece of work: a tile of queries of one head and the keys it walks, last ones first.
struct Item {
    Tile tile;
    int head, kv_head, first, count;

    // Longest tiles first.
    DEVICE Item(const Params& a, int i) {
        kv_head = i / a.group / a.tile_count;
        head = kv_head * a.group + i % a.group;
        tile = find_tile<BM>(a.batch, a.tile_count - 1 - i / a.group % a.tile_count);
        first = first_key(a, tile.position);
        count = tile.rows == 0 ? 0 : (last_key(a, tile.position + tile.rows - 1) - first + BN - 1) / BN;
    }
};

DEVICE void produce(Shared& s, const TensorMap* q, const TensorMap* k, const TensorMap* v, const Params& a) {
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < a.tile_count * a.heads; i += gridDim.x, round++) {
        Item item(a, i);
        barrier_wait(&s.q_empty, round & 1 ^ 1);
        barrier_expect(&s.q_full, BM * DP * 2);
#pragma unroll
        for (int c = 0; c < DP / PANEL; c++)
            tma_load(s.q + c * BM * 128, q, &s.q_full, c * PANEL, item.head, item.tile.token);
        for (int j = item.count - 1; j >= 0; j--, n++) {
            int stage = n % STAGES;
            int row = (MASK == COMPRESSED ? item.tile.block : item.tile.key) + item.first + j * BN;
            u32 parity = (n / STAGES & 1) ^ 1;
            barrier_wait(&s.k_empty[stage], parity);
            barrier_expect(&s.k_full[stage], K_BYTES);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.k[stage] + c * BN * 128, k, &s.k_full[stage], c * PANEL, item.kv_head, row);
            barrier_wait(&s.v_empty[stage], parity);
            barrier_expect(&s.v_full[stage], V_BYTES);
#pragma unroll
            for (int c = 0; c < VP / PANEL; c++)
                tma_load(s.v[stage] + c * BN * 128, v, &s.v_full[stage], c * PANEL, item.kv_head, row);
        }
    }
}

// O += P·v, 64×VP.
DEVICE void multiply_values(float (&out)[VP / 2], const u32 (&p)[BN / 4], const u8* v, int keep) {
    wgmma_fence();
    u64 values = descriptor_columns(v, BN * 128);
#pragma unroll
    for (int i = 0; i < BN / 16; i++)
        Wgmma<VP>::rs<1>(out, p + 4 * i, descriptor_step(values, i * 2048), i > 0 || keep);
    wgmma_commit();
}

static constexpr float HUGE = 1024.0f;

struct Softmax {
    float peak[2], sum[2];  // of the thread's two rows; sums are the thread's own columns'

    // Scores become exponentials; returns by how much what was summed before shrinks.
    DEVICE void update(float (&scores)[BN / 2], float scale_log2, float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = peak[r];
#pragma unroll
            for (int j = 0; j < BN / 8; j++)
                top = fmaxf(top, fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            // A product rounds the same here and below, so that sums of different tiles agree.
            float base = top == -INF ? 0.0f : __fmul_rn(top, scale_log2);
            shrink[r] = exp2_approx(__fmul_rn(peak[r], scale_log2) - base);
            peak[r] = top;
            if (fabsf(base) > HUGE) {  // its rounding would show: subtract first
#pragma unroll
                for (int j = 0; j < BN / 8; j++) scores[4 * j + 2 * r] -= top, scores[4 * j + 2 * r + 1] -= top;
                base = 0.0f;
            }
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& x = scores[4 * j + 2 * r + c];
                    x = exp2_approx(fmaf(x, scale_log2, -base));
                    total += x;
                }
            }
            sum[r] = sum[r] * shrink[r] + total;
        }
    }
};

DEVICE void pack_probabilities(u32 (&p)[BN / 4], const float (&scores)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 4; i++) p[i] = pack<Real>(scores[2 * i], scores[2 * i + 1]);
}

// Hides keys from `last_key` on (LATE) or before `first_key` from the thread's two rows.
template <bool LATE>
DEVICE void mask(float (&scores)[BN / 2], const Params& a, int position, int key) {
    int column = key + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int p = position + 8 * r, edge = (LATE ? last_key(a, p) : first_key(a, p)) - column;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++)
                if (LATE == (8 * j + c >= edge)) scores[4 * j + 2 * r + c] = -INF;
        }
    }
}

// One item by one warpgroup; `n` tiles have gone before.
DEVICE void attend_item(Shared& s, const Params& a, const Item& item, int round, int n) {
    const Tile& tile = item.tile;
    int count = item.count, head = item.head;
    int warpgroup = uniform(threadIdx.x / 128) - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int row = warp * 16 + lane / 4;  // and row + 8, of the warpgroup's 64
    int position = tile.position + warpgroup * 64;
    bool leader = lane == 0;

    float out[VP / 2], scores[BN / 2];
    u32 p[BN / 4];
    Softmax soft = {{-INF, -INF}, {0.0f, 0.0f}};
    float shrink[2];
#pragma unroll
    for (int i = 0; i < VP / 2; i++) out[i] = 0.0f;

    barrier_wait(&s.q_full, round & 1);
    if (count > 0) {
        u64 q = descriptor_rows(s.q + warpgroup * 64 * 128);
        // Tiles that some row of the warpgroup sees only in part.
        int whole_from = first_key(a, position + 63), whole_to = last_key(a, position);
        int key = item.first + (count - 1) * BN;
        auto trim = [&] {
            if (key + BN > whole_to) mask<true>(scores, a, position + row, key);
            if (MASK == WINDOW && key < whole_from) mask<false>(scores, a, position + row, key);
        };
        int turn = 1 + warpgroup, other = 2 - warpgroup, stage = n % STAGES;

        barrier_wait(&s.k_full[stage], n / STAGES & 1);
        named_sync(turn, 256);
        multiply_rows<BN, DP, BM * 128, BN * 128>(scores, q, descriptor_rows(s.k[stage]));
        named_arrive(other, 256);
        wgmma_wait<0>();
        wgmma_hold(scores);
        if (leader) barrier_arrive(&s.k_empty[stage]);
        trim();
        soft.update(scores, a.scale_log2, shrink);
        pack_probabilities(p, scores);
        for (int i = 1; i < count; i++) {
            int stage = (n + i) % STAGES, before = (n + i - 1) % STAGES;
            barrier_wait(&s.k_full[stage], (n + i) / STAGES & 1);
            named_sync(turn, 256);
            multiply_rows<BN, DP, BM * 128, BN * 128>(scores, q, descriptor_rows(s.k[stage]));
            barrier_wait(&s.v_full[before], (n + i - 1) / STAGES & 1);
            multiply_values(out, p, s.v[before], i > 1);
            named_arrive(other, 256);
            wgmma_wait<1>();
            wgmma_hold(scores);
            if (leader) barrier_arrive(&s.k_empty[stage]);
            key -= BN;
            trim();
            soft.update(scores, a.scale_log2, shrink);
            wgmma_wait<0>();
            wgmma_hold(out);
            if (leader) barrier_arrive(&s.v_empty[before]);
#pragma unroll
            for (int j = 0; j < VP / 8; j++) {
                out[4 * j] *= shrink[0], out[4 * j + 1] *= shrink[0];
                out[4 * j + 2] *= shrink[1], out[4 * j + 3] *= shrink[1];
            }
            pack_probabilities(p, scores);
        }
        if (leader) barrier_arrive(&s.q_empty);
        int last = (n + count - 1) % STAGES;
        barrier_wait(&s.v_full[last], (n + count - 1) / STAGES & 1);
        multiply_values(out, p, s.v[last], count > 1);
        wgmma_wait<0>();
        wgmma_hold(out);
        if (leader) barrier_arrive(&s.v_empty[last]);
    } else if (leader) {
        barrier_arrive(&s.q_empty);
    }

    float scale[2], gate[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = soft.sum[r];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        scale[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        int at = warpgroup * 64 + row + 8 * r;
        bool real = at < tile.rows;
        i64 query = (i64)(tile.token + at) * a.heads + head;
        gate[r] = real && a.out != nullptr ? widen(a.gate[query * 3 + a.gate_index]) : 0.0f;
        if (a.lse != nullptr && lane % 4 == 0 && real) {
            float lse = (__fmul_rn(soft.peak[r], a.scale_log2) + log2f(sum)) * 0.69314718055994531f;
            a.lse[query] = sum == 0.0f ? -INF : lse;
        }
    }
    // The rows leave through the copy engine: the branch's own output, the gated one, or both.
    for (int gated = 0; gated < 2; gated++) {
        Real* target = gated ? a.out : a.branch;
        if (target == nullptr) continue;
        bulk_wait_read();
        named_sync(3 + warpgroup, 128);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float factor = gated ? scale[r] * gate[r] : scale[r];
            u8* staged = s.out[warpgroup * 64 + row + 8 * r] + 4 * (lane & 3);
#pragma unroll
            for (int j = 0; j < V / 8; j++)
                *(u32*)(staged + 16 * j) = pack<Real>(out[4 * j + 2 * r] * factor, out[4 * j + 2 * r + 1] * factor);
        }
        fence_proxy_async();
        named_sync(3 + warpgroup, 128);
        int at = warpgroup * 64 + thread;
        if (thread >= 64 || at >= tile.rows) continue;
        Real* place = target + ((i64)(tile.token + at) * a.heads + head) * V;
        if (gated && a.accumulate) bulk_add(place, s.out[at], V * 2);
        else bulk_store(place, s.out[at], V * 2);
        bulk_commit();
    }
}

DEVICE void consume(Shared& s, const Params& a) {
    bool second = uniform(threadIdx.x) >= 256;
    if (second) named_arrive(1, 256);  // the first warpgroup begins
    int n = 0, round = 0;
    for (int i = blockIdx.x; i < a.tile_count * a.heads; i += gridDim.x, round++) {
        Item item(a, i);
        item.count = uniform(item.count);
        attend_item(s, a, item, round, n);
        n += item.count;
    }
    if (!second) named_sync(1, 256);  // takes the second's last turn off the barrier
    bulk_wait_read();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v, const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    if (*a.not_finite) return;
    Shared& s = *(Shared*)raw;
    if (threadIdx.x == 0) {
        barrier_init(&s.q_full, 1);
        barrier_init(&s.q_empty, CONSUMERS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.v_full[i], 1);
            barrier_init(&s.k_empty[i], CONSUMERS * 4);
            barrier_init(&s.v_empty[i], CONSUMERS * 4);
        }
        barrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<24>();
        if (threadIdx.x == 0) produce(s, &q, &k, &v, a);
    } else {
        registers_grow<240>();
        consume(s, a);
    }
}
