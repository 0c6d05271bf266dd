// dQ of the selected branch: every query walks the blocks it chose, dQ += dS·K.
//
// A block of threads has 16 rows a warp: neighbouring queries × GP heads (the group padded to a power of
// two). First all threads merge the queries' lists: each block that any of them wants stands once in the
// order of fetching, with the queries that want it. Then one thread fetches K and V, 32 keys a stage,
// through TMA, and the warps that want a stage compute on it by mma.sync; the others never look at it.
// Stages are fetched list place by list place, every query's first block before any query's second, so
// that all warps have work also where queries share nothing.
//
// A stage is free again when its users, whatever their number, have arrived: each of n arrives 840/n times.
//
// Constants: D, V, MASK 0, GP (1 to 64), SB (l', a multiple of 64), S (blocks a list), STAGES. Grid: tiles ·
// K blocks. Block: 128 threads and the warps that compute.
#include "backward.cuh"
#include "mma.cuh"
#include "selected.cuh"

static constexpr int KEYS = 32;
static constexpr bool KEEP = D + V <= 256;               // q and dOut stay in registers, else in shared memory
static constexpr int WARPS = D + V <= 384 ? 8 : 4, ROWS = 16 * WARPS, THREADS = 128 + 32 * WARPS;
static constexpr int QUERIES = ROWS / GP, WORDS = (QUERIES + 31) / 32;
static constexpr int ENTRIES = QUERIES * S;
static constexpr int K_BYTES = KEYS * DP * 2, V_BYTES = KEYS * VP * 2;
static constexpr int RELEASES = 840;  // the least number that 1 to 8 divide

// Queries `token..token+rows` at positions `position..` of a sequence whose keys start at row `key`.
struct Tile {
    int token, rows, position, key;
};

struct Params {
    const Sequence* sequences;
    const Real* q;        // [T, H, D]
    const Real* d_out;    // [T, H, V]
    const Real* gate;     // [T, H, 3], or null: 1
    const float* lse;     // [T, H], natural log
    const float* delta;   // [T, H]: gate · dOut·O of the branch
    const i32* indices;   // [T, K, S], ascending, then −1
    Real* dq;             // [T, H, D]
    float* sum;           // [T, H, D] where branches add up before the last one rounds into dq; or null: in dq
    int sequence_count, tile_count, heads, group, gate_index;
    int first, last;      // whether this branch is the first, the last, that adds to dQ
    float scale;
};

struct Shared {
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u8 q[KEEP ? 16 : ROWS * DP * 2];
    u8 o[KEEP ? 16 : ROWS * VP * 2];
    u64 full[STAGES], empty[STAGES];
    int lists[QUERIES][S];       // the greatest block so far: it counts where it grows
    u32 wanted[ENTRIES][WORDS];  // of entry place·QUERIES + query: the queries that want its block
    u32 order[ENTRIES];          // entries in the order of fetching: entry | users << 16
    u32 begin[ENTRIES];          // their first stage, counted from the start
    u32 total;
    Issued issued;  // stages
};

// Stages of a block: those that reach past the last query are left out.
DEVICE int stages_of(const Tile& tile, int block) {
    return min(SB / KEYS, (tile.position + tile.rows - 1 - block * SB) / KEYS + 1);
}

// Reads the lists: a warp a query.
DEVICE void read_lists(Shared& s, const Params& a, const Tile& tile, int kv_head, int kv_heads) {
    int lane = threadIdx.x & 31;
    for (int query = threadIdx.x / 32; query < QUERIES; query += THREADS / 32) {
        const i32* list = a.indices + ((i64)(tile.token + query) * kv_heads + kv_head) * S;
        int current = (tile.position + query) / SB, last = -1;
        for (int e = 0; e < S; e += 32) {
            int block = query < tile.rows && e + lane < S ? list[e + lane] : -1;
            int top = block >= 0 && block <= current ? block : -1;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                int below = __shfl_up_sync(ALL_LANES, top, offset);
                if (lane >= offset) top = max(top, below);
            }
            top = max(top, last);
            last = __shfl_sync(ALL_LANES, top, 31);
            if (e + lane < S) s.lists[query][e + lane] = top;
        }
    }
}

