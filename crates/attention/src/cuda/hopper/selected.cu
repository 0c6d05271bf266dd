// The selected branch: every query attends to the blocks it chose, causally masked.
//
// A block of threads has 128 rows: 128/GP neighbouring queries × GP heads (the group padded to a
// power of two), 16 rows a warp. A producer warp walks the union of the queries' ascending lists and
// brings every block in once through TMA, tagged with who wants it: neighbours that choose the same
// block share its bytes, and the bytes are what bounds this branch (16 FLOP a byte unshared). A warp
// computes the tiles that one of its queries wants, by mma.sync, with its own online softmax.
//
// Constants: D, V, GP (1 to 64), SB (l', a multiple of 64), STAGES. Grid: as many blocks as
// multiprocessors, each walking its share. Block: 384 threads.
#include "hopper.cuh"
#include "mma.cuh"
#include "sequences.cuh"

static constexpr int PANEL = 64, BN = 64, WARPS = 8, BM = 16 * WARPS;
static constexpr int DP = (D + 63) / 64 * 64, VP = (V + 63) / 64 * 64;
static constexpr int QUERIES = BM / GP, QUERIES_A_LANE = (QUERIES + 31) / 32;
static constexpr int K_BYTES = BN * DP * 2, V_BYTES = BN * VP * 2;
static constexpr int OUT_PITCH = V * 2 + 16;  // bytes of a staged row, padded against bank conflicts
static constexpr bool KEEP_Q = DP + VP <= 320;
static constexpr float HUGE = 1024.0f;
static constexpr int NO_BLOCK = 0x7fffffff;

struct Params {
    Batch batch;
    // Set where a value is not finite. A hidden key weighs nothing here, but nothing times NaN is NaN:
    // then the work is the plain kernel's.
    const u32* not_finite;
    const Real* q;       // [T, H, D]
    const i32* indices;  // [T, K, S]
    Real* branch;        // [T, H, V] this branch's output, or null
    Real* out;           // [T, H, V] gated output, or null
    const Real* gate;    // [T, H, 3]
    float* lse;          // [T, H] natural log, or null
    int tile_count, heads, group;
    int count;           // S
    int gate_index;
    int accumulate;      // add to `out`
    float scale_log2;    // softmax scale · log2(e)
};

// What a stage holds: keys from `key` on (within the sequence; −1: the item ends), and the queries
// that want them, one bit each.
struct Tag {
    int key;
    u32 wanted[QUERIES_A_LANE];
};

struct Shared {
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u8 out[WARPS][16][OUT_PITCH];
    Tag tags[STAGES];
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

// One warp: merges the lists, which lie in shared memory, and feeds the stages.
DEVICE void produce_item(Shared& s, const TensorMap* k, const TensorMap* v, const Params& a, const Tile& tile,
                         int kv_head, int* lists, int& stage, u32& parity) {
    int lane = threadIdx.x & 31, kv_heads = a.heads / a.group;
    __syncwarp();
    for (int i = lane; i < QUERIES * a.count; i += 32) {
        int query = i / a.count, block = NO_BLOCK;
        if (query < tile.rows) {
            block = a.indices[((i64)(tile.token + query) * kv_heads + kv_head) * a.count + i % a.count];
            if (block < 0 || block > (tile.position + query) / SB) block = NO_BLOCK;
        }
        lists[i] = block;
    }
    __syncwarp();
    // Lists as ranking writes them are left as they are; any other is put in order, without what is no
    // block of its query and without repeats.
    for (int query = lane; query < QUERIES; query += 32) {
        int* list = lists + query * a.count;
        int kept = 0;
        for (int i = 0; i < a.count; i++) {
            int block = list[i], place = kept;
            if (block == NO_BLOCK) continue;
            while (place > 0 && list[place - 1] > block) place--;
            if (place > 0 && list[place - 1] == block) continue;
            for (int j = kept; j > place; j--) list[j] = list[j - 1];
            list[place] = block;
            kept++;
        }
        for (int i = kept; i < a.count; i++) list[i] = NO_BLOCK;
    }
    __syncwarp();
    int head[QUERIES_A_LANE], at[QUERIES_A_LANE];
#pragma unroll
    for (int u = 0; u < QUERIES_A_LANE; u++) {
        int query = lane + 32 * u;
        at[u] = 0;
        head[u] = query < QUERIES && a.count > 0 ? lists[query * a.count] : NO_BLOCK;
    }
    while (true) {
        int block = head[0];
#pragma unroll
        for (int u = 1; u < QUERIES_A_LANE; u++) block = min(block, head[u]);
        block = __reduce_min_sync(ALL_LANES, block);
        u32 wanted[QUERIES_A_LANE];
#pragma unroll
        for (int u = 0; u < QUERIES_A_LANE; u++) {
            wanted[u] = __ballot_sync(ALL_LANES, head[u] == block);
            while (head[u] <= block && head[u] != NO_BLOCK)
                head[u] = ++at[u] < a.count ? lists[(lane + 32 * u) * a.count + at[u]] : NO_BLOCK;
        }
        bool last = block == NO_BLOCK;
        for (int sub = 0; sub < SB / BN; sub++) {
            int key = block * SB + sub * BN;
            if (!last && key > tile.position + tile.rows - 1) break;
            barrier_wait(&s.k_empty[stage], parity);
            if (lane == 0) {
                s.tags[stage].key = last ? -1 : key;
#pragma unroll
                for (int u = 0; u < QUERIES_A_LANE; u++) s.tags[stage].wanted[u] = wanted[u];
                if (last) {
                    barrier_arrive(&s.k_full[stage]);
                } else {
                    barrier_expect(&s.k_full[stage], K_BYTES);
#pragma unroll
                    for (int c = 0; c < DP / PANEL; c++)
                        tma_load(s.k[stage] + c * BN * 128, k, &s.k_full[stage], c * PANEL, kv_head, tile.key + key);
                }
            }
            barrier_wait(&s.v_empty[stage], parity);
            if (lane == 0) {
                if (last) {
                    barrier_arrive(&s.v_full[stage]);
                } else {
                    barrier_expect(&s.v_full[stage], V_BYTES);
#pragma unroll
                    for (int c = 0; c < VP / PANEL; c++)
                        tma_load(s.v[stage] + c * BN * 128, v, &s.v_full[stage], c * PANEL, kv_head, tile.key + key);
                }
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (last) return;
        }
    }
}

DEVICE void consume_item(Shared& s, const Params& a, const Tile& tile, int kv_head, int& stage, u32& parity) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first_query = warp * 16 / GP;
    // The thread's two rows.
    int query[2], head[2];
    bool real[2];
    i64 place[2];  // (token, head)
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + 8 * r;
        query[r] = row / GP;
        head[r] = row % GP;
        real[r] = query[r] < tile.rows && head[r] < a.group;
        place[r] = (i64)(tile.token + query[r]) * a.heads + kv_head * a.group + head[r];
    }
    // q as the left operand: 16 rows, 16 dims a step. Wide heads leave no registers to keep it in.
    auto load_q = [&](u32 (&x)[4], int i) {
#pragma unroll
        for (int part = 0; part < 4; part++) {
            int r = part % 2, column = 16 * i + 8 * (part / 2) + 2 * (lane % 4);
            x[part] = real[r] && column < D ? *(const u32*)(a.q + place[r] * D + column) : 0u;
        }
    };
    u32 q[KEEP_Q ? DP / 16 : 1][4];
    if (KEEP_Q) {
#pragma unroll
        for (int i = 0; i < DP / 16; i++) load_q(q[i % (KEEP_Q ? DP / 16 : 1)], i);
    }

