// dQ of the selected branch: every query walks the blocks it chose, dQ += dS·K.
//
// A block of threads walks tiles of queries, 16 rows a warp: neighbouring queries × GP heads (the group
// padded to a power of two). Three warps plan a tile ahead: they merge the queries' lists, so that each
// block that any query wants stands once in the order of fetching, with the queries that want it. One
// thread fetches K and V, 32 keys a stage, through TMA, and the warps that want a stage compute on it by
// mma.sync; the others never look at it. Stages are fetched list place by list place, every query's first
// block before any query's second, so that all warps have work also where queries share nothing.
//
// A stage is free again when its users, whatever their number, have arrived: each of n arrives 840/n times.
//
// Constants: D, V, GP (1 to 64), SB (l', a multiple of 64), S (blocks a list), STAGES. Grid: at most
// as many blocks as multiprocessors. Block: 128 threads and the warps that compute.
#include "mma.cuh"
#include "selected.cuh"

static constexpr int KEYS = 32;
static constexpr bool KEEP = D + V <= 256;               // q and dOut stay in registers, else in shared memory
static constexpr int WARPS = D + V <= 384 ? 8 : 4, ROWS = 16 * WARPS, THREADS = 128 + 32 * WARPS;
static constexpr int QUERIES = ROWS / GP, WORDS = (QUERIES + 31) / 32;
static constexpr int ENTRIES = QUERIES * S;
static constexpr int PLANS = ENTRIES * (12 + 4 * WORDS) <= 16384 ? 2 : 1, PLANNERS = 96;
static constexpr int K_BYTES = KEYS * DP * 2, V_BYTES = KEYS * VP * 2;
static constexpr int RELEASES = 840;  // the least number that 1 to 8 divide

struct Params {
    Batch batch;
    const Real* q;        // [T, H, D]
    const Real* d_out;    // [T, H, V]
    const Real* gate;     // [T, H, 3], or null: 1
    const float* lse;     // [T, H], natural log
    const float* delta;   // [T, H]: gate · dOut·O of the branch
    const i32* indices;   // [T, K, S], ascending, then −1
    Real* dq;             // [T, H, D]
    float* sum;           // [T, H, D] where branches add up before the last one rounds into dq; or null: in dq
    const u32* not_finite;  // see `attend.cu`
    int tile_count, heads, kv_heads, group, gate_index;
    int first, last;      // whether this branch is the first, the last, that adds to dQ
    float scale;
};

// What is to be fetched for a tile, and for whom.
struct Plan {
    Tile tile;
    int kv_head;
    u32 total, stages;           // entries and stages to fetch
    int lists[QUERIES][S];       // the greatest block so far: it counts where it grows
    u32 wanted[ENTRIES][WORDS];  // of entry place·QUERIES + query: the queries that want its block
    u32 order[ENTRIES];          // entries in the order of fetching: entry | users << 16
    u32 begin[ENTRIES];          // their first stage, counted from the tile's
};

struct Shared {
    u8 k[STAGES][K_BYTES];
    u8 v[STAGES][V_BYTES];
    u8 q[KEEP ? 16 : ROWS * DP * 2];
    u8 o[KEEP ? 16 : ROWS * VP * 2];
    u64 full[STAGES], empty[STAGES], plan_full[PLANS], plan_empty[PLANS];
    Plan plans[PLANS];
    Issued issued;  // stages
};

// Stages of a block: those that reach past the last query are left out.
DEVICE int stages_of(const Tile& tile, int block) {
    return min(SB / KEYS, (tile.position + tile.rows - 1 - block * SB) / KEYS + 1);
}

// Reads the lists, a warp a query. What is none of a query's blocks, or was there before, counts for nothing.
DEVICE void read_lists(Plan& s, const Params& a, int thread) {
    int lane = thread & 31;
    Tile tile = s.tile;
    for (int query = thread / 32; query < QUERIES; query += PLANNERS / 32) {
        const i32* list = a.indices + ((i64)(tile.token + query) * a.kv_heads + s.kv_head) * S;
        int current = (tile.position + query) / SB, last = -1;
        bool ascends = true;
        for (int e = 0; e < S; e += 32) {
            int block = query < tile.rows && e + lane < S ? list[e + lane] : -1;
            int top = block >= 0 && block <= current ? block : -1, own = top;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                int below = __shfl_up_sync(ALL_LANES, top, offset);
                if (lane >= offset) top = max(top, below);
            }
            int before = __shfl_up_sync(ALL_LANES, top, 1);
            before = lane == 0 ? last : max(before, last);
            ascends &= own < 0 || own > before;
            top = max(top, last);
            last = __shfl_sync(ALL_LANES, top, 31);
            if (e + lane < S) s.lists[query][e + lane] = top;
        }
        if (__all_sync(ALL_LANES, ascends)) continue;
        __syncwarp();
        // Nobody's selection: the blocks one by one, the least first.
        for (int e = 0, block = -1; e < S; e++) {
            int next = 0x7fffffff;
            for (int i = lane; i < S; i += 32)
                if (list[i] > block && list[i] <= current) next = min(next, list[i]);
            next = __reduce_min_sync(ALL_LANES, next);
            if (next != 0x7fffffff) block = next;
            if (lane == 0) s.lists[query][e] = block;
        }
    }
}