// Who wants each entry's block; nobody if another entry comes first with it.
DEVICE void merge_lists(Shared& s) {
    for (int entry = threadIdx.x; entry < ENTRIES; entry += THREADS) {
        int place = entry / QUERIES, query = entry % QUERIES;
        int block = s.lists[query][place];
        bool counts = block >= 0 && (place == 0 || s.lists[query][place - 1] < block);
        u32 wanted[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; w++) wanted[w] = 0;
        if (counts) {
#pragma unroll
            for (int w = 0; w < WORDS; w++) {
#pragma unroll 4
                for (int i = 0; i < min(32, QUERIES); i++) {
                    int other = 32 * w + i, low = 0, size = S;
                    while (size > 1) {
                        int half = size / 2;
                        if (s.lists[other][low + half - 1] < block) low += half;
                        size -= half;
                    }
                    if (s.lists[other][low] != block) continue;
                    wanted[w] |= 1u << i;
                    if (low < place || low == place && other < query) counts = false;
                }
            }
        }
#pragma unroll
        for (int w = 0; w < WORDS; w++) s.wanted[entry][w] = counts ? wanted[w] : 0;
    }
}

// This warp's queries among those that want an entry.
DEVICE u32 mine(const Shared& s, int entry, int warp) {
    if (GP >= 16) return s.wanted[entry][0] >> (warp * 16 / GP) & 1;
    static constexpr int EACH = GP >= 16 ? 1 : 16 / GP;
    int first = warp * EACH;
    return s.wanted[entry][first / 32] >> (first % 32) & ((1u << EACH) - 1);
}

// One warp: the order of fetching.
DEVICE void order_entries(Shared& s, const Tile& tile) {
    int lane = threadIdx.x & 31;
    u32 count = 0, stages = 0;
    for (int base = 0; base < ENTRIES; base += 32) {
        int entry = base + lane;
        u32 users = 0, own = 0;
        if (entry < ENTRIES) {
            for (int w = 0; w < WARPS; w++) users += mine(s, entry, w) != 0;
            if (users) own = stages_of(tile, s.lists[entry % QUERIES][entry / QUERIES]);
        }
        u32 vote = __ballot_sync(ALL_LANES, users != 0), before = own;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            u32 below = __shfl_up_sync(ALL_LANES, before, offset);
            if (lane >= offset) before += below;
        }
        if (users) {
            u32 at = count + __popc(vote & ((1u << lane) - 1));
            s.order[at] = entry | users << 16;
            s.begin[at] = stages + before - own;
        }
        count += __popc(vote);
        stages += __shfl_sync(ALL_LANES, before, 31);
    }
    if (lane == 0) s.total = count;
}

// One thread.
DEVICE void produce(Shared& s, const TensorMap* k, const TensorMap* v, const Tile& tile, int kv_head) {
    int stage = 0;
    u32 parity = 1, issued = 0;
    for (u32 n = 0; n < s.total; n++) {
        int entry = s.order[n] & 0xffff, block = s.lists[entry % QUERIES][entry / QUERIES];
        int count = stages_of(tile, block), row = tile.key + block * SB;
        for (int i = 0; i < count; i++, row += KEYS) {
            barrier_wait(&s.empty[stage], parity);
            barrier_expect(&s.full[stage], K_BYTES + V_BYTES);
            s.issued.publish(++issued);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.k[stage] + c * KEYS * 128, k, &s.full[stage], c * PANEL, kv_head, row);
#pragma unroll
            for (int c = 0; c < VP / PANEL; c++)
                tma_load(s.v[stage] + c * KEYS * 128, v, &s.full[stage], c * PANEL, kv_head, row);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// The warp's 16 rows as left operands: kept in registers, or in swizzled shared memory.
template <int DIM>
struct Rows {
    static constexpr int STEPS = (DIM + 15) / 16;
    u32 kept[KEEP ? STEPS : 1][4];
    u32 address;

    DEVICE void load(const Real* from, const i64 (&place)[2], const bool (&real)[2], u8* shared) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            u32 x[4];
#pragma unroll
            for (int part = 0; part < 4; part++) {
                int r = part % 2, column = 16 * i + 8 * (part / 2) + 2 * (lane % 4);
                x[part] = real[r] ? *(const u32*)(from + place[r] * DIM + column) : 0u;
                if (!KEEP) {
                    int row = warp * 16 + lane / 4 + 8 * r, chunk = (2 * i + part / 2) % 8;
                    *(u32*)(shared + i / 4 * ROWS * 128 + row * 128 + ((chunk ^ (row & 7)) << 4) + lane % 4 * 4) = x[part];
                }
                if (KEEP) kept[i % (KEEP ? STEPS : 1)][part] = x[part];
            }
        }
        address = shared_address(shared) + (warp * 16 + lane % 16) * 128;
        __syncwarp();
    }
    DEVICE void get(u32 (&x)[4], int i) const {
        if (KEEP) {
#pragma unroll
            for (int part = 0; part < 4; part++) x[part] = kept[i % (KEEP ? STEPS : 1)][part];
        } else {
            int lane = threadIdx.x % 32;
            load_tiles(x, address + i / 4 * ROWS * 128 + (((2 * i + lane / 16) % 8 ^ (lane & 7)) << 4));
        }
    }
};

