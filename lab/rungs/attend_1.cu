// Attention of one head over contiguous keys, masked: dense causal, compressed or window.
//
// FlashAttention-3's shape (arXiv 2407.08608): one producer warp feeds K and V tiles through TMA;
// two consumer warpgroups of 64 queries each compute S = q·kᵀ by wgmma, the online softmax in
// registers, and O += P·v with P kept in registers. A warpgroup starts S of the next tile before
// O of this one, and the two warpgroups take turns at the tensor cores.
//
// Constants: D, V (head dims, multiples of 8, at most 256), BN (keys a tile), MASK (0 causal,
// 1 compressed, 2 window). Grid: G · tiles · K blocks, the heads of a group neighbours, so that
// they share K and V in L2. Block: 384 threads.
#include "hopper.cuh"

static constexpr int BM = 128, PANEL = 64, STAGES = 2, CONSUMERS = 2;
static constexpr int DP = (D + 63) / 64 * 64, VP = (V + 63) / 64 * 64;
static constexpr int QO = DP > VP ? DP : VP;  // the output is staged where q was
static constexpr int Q_BYTES = BM * QO * 2, K_BYTES = BN * DP * 2, V_BYTES = BN * VP * 2;
static constexpr int COMPRESSED = 1, WINDOW = 2;  // 0 is causal

// Queries `token..token+rows` at positions `position..` of a sequence whose keys start at row `key`.
struct Tile {
    int token, rows, position, key;
};

struct Params {
    const Tile* tiles;
    int tile_count, heads, group;
    float scale_log2;  // softmax scale · log2(e)
    int window;        // w
    int block, stride; // l, d
    Real* branch;      // [T, H, V] this branch's output, or null
    Real* out;         // [T, H, V] gated output, or null
    const Real* gate;  // [T, H, 3]
    int gate_index;
    int accumulate;    // add to `out`
    float* lse;        // [T, H] natural log, or null
};

struct Shared {
    u8 q[Q_BYTES];
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u64 q_full, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// Keys [first_key, last_key) are visible to position p.
DEVICE int last_key(const Params& a, int p) {
    if (MASK == COMPRESSED) return p + 1 < a.block ? 0 : (p + 1 - a.block) / a.stride + 1;
    return p + 1;
}
DEVICE int first_key(const Params& a, int p) {
    return MASK == WINDOW ? max(0, p - a.window + 1) : 0;
}

DEVICE void produce(Shared& s, const TensorMap* q, const TensorMap* k, const TensorMap* v, const Tile& tile,
                    int head, int kv_head, int first, int count) {
    barrier_expect(&s.q_full, BM * DP * 2);
#pragma unroll
    for (int c = 0; c < DP / PANEL; c++) tma_load(s.q + c * BM * 128, q, &s.q_full, c * PANEL, head, tile.token);
    for (int i = 0; i < count; i++) {
        int stage = i % STAGES, row = tile.key + first + (count - 1 - i) * BN;
        u32 parity = (i / STAGES & 1) ^ 1;
        barrier_wait(&s.k_empty[stage], parity);
        barrier_expect(&s.k_full[stage], K_BYTES);
#pragma unroll
        for (int c = 0; c < DP / PANEL; c++)
            tma_load(s.k[stage] + c * BN * 128, k, &s.k_full[stage], c * PANEL, kv_head, row);
        barrier_wait(&s.v_empty[stage], parity);
        barrier_expect(&s.v_full[stage], V_BYTES);
#pragma unroll
        for (int c = 0; c < VP / PANEL; c++)
            tma_load(s.v[stage] + c * BN * 128, v, &s.v_full[stage], c * PANEL, kv_head, row);
    }
}

// S = q·kᵀ, 64×BN.
DEVICE void multiply_keys(float (&scores)[BN / 2], u64 q, const u8* k) {
    wgmma_fence();
    u64 keys = descriptor_rows(k);
#pragma unroll
    for (int i = 0; i < DP / 16; i++) {
        int panel = i / 4, inner = i % 4;
        Wgmma<BN>::ss<0, 0>(scores, descriptor_step(q, panel * BM * 128 + inner * 32),
                            descriptor_step(keys, panel * BN * 128 + inner * 32), i > 0);
    }
    wgmma_commit();
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
            float base = top == -INF ? 0.0f : top * scale_log2;
            shrink[r] = exp2_approx(peak[r] * scale_log2 - base);
            peak[r] = top;
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

DEVICE void mask(float (&scores)[BN / 2], const Params& a, int position, int key) {
    int column = key + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int p = position + 8 * r, first = first_key(a, p) - column, last = last_key(a, p) - column;
#pragma unroll
        for (int j = 0; j < BN / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int at = 8 * j + c;
                if (at < first || at >= last) scores[4 * j + 2 * r + c] = -INF;
            }
        }
    }
}