    float out[VP / 8][4];
    float peak[2] = {-INF, -INF}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < VP / 8; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;

    // This lane's row of the four 8×8 tiles of a load: keys on rows, 16 bytes of dims.
    int tile_row = lane % 8, tile_id = lane / 8;
    bool more = true;
    while (more) {
        barrier_wait(&s.k_full[stage], parity);
        int key = s.tags[stage].key;
        more = key >= 0;
        int limit[2];  // columns a row sees, less one
        bool mine = false;
        if (!more) {
            limit[0] = limit[1] = -1;
        } else if (GP >= 16) {
            mine = s.tags[stage].wanted[0] >> first_query & 1;
            limit[0] = limit[1] = tile.position + first_query - key;
        } else {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bool wants = s.tags[stage].wanted[query[r] / 32] >> (query[r] % 32) & 1;
                limit[r] = wants ? tile.position + query[r] - key : -1;
                mine |= wants;
            }
            mine = __any_sync(ALL_LANES, mine);
        }
        float scores[BN / 8][4];
        if (mine) {
#pragma unroll
            for (int j = 0; j < BN / 8; j++) scores[j][0] = scores[j][1] = scores[j][2] = scores[j][3] = 0.0f;
            u32 keys = shared_address(s.k[stage]);
#pragma unroll KEEP_Q ? DP / 16 : 1
            for (int i = 0; i < DP / 16; i++) {
                u32(&x)[4] = q[KEEP_Q ? i : 0];
                if (!KEEP_Q) load_q(x, i);
#pragma unroll
                for (int j = 0; j < BN / 16; j++) {
                    int row = 16 * j + 8 * (tile_id / 2) + tile_row, chunk = 2 * (i % 4) + tile_id % 2;
                    u32 b[4];
                    load_tiles(b, keys + i / 4 * BN * 128 + row * 128 + ((chunk ^ (row & 7)) << 4));
                    mma_16_8_16(scores[2 * j], x, b[0], b[1]);
                    mma_16_8_16(scores[2 * j + 1], x, b[2], b[3]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.k_empty[stage]);
        u32 p[BN / 4];
        if (mine) {
            if (min(limit[0], limit[1]) < BN - 1 || GP < 16) {
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                    for (int c = 0; c < 4; c++)
                        if (8 * j + 2 * (lane % 4) + c % 2 > limit[c / 2]) scores[j][c] = -INF;
                }
            }
            float shrink[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = peak[r];
#pragma unroll
                for (int j = 0; j < BN / 8; j++) top = fmaxf(top, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
                // See `attend.cu`.
                float base = top == -INF ? 0.0f : __fmul_rn(top, a.scale_log2);
                shrink[r] = exp2_approx(__fmul_rn(peak[r], a.scale_log2) - base);
                peak[r] = top;
                if (fabsf(base) > HUGE) {
#pragma unroll
                    for (int j = 0; j < BN / 8; j++) scores[j][2 * r] -= top, scores[j][2 * r + 1] -= top;
                    base = 0.0f;
                }
                float total = 0.0f;
#pragma unroll
                for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                    for (int c = 2 * r; c < 2 * r + 2; c++) {
                        scores[j][c] = exp2_approx(fmaf(scores[j][c], a.scale_log2, -base));
                        total += scores[j][c];
                    }
                }
                sum[r] = sum[r] * shrink[r] + total;
            }
#pragma unroll
            for (int j = 0; j < VP / 8; j++) {
                out[j][0] *= shrink[0], out[j][1] *= shrink[0];
                out[j][2] *= shrink[1], out[j][3] *= shrink[1];
            }
#pragma unroll
            for (int j = 0; j < BN / 4; j++) p[j] = pack<Real>(scores[j / 2][j % 2 * 2], scores[j / 2][j % 2 * 2 + 1]);
        }
        barrier_wait(&s.v_full[stage], parity);
        if (mine) {
            u32 values = shared_address(s.v[stage]);
#pragma unroll
            for (int i = 0; i < BN / 16; i++) {
#pragma unroll
                for (int j = 0; j < VP / 16; j++) {
                    int row = 16 * i + 8 * (tile_id % 2) + tile_row, chunk = 2 * (j % 4) + tile_id / 2;
                    u32 b[4];
                    load_tiles_transposed(b, values + j / 4 * BN * 128 + row * 128 + ((chunk ^ (row & 7)) << 4));
                    mma_16_8_16(out[2 * j], (const u32(&)[4])p[4 * i], b[0], b[1]);
                    mma_16_8_16(out[2 * j + 1], (const u32(&)[4])p[4 * i], b[2], b[3]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.v_empty[stage]);
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    float scale[2], gate[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = sum[r];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
        gate[r] = real[r] && a.out != nullptr ? widen(a.gate[place[r] * 3 + a.gate_index]) : 0.0f;
        if (real[r] && a.lse != nullptr && lane % 4 == 0) {
            float lse = (__fmul_rn(peak[r], a.scale_log2) + log2f(total)) * 0.69314718055994531f;
            a.lse[place[r]] = total == 0.0f ? -INF : lse;
        }
    }
    // The rows leave through the copy engine: the branch's own output, the gated one, or both.
    for (int gated = 0; gated < 2; gated++) {
        Real* target = gated ? a.out : a.branch;
        if (target == nullptr) continue;
        bulk_wait_read();
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float factor = gated ? scale[r] * gate[r] : scale[r];
            u8* staged = s.out[warp][lane / 4 + 8 * r] + 4 * (lane % 4);
#pragma unroll
            for (int j = 0; j < V / 8; j++)
                *(u32*)(staged + 16 * j) = pack<Real>(out[j][2 * r] * factor, out[j][2 * r + 1] * factor);
        }
        fence_proxy_async();
        __syncwarp();
        int row = warp * 16 + lane, its_query = row / GP, its_head = row % GP;
        if (lane >= 16 || its_query >= tile.rows || its_head >= a.group) continue;
        Real* at = target + ((i64)(tile.token + its_query) * a.heads + kv_head * a.group + its_head) * V;
        if (gated && a.accumulate) bulk_add(at, s.out[warp][lane], V * 2);
        else bulk_store(at, s.out[warp][lane], V * 2);
        bulk_commit();
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    selected(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    if (*a.not_finite) return;
    Shared& s = *(Shared*)raw;
    int* lists = (int*)(raw + sizeof(Shared));
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.k_full[i], 1);
            barrier_init(&s.v_full[i], 1);
            barrier_init(&s.k_empty[i], WARPS);
            barrier_init(&s.v_empty[i], WARPS);
        }
        barrier_fence_init();
    }
    __syncthreads();
    int items = a.tile_count * (a.heads / a.group), stage = 0;
    // Longest tiles first; one KV head after the other, so that its keys and values stay in L2.
    auto tile = [&](int i) { return find_tile<QUERIES>(a.batch, a.tile_count - 1 - i % a.tile_count); };
    if (threadIdx.x >= 32 * WARPS) {
        registers_shrink<40>();
        if (threadIdx.x / 32 != WARPS) return;
        u32 parity = 1;
        for (int i = blockIdx.x; i < items; i += gridDim.x)
            produce_item(s, &k, &v, a, tile(i), i / a.tile_count, lists, stage, parity);
    } else {
        registers_grow<232>();
        u32 parity = 0;
        for (int i = blockIdx.x; i < items; i += gridDim.x)
            consume_item(s, a, tile(i), i / a.tile_count, stage, parity);
        bulk_wait_read();
    }
}