// d = rows·bᵀ for a stage's 32 keys.
template <int DIM>
DEVICE void multiply(float (&d)[KEYS / 8][4], const Rows<DIM>& rows, u32 b) {
    int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) d[j][0] = d[j][1] = d[j][2] = d[j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < Rows<DIM>::STEPS; i++) {
        u32 x[4];
        rows.get(x, i);
        u32 column = ((2 * i + lane / 8 % 2) % 8 ^ (row & 7)) << 4;
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            u32 y[4];
            load_tiles(y, b + i / 4 * KEYS * 128 + (16 * j + row) * 128 + column);
            mma_16_8_16(d[2 * j], x, y[0], y[1]);
            mma_16_8_16(d[2 * j + 1], x, y[2], y[3]);
        }
    }
}

DEVICE void consume(Shared& s, const Params& a, const Tile& tile, int kv_head) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float scale_log2 = a.scale * 1.4426950408889634f;
    // The thread's two rows.
    int query[2];
    bool real[2];
    i64 place[2];
    float lse[2], gate[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + 8 * r, head = row % GP;
        query[r] = row / GP;
        real[r] = query[r] < tile.rows && head < a.group;
        place[r] = real[r] ? (i64)(tile.token + query[r]) * a.heads + kv_head * a.group + head : 0;
        lse[r] = real[r] ? a.lse[place[r]] * 1.4426950408889634f : -INF;
        if (lse[r] == -INF) lse[r] = INF;  // a row that saw nothing weighs nothing
        gate[r] = !real[r] ? 0.0f : a.gate != nullptr ? widen(a.gate[place[r] * 3 + a.gate_index]) : 1.0f;
        delta[r] = real[r] ? a.delta[place[r]] : 0.0f;
        delta[r] = gate[r] == 0.0f ? 0.0f : delta[r] / gate[r];  // dOut·O alone
    }
    Rows<D> q;
    Rows<V> o;
    q.load(a.q, place, real, s.q);
    o.load(a.d_out, place, real, s.o);
    float dq[D / 8][4];