DEVICE void consume(Shared& s, const Params& a, const Tile& tile, int head, int first, int count) {
    int warpgroup = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int row = warp * 16 + lane / 4;  // and row + 8, of the warpgroup's 64
    int position = tile.position + warpgroup * 64;
    bool leader = lane == 0;

    float out[VP / 2], scores[BN / 2];
    u32 p[BN / 4];
    Softmax soft = {{-INF, -INF}, {0.0f, 0.0f}};
    float shrink[2];
#pragma unroll
    for (int i = 0; i < VP / 2; i++) out[i] = 0.0f;

    barrier_wait(&s.q_full, 0);
    if (count > 0) {
        u64 q = descriptor_rows(s.q + warpgroup * 64 * 128);
        // Tiles that some row of the warpgroup sees only in part.
        int whole_from = first_key(a, position + 63), whole_to = last_key(a, position);
        int key = first + (count - 1) * BN;
        auto trim = [&] {
            if (key < whole_from || key + BN > whole_to) mask(scores, a, position + row, key);
        };
        int turn = 1 + warpgroup, other = 2 - warpgroup;
        if (warpgroup == 1) named_arrive(other, 256);  // warpgroup 0 begins

        barrier_wait(&s.k_full[0], 0);
        named_sync(turn, 256);
        multiply_keys(scores, q, s.k[0]);
        named_arrive(other, 256);
        wgmma_wait<0>();
        wgmma_hold(scores);
        if (leader) barrier_arrive(&s.k_empty[0]);
        trim();
        soft.update(scores, a.scale_log2, shrink);
        pack_probabilities(p, scores);
        for (int i = 1; i < count; i++) {
            int stage = i % STAGES, before = (i - 1) % STAGES;
            barrier_wait(&s.k_full[stage], i / STAGES & 1);
            named_sync(turn, 256);
            multiply_keys(scores, q, s.k[stage]);
            barrier_wait(&s.v_full[before], (i - 1) / STAGES & 1);
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
        if (warpgroup == 0) named_sync(turn, 256);  // takes warpgroup 1's last turn off the barrier
        barrier_wait(&s.v_full[(count - 1) % STAGES], (count - 1) / STAGES & 1);
        multiply_values(out, p, s.v[(count - 1) % STAGES], count > 1);
        wgmma_wait<0>();
        wgmma_hold(out);
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = soft.sum[r];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        int at = warpgroup * 64 + row + 8 * r;
        if (a.lse != nullptr && lane % 4 == 0 && at < tile.rows) {
            float lse = (soft.peak[r] * a.scale_log2 + log2f(sum)) * 0.69314718055994531f;
            a.lse[(i64)(tile.token + at) * a.heads + head] = sum == 0.0f ? -INF : lse;
        }
        // Staged as [panel][128 rows][64], swizzled like the inputs, over this warpgroup's own rows of q.
#pragma unroll
        for (int j = 0; j < VP / 8; j++) {
            u32 pair = pack<Real>(out[4 * j + 2 * r] * inverse, out[4 * j + 2 * r + 1] * inverse);
            u8* place = s.q + (j / 8) * BM * 128 + at * 128 + (((j % 8) ^ (at & 7)) << 4) + (lane & 3) * 4;
            *(u32*)place = pair;
        }
    }
    named_sync(3 + warpgroup, 128);
    for (int i = thread; i < 64 * (V / 8); i += 128) {
        int at = warpgroup * 64 + i / (V / 8), chunk = i % (V / 8);
        if (at >= tile.rows) break;
        const u8* place = s.q + (chunk / 8) * BM * 128 + at * 128 + (((chunk % 8) ^ (at & 7)) << 4);
        auto values = *(const Vec<Real, 8>*)place;
        i64 query = (i64)(tile.token + at) * a.heads + head;
        if (a.branch != nullptr) *(Vec<Real, 8>*)(a.branch + query * V + chunk * 8) = values;
        if (a.out == nullptr) continue;
        float gate = widen(a.gate[query * 3 + a.gate_index]);
        auto* target = (Vec<Real, 8>*)(a.out + query * V + chunk * 8);
        Vec<Real, 8> sum;
        if (a.accumulate) sum = *target;
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float x = gate * widen(values.at[c]);
            sum.at[c] = narrow<Real>(a.accumulate ? x + widen(sum.at[c]) : x);
        }
        *target = sum;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v, const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    // Longest tiles first.
    int g = blockIdx.x % a.group, t = a.tile_count - 1 - blockIdx.x / a.group % a.tile_count;
    int kv_head = blockIdx.x / a.group / a.tile_count, head = kv_head * a.group + g;
    Tile tile = a.tiles[t];
    int first = first_key(a, tile.position);
    int keys = last_key(a, tile.position + tile.rows - 1) - first, count = (keys + BN - 1) / BN;

    if (threadIdx.x == 0) {
        barrier_init(&s.q_full, 1);
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
        if (threadIdx.x == 0) produce(s, &q, &k, &v, tile, head, kv_head, first, count);
    } else {
        registers_grow<240>();
        consume(s, a, tile, head, first, count);
    }
}