// Who wants each entry's block; nobody if another entry comes first with it.
DEVICE void merge_lists(Plan& s, int thread) {
    for (int entry = thread; entry < ENTRIES; entry += PLANNERS) {
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
DEVICE u32 mine(const Plan& s, int entry, int warp) {
    if (GP >= 16) return s.wanted[entry][0] >> (warp * 16 / GP) & 1;
    static constexpr int EACH = GP >= 16 ? 1 : 16 / GP;
    int first = warp * EACH;
    return s.wanted[entry][first / 32] >> (first % 32) & ((1u << EACH) - 1);
}

// One warp: the order of fetching.
DEVICE void order_entries(Plan& s) {
    int lane = threadIdx.x & 31;
    Tile tile = s.tile;
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
    if (lane == 0) s.total = count, s.stages = stages;
}

// As tma_load, the tensor staying in L2 before others: K and V of a KV head are read again and again, what
// belongs to queries once.
DEVICE void tma_load_kept(void* target, const TensorMap* map, u64* barrier, int column, int head, int row) {
#ifdef NO_HINT
    tma_load(target, map, barrier, column, head, row);
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
        "{%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row), "l"(0x14F0000000000000ull)
        : "memory");
#endif
}

// Three warps.
DEVICE void plan(Shared& s, const Params& a) {
    int thread = threadIdx.x - (THREADS - PLANNERS);
    for (int n = 0, work = blockIdx.x; work < a.tile_count * a.kv_heads; n++, work += gridDim.x) {
        Plan& p = s.plans[n % PLANS];
        barrier_wait(&s.plan_empty[n % PLANS], (n / PLANS & 1) ^ 1);
        if (thread == 0) {
            p.tile = find_tile<QUERIES>(a.batch, a.tile_count - 1 - work % a.tile_count);
            p.kv_head = work / a.tile_count;
        }
        named_sync(1, PLANNERS);
        read_lists(p, a, thread);
        named_sync(1, PLANNERS);
        merge_lists(p, thread);
        named_sync(1, PLANNERS);
        if (thread < 32) {
            order_entries(p);
            __syncwarp();
            if (thread == 0) barrier_arrive(&s.plan_full[n % PLANS]);
        }
    }
}

// One thread.
DEVICE void produce(Shared& s, const TensorMap* k, const TensorMap* v, const Params& a) {
    int stage = 0;
    u32 parity = 1, issued = 0;
    for (int m = 0, work = blockIdx.x; work < a.tile_count * a.kv_heads; m++, work += gridDim.x) {
        const Plan& p = s.plans[m % PLANS];
        barrier_wait(&s.plan_full[m % PLANS], m / PLANS & 1);
        Tile tile = p.tile;
        int kv_head = p.kv_head, total = p.total;
        for (int n = 0; n < total; n++) {
            int entry = p.order[n] & 0xffff, block = p.lists[entry % QUERIES][entry / QUERIES];
            int count = stages_of(tile, block), row = tile.key + block * SB;
            for (int i = 0; i < count; i++, row += KEYS) {
                barrier_wait(&s.empty[stage], parity);
                barrier_expect(&s.full[stage], K_BYTES + V_BYTES);
                s.issued.publish(++issued);
#pragma unroll
                for (int c = 0; c < DP / PANEL; c++)
                    tma_load_kept(s.k[stage] + c * KEYS * 128, k, &s.full[stage], c * PANEL, kv_head, row);
#pragma unroll
                for (int c = 0; c < VP / PANEL; c++)
                    tma_load_kept(s.v[stage] + c * KEYS * 128, v, &s.full[stage], c * PANEL, kv_head, row);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        barrier_arrive(&s.plan_empty[m % PLANS]);
    }
}

// The warp's 16 rows as left operands: kept in registers, or in swizzled shared memory.
DEVICE u32 load_once(const Real* at) {
#if defined(NO_HINT) || defined(KV_HINT)
    return *(const u32*)at;
#else
    u32 x;
    asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(x) : "l"(at), "l"(0x12F0000000000000ull) : "memory");
    return x;
#endif
}

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
                x[part] = real[r] ? load_once(from + place[r] * DIM + column) : 0u;
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

// One warp's share of a tile, whose first stage is number `first`; `issued` is what Issued::wait keeps.
DEVICE void consume(Shared& s, const Plan& p, const Params& a, u32 first, u32& issued) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float scale_log2 = a.scale * 1.4426950408889634f;
    // The thread's two rows, each (token, head).
    auto find_row = [&](int r, i64& place) {
        int row = warp * 16 + lane / 4 + 8 * r, query = row / GP, head = row % GP;
        place = (i64)(p.tile.token + query) * a.heads + p.kv_head * a.group + head;
        return query < p.tile.rows && head < a.group;
    };
    bool real[2];
    i64 place[2];
    float lse[2], gate[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        real[r] = find_row(r, place[r]);
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

    int total = p.total;
    for (int base = 0; base < total; base += 32) {
        u32 order = base + lane < total ? p.order[base + lane] : 0;
        u32 own = base + lane < total ? mine(p, order & 0xffff, warp) : 0;
        u32 begin = base + lane < total ? first + p.begin[base + lane] : 0;
        for (u32 vote = __ballot_sync(ALL_LANES, own != 0); vote != 0; vote &= vote - 1) {
            int from = __ffs(vote) - 1;
            u32 here = __shfl_sync(ALL_LANES, order, from), at = __shfl_sync(ALL_LANES, begin, from);
            u32 wants = __shfl_sync(ALL_LANES, own, from);
            int entry = here & 0xffff, releases = RELEASES / (here >> 16);
            int block = p.lists[entry % QUERIES][entry / QUERIES], count = stages_of(p.tile, block);
            int limit[2];  // the last key of the stage that a row sees
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int query = (warp * 16 + lane / 4 + 8 * r) / GP;
                bool wanted = GP >= 16 || wants >> (query - warp * 16 / GP) & 1;
                limit[r] = wanted ? p.tile.position + query - block * SB : -1;
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
                        float x = gate[r] * exp2_approx(fmaf(scores[j][c], scale_log2, -lse[r]));
                        scores[j][c] = x * (d_p[j][c] - delta[r]);
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
        i64 to;
        bool inside = find_row(r, to);
        if (a.sum == nullptr) {
            store_row<D>((const float(&)[D / 2])dq, r, a.scale, a.dq + to * D, inside, !a.first);
            continue;
        }
        if (!inside) continue;
        float* sum = a.sum + to * D;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            int column = 8 * j + 2 * (lane % 4);
            float2 x = make_float2(dq[j][2 * r] * a.scale, dq[j][2 * r + 1] * a.scale);
            if (!a.first) {
                float2 before = *(const float2*)(sum + column);
                x.x += before.x, x.y += before.y;
            }
            if (a.last) *(u32*)(a.dq + to * D + column) = pack<Real>(x.x, x.y);
            else *(float2*)(sum + column) = x;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selected_backward_queries(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                              const __grid_constant__ Params a) {
    if (*a.not_finite) return;
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    if (threadIdx.x == 0) {
        s.issued.count = 0;
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], RELEASES);
        }
        for (int i = 0; i < PLANS; i++) {
            barrier_init(&s.plan_full[i], 1);
            barrier_init(&s.plan_empty[i], WARPS + 1);
        }
        barrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x >= 32 * WARPS) {
        if (WARPS == 8) registers_shrink<40>();
        if (threadIdx.x >= THREADS - PLANNERS) plan(s, a);
        else if (threadIdx.x == 32 * WARPS) produce(s, &k, &v, a);
    } else {
        if (WARPS == 8) registers_grow<232>();
        u32 first = 0, issued = 0;
        for (int n = 0, work = blockIdx.x; work < a.tile_count * a.kv_heads; n++, work += gridDim.x) {
            const Plan& p = s.plans[n % PLANS];
            barrier_wait(&s.plan_full[n % PLANS], n / PLANS & 1);
            consume(s, p, a, first, issued);
            first += p.stages;
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(&s.plan_empty[n % PLANS]);
        }
    }
}