#pragma unroll
    for (int j = 0; j < D / 8; j++) dq[j][0] = dq[j][1] = dq[j][2] = dq[j][3] = 0.0f;

    int total = s.total;
    u32 issued = 0;
    for (int base = 0; base < total; base += 32) {
        u32 order = base + lane < total ? s.order[base + lane] : 0;
        u32 own = base + lane < total ? mine(s, order & 0xffff, warp) : 0;
        u32 begin = base + lane < total ? s.begin[base + lane] : 0;
        for (u32 vote = __ballot_sync(ALL_LANES, own != 0); vote != 0; vote &= vote - 1) {
            int from = __ffs(vote) - 1;
            u32 here = __shfl_sync(ALL_LANES, order, from), at = __shfl_sync(ALL_LANES, begin, from);
            u32 wants = __shfl_sync(ALL_LANES, own, from);
            int entry = here & 0xffff, releases = RELEASES / (here >> 16);
            int block = s.lists[entry % QUERIES][entry / QUERIES], count = stages_of(tile, block);
            int limit[2];  // the last key of the stage that a row sees
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bool wanted = GP >= 16 || wants >> (query[r] - warp * 16 / GP) & 1;
                limit[r] = wanted ? tile.position + query[r] - block * SB : -1;
            }
            for (int i = 0; i < count; i++, at++) {
                int stage = at % STAGES;
                s.issued.wait(at, issued);
                barrier_wait(&s.full[stage], at / STAGES & 1);
                u32 keys = shared_address(s.k[stage]), values = shared_address(s.v[stage]);
                float scores[KEYS / 8][4], d_p[KEYS / 8][4];
                multiply(scores, q, keys);
                multiply(d_p, o, values);
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        int r = c / 2;
                        float p = gate[r] * exp2_approx(fmaf(scores[j][c], scale_log2, -lse[r]));
                        scores[j][c] = p * (d_p[j][c] - delta[r]);
                    }
                }
                if (GP < 16 || limit[0] < KEYS - 1) {
#pragma unroll
                    for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                        for (int c = 0; c < 4; c++)
                            if (8 * j + 2 * (lane % 4) + c % 2 > limit[c / 2]) scores[j][c] = 0.0f;
                    }
                }
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
                    u32 ds[4] = {pack<Real>(scores[2 * k][0], scores[2 * k][1]), pack<Real>(scores[2 * k][2], scores[2 * k][3]),
                                 pack<Real>(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                                 pack<Real>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
                    int row = 16 * k + lane % 16;
#pragma unroll
                    for (int j = 0; j < D / 16; j++) {
                        u32 y[4];
                        load_tiles_transposed(y, keys + j / 4 * KEYS * 128 + row * 128 + (((2 * j + lane / 16) % 8 ^ (row & 7)) << 4));
                        mma_16_8_16(dq[2 * j], ds, y[0], y[1]);
                        mma_16_8_16(dq[2 * j + 1], ds, y[2], y[3]);
                    }
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(&s.empty[stage], releases);
                limit[0] -= KEYS, limit[1] -= KEYS;
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (a.sum == nullptr) {
            store_row<D>((const float(&)[D / 2])dq, r, a.scale, a.dq + place[r] * D, real[r], !a.first);
            continue;
        }
        if (!real[r]) continue;
        float* sum = a.sum + place[r] * D;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            int column = 8 * j + 2 * (lane % 4);
            float2 x = make_float2(dq[j][2 * r] * a.scale, dq[j][2 * r + 1] * a.scale);
            if (!a.first) {
                float2 before = *(const float2*)(sum + column);
                x.x += before.x, x.y += before.y;
            }
            if (a.last) *(u32*)(a.dq + place[r] * D + column) = pack<Real>(x.x, x.y);
            else *(float2*)(sum + column) = x;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selected_backward_queries(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                              const __grid_constant__ Params a) {
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    // Every sequence starts a new tile; sequence b's are numbered from ⌊query/QUERIES⌋ + b, and some numbers
    // belong to nobody.
    int number = a.tile_count - 1 - blockIdx.x % a.tile_count, kv_head = blockIdx.x / a.tile_count;
    auto first_tile = [&](int b) { return a.sequences[b].query / QUERIES + b; };
    int b = find(a.sequence_count, number, first_tile), start = (number - first_tile(b)) * QUERIES;
    Sequence sequence = a.sequences[b];
    if (start >= sequence.queries) return;
    Tile tile = {sequence.query + start, min(QUERIES, sequence.queries - start), sequence.position + start, sequence.key};
    if (threadIdx.x == 0) {
        s.issued.count = 0;
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], RELEASES);
        }
        barrier_fence_init();
    }
    read_lists(s, a, tile, kv_head, gridDim.x / a.tile_count);
    __syncthreads();
    merge_lists(s);
    __syncthreads();
    if (threadIdx.x < 32) order_entries(s, tile);
    __syncthreads();
    if (threadIdx.x >= 32 * WARPS) {
        if (WARPS == 8) registers_shrink<40>();
        if (threadIdx.x == 32 * WARPS) produce(s, &k, &v, tile, kv_head);
    } else {
        if (WARPS == 8) registers_grow<232>();
        consume(s, a, tile, kv_head);
    }
}
