// dK and dV of one branch: a block owns some keys of a key-value head and walks all queries that see
// them, from the last to the first, for all heads of the group. Sums stay in registers, so there are
// no atomics and the same bits every time.
//
// Scores are computed with keys as rows (Sᵀ = K·Qᵀ, dPᵀ = V·dOutᵀ), so that g·P and dS leave the
// registers of one product for the next (dV += (gP)ᵀ·dOut, dK += dSᵀ·Q) without shared memory.
//  * D, V ≤ 128: 128 keys, each of two warpgroups 64 of them with dK and dV.
//  * larger:     64 keys; warpgroup 0 keeps Sᵀ and dV, warpgroup 1 dPᵀ and dK, and g·P goes from a
//                thread of the first to the same thread of the second through shared memory.
//
// Where keys are few (compressed), `head_parts` and `range_parts` split a tile's work over blocks;
// each then writes its own f32 sums and `attend_backward_sum` adds them in order.
//
// Constants: see backward.cuh, and STAGES. Grid: parts · tiles · K blocks. Block: 384 threads.
#include "backward.cuh"
#include "sequences.cuh"

static constexpr bool SHARED_KEYS = D > 128 || V > 128;
static constexpr int KEYS = SHARED_KEYS ? 64 : 128, QUERIES = 64, CONSUMERS = 2;
static constexpr int K_BYTES = KEYS * DP * 2, V_BYTES = KEYS * VP * 2;
static constexpr int Q_BYTES = QUERIES * DP * 2, O_BYTES = QUERIES * VP * 2, ROW_BYTES = QUERIES * 16;

// Keys `index..index+rows` of a sequence, in rows `key..` of k and v; its `length` tokens begin at `token`.
struct KeyTile {
    int key, rows, index, token, length;
};

// As `find_tile`, of keys.
DEVICE KeyTile find_keys(const Batch& batch, int item) {
    auto start = [](const Sequence& s) { return MASK == COMPRESSED ? s.block : s.key; };
    int low = 0, high = batch.count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (start(batch.sequences[middle]) / KEYS + middle <= item) low = middle;
        else high = middle - 1;
    }
    Sequence of = batch.sequences[low];
    int index = (item - (start(of) / KEYS + low)) * KEYS;
    int rows = max(0, min(KEYS, (MASK == COMPRESSED ? of.blocks : of.keys) - index));
    return {start(of) + index, rows, index, of.query, of.queries};
}

struct Params {
    Batch batch;
    int tile_count, group, kv_heads;
    int head_parts, range_parts;
    float scale_log2, scale;
    Visible visible;
    Real *dk, *dv;               // [N, K, D], [N, K, V]; written if there is one part
    float *dk_parts, *dv_parts;  // [parts, N, K, D], [parts, N, K, V]; written if there are more
    i64 keys;                    // N
    const u32* not_finite;       // a flag that says: do nothing; or null
};

struct Shared {
    u8 k[K_BYTES];
    u8 v[V_BYTES];
    u8 q[STAGES][Q_BYTES];
    u8 o[STAGES][O_BYTES];                              // dOut
    float4 rows[STAGES][QUERIES];                       // log-sum-exp (base 2), gate, δ, 0
    Vec<u32, 4> p[SHARED_KEYS ? 2 : 1][SHARED_KEYS ? 4 : 1][SHARED_KEYS ? 128 : 1];  // g·P
    u64 keys_full, full[STAGES], empty[STAGES], p_full[2], p_empty[2];
};

// A block's share: query tiles [first, last) of the sequence, heads [head, head + heads).
struct Work {
    KeyTile tile;
    int kv_head, head, heads, first, last, part;
};

DEVICE void produce(Shared& s, const TensorMap* k, const TensorMap* v, const TensorMap* q, const TensorMap* o,
                    const TensorMap* rows, const Work& w) {
    barrier_expect(&s.keys_full, K_BYTES + V_BYTES);
#pragma unroll
    for (int c = 0; c < DP / PANEL; c++)
        tma_load(s.k + c * KEYS * 128, k, &s.keys_full, c * PANEL, w.kv_head, w.tile.key);
#pragma unroll
    for (int c = 0; c < VP / PANEL; c++)
        tma_load(s.v + c * KEYS * 128, v, &s.keys_full, c * PANEL, w.kv_head, w.tile.key);
    int stage = 0;
    u32 parity = 1;
    for (int t = w.last - 1; t >= w.first; t--) {
        int token = w.tile.token + t * QUERIES;
        for (int head = w.head; head < w.head + w.heads; head++) {
            barrier_wait(&s.empty[stage], parity);
            barrier_expect(&s.full[stage], Q_BYTES + O_BYTES + ROW_BYTES);
#pragma unroll
            for (int c = 0; c < DP / PANEL; c++)
                tma_load(s.q[stage] + c * QUERIES * 128, q, &s.full[stage], c * PANEL, head, token);
#pragma unroll
            for (int c = 0; c < VP / PANEL; c++)
                tma_load(s.o[stage] + c * QUERIES * 128, o, &s.full[stage], c * PANEL, head, token);
            tma_load(s.rows[stage], rows, &s.full[stage], 0, token, head);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// The two rows (keys) of a thread, from key `index` of the sequence: which queries see them.
struct Edge {
    int first[2], last[2];     // of the thread's rows
    int whole_from, whole_to;  // queries that see all 64 keys of the warpgroup
    int from, to;              // queries that see any of them

    DEVICE Edge(const Params& a, const KeyTile& tile, int index, int row) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            first[r] = first_query(a.visible, index + row + 8 * r);
            last[r] = last_query(a.visible, index + row + 8 * r, tile.length);
        }
        whole_from = first_query(a.visible, index + 63);
        whole_to = last_query(a.visible, index, tile.length);
        from = first_query(a.visible, index);
        to = last_query(a.visible, index + 63, tile.length);
    }
    // Whether none of queries position..position+64 sees any key of the warpgroup.
    DEVICE bool outside(int position) const { return position + QUERIES <= from || position >= to; }
    // Hides what queries position..position+64 do not see.
    DEVICE void trim(float (&scores)[QUERIES / 2], int position) const {
        if (position >= whole_from && position + QUERIES <= whole_to) return;
        int column = position + 2 * (threadIdx.x & 3);
        int from[2] = {first[0] - column, first[1] - column}, to[2] = {last[0] - column, last[1] - column};
        hide<QUERIES>(scores, from, to);
    }
};

// Scores become g·P.
DEVICE void exponentials(float (&scores)[QUERIES / 2], const float4* rows, float scale_log2) {
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float2 row = *(const float2*)&rows[8 * j + 2 * (threadIdx.x & 3) + c];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float& x = scores[4 * j + 2 * r + c];
                x = exp2_approx(fmaf(x, scale_log2, -row.x)) * row.y;
            }
        }
    }
}

DEVICE void pack_all(u32 (&p)[QUERIES / 4], const float (&x)[QUERIES / 2]) {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) p[i] = pack<Real>(x[2 * i], x[2 * i + 1]);
}

// A thread's two rows of dK or dV go out.
template <int N>
DEVICE void store(const float (&d)[N / 2], const Params& a, const Work& w, int row, float factor, Real* out,
                  float* parts) {
    i64 pitch = (i64)a.kv_heads * N, place = (w.tile.key + row) * pitch + w.kv_head * N;
    bool inside[2] = {row < w.tile.rows, row + 8 < w.tile.rows};
    if (a.head_parts * a.range_parts == 1) {
        Real* to[2] = {out + place, out + place + 8 * pitch};
        float factors[2] = {factor, factor};
        store_rows<N>(d, factors, to, inside, false);
        return;
    }
    float* to = parts + w.part * a.keys * pitch + place + 2 * (threadIdx.x & 3);
#pragma unroll
    for (int r = 0; r < 2; r++, to += 8 * pitch) {
        if (!inside[r]) continue;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
            *(float2*)(to + 8 * j) = make_float2(d[4 * j + 2 * r] * factor, d[4 * j + 2 * r + 1] * factor);
    }
}

// dS = g·P·(dP − δ).
DEVICE void scale_rest(u32 (&ds)[QUERIES / 4], const float (&p)[QUERIES / 2], const float (&dp)[QUERIES / 2],
                       const float4* rows) {
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
        int column = 8 * j + 2 * (threadIdx.x & 3);
        float delta[2] = {rows[column].z, rows[column + 1].z};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int x = 4 * j + 2 * r;
            ds[x / 2] = pack<Real>(p[x] * (dp[x] - delta[0]), p[x + 1] * (dp[x + 1] - delta[1]));
        }
    }
}

// The block's tiles in order: the heads of one tile of queries follow each other, so that blocks which
// began together fetch the same rows together, however long each goes on.
struct Walk {
    int heads, count, tile, head, stage;
    u32 parity;

    DEVICE Walk(const Work& w)
        : heads(w.heads), count((w.last - w.first) * w.heads), tile(w.last - 1), head(0), stage(0), parity(0) {}
    DEVICE void step() {
        if (++head == heads) head = 0, tile--;
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// 128 keys: each warpgroup does everything for 64 of them. Exponentials run under dP, dS under dV.
DEVICE void consume_own(Shared& s, const Params& a, const Work& w) {
    int warpgroup = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    Edge edge(a, w.tile, w.tile.index + warpgroup * 64, row);
    float dk[D / 2], dv[V / 2], scores[QUERIES / 2], dp[QUERIES / 2];
    u32 p[QUERIES / 4], ds[QUERIES / 4];
    clear(dk);
    clear(dv);
    u64 keys = descriptor_rows(s.k + warpgroup * 64 * 128), values = descriptor_rows(s.v + warpgroup * 64 * 128);
    barrier_wait(&s.keys_full, 0);
    for (Walk at(w); at.count > 0; at.count--) {
        barrier_wait(&s.full[at.stage], at.parity);
        if (edge.outside(at.tile * QUERIES)) {
            if (lane == 0) barrier_arrive(&s.empty[at.stage]);
            at.step();
            continue;
        }
        multiply_rows<QUERIES, D, KEYS * 128, QUERIES * 128>(scores, keys, descriptor_rows(s.q[at.stage]));
        multiply_rows<QUERIES, V, KEYS * 128, QUERIES * 128>(dp, values, descriptor_rows(s.o[at.stage]));
        wgmma_wait<1>();
        wgmma_hold(scores);
        edge.trim(scores, at.tile * QUERIES);
        exponentials(scores, s.rows[at.stage], a.scale_log2);
        pack_all(p, scores);
        add_product<V, QUERIES>(dv, p, descriptor_columns(s.o[at.stage], QUERIES * 128));
        wgmma_wait<1>();
        wgmma_hold(dp);
        scale_rest(ds, scores, dp, s.rows[at.stage]);
        add_product<D, QUERIES>(dk, ds, descriptor_columns(s.q[at.stage], QUERIES * 128));
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[at.stage]);
        at.step();
    }
    wgmma_hold(dk);
    wgmma_hold(dv);
    store<D>(dk, a, w, warpgroup * 64 + row, a.scale, a.dk, a.dk_parts);
    store<V>(dv, a, w, warpgroup * 64 + row, 1.0f, a.dv, a.dv_parts);
}

// 64 keys, warpgroup 0: scores, g·P, dV.
DEVICE void consume_values(Shared& s, const Params& a, const Work& w) {
    int thread = threadIdx.x % 128, lane = threadIdx.x % 32, row = thread / 32 * 16 + lane / 4;
    Edge edge(a, w.tile, w.tile.index, row);
    float dv[V / 2], scores[QUERIES / 2];
    u32 p[QUERIES / 4];
    clear(dv);
    u64 keys = descriptor_rows(s.k);
    barrier_wait(&s.keys_full, 0);
    int side = 0;
    u32 turn = 1;
    for (Walk at(w); at.count > 0; at.count--) {
        barrier_wait(&s.full[at.stage], at.parity);
        multiply_rows<QUERIES, D, KEYS * 128, QUERIES * 128>(scores, keys, descriptor_rows(s.q[at.stage]));
        wgmma_wait<0>();
        wgmma_hold(scores);
        edge.trim(scores, at.tile * QUERIES);
        exponentials(scores, s.rows[at.stage], a.scale_log2);
        pack_all(p, scores);
        add_product<V, QUERIES>(dv, p, descriptor_columns(s.o[at.stage], QUERIES * 128));
        barrier_wait(&s.p_empty[side], turn);
#pragma unroll
        for (int c = 0; c < 4; c++)
            s.p[side][c][thread] = Vec<u32, 4>{{p[4 * c], p[4 * c + 1], p[4 * c + 2], p[4 * c + 3]}};
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.p_full[side]);
        turn ^= side;
        side ^= 1;
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[at.stage]);
        at.step();
    }
    wgmma_hold(dv);
    store<V>(dv, a, w, row, 1.0f, a.dv, a.dv_parts);
}

// 64 keys, warpgroup 1: dP, dS, dK.
DEVICE void consume_keys(Shared& s, const Params& a, const Work& w) {
    int thread = threadIdx.x % 128, lane = threadIdx.x % 32, row = thread / 32 * 16 + lane / 4;
    float dk[D / 2], dp[QUERIES / 2], p[QUERIES / 2];
    u32 ds[QUERIES / 4];
    clear(dk);
    u64 values = descriptor_rows(s.v);
    barrier_wait(&s.keys_full, 0);
    int side = 0;
    u32 turn = 0;
    for (Walk at(w); at.count > 0; at.count--) {
        barrier_wait(&s.full[at.stage], at.parity);
        multiply_rows<QUERIES, V, KEYS * 128, QUERIES * 128>(dp, values, descriptor_rows(s.o[at.stage]));
        barrier_wait(&s.p_full[side], turn);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            Vec<u32, 4> four = s.p[side][c][thread];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 pair = unpack<Real>(four.at[i]);
                p[8 * c + 2 * i] = pair.x;
                p[8 * c + 2 * i + 1] = pair.y;
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.p_empty[side]);
        turn ^= side;
        side ^= 1;
        wgmma_wait<0>();
        wgmma_hold(dp);
        scale_rest(ds, p, dp, s.rows[at.stage]);
        add_product<D, QUERIES>(dk, ds, descriptor_columns(s.q[at.stage], QUERIES * 128));
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(&s.empty[at.stage]);
        at.step();
    }
    wgmma_hold(dk);
    store<D>(dk, a, w, row, a.scale, a.dk, a.dk_parts);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attend_backward_keys(const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                         const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap o,
                         const __grid_constant__ TensorMap rows, const __grid_constant__ Params a) {
    if (a.not_finite != nullptr && *a.not_finite) return;
    extern __shared__ __align__(1024) u8 raw[];
    Shared& s = *(Shared*)raw;
    int parts = a.head_parts * a.range_parts, block = blockIdx.x / parts;
    Work w;
    w.part = blockIdx.x % parts;
    w.tile = find_keys(a.batch, block % a.tile_count);  // in a sequence the longest first
    if (w.tile.rows == 0) return;
    w.kv_head = block / a.tile_count;
    w.heads = a.group / a.head_parts;
    w.head = w.kv_head * a.group + w.part / a.range_parts * w.heads;
    int range = w.part % a.range_parts;
    int first = first_query(a.visible, w.tile.index) / QUERIES;
    int last = (last_query(a.visible, w.tile.index + w.tile.rows - 1, w.tile.length) + QUERIES - 1) / QUERIES;
    int tiles = max(0, last - first);
    w.first = first + (int)((i64)tiles * range / a.range_parts);
    w.last = first + (int)((i64)tiles * (range + 1) / a.range_parts);

    if (threadIdx.x == 0) {
        barrier_init(&s.keys_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], CONSUMERS * 4);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&s.p_full[i], 4);
            barrier_init(&s.p_empty[i], 4);
        }
        barrier_fence_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_shrink<24>();
        if (threadIdx.x == 0) produce(s, &k, &v, &q, &o, &rows, w);
    } else {
        registers_grow<240>();
        if constexpr (!SHARED_KEYS) consume_own(s, a, w);
        else if (threadIdx.x < 256) consume_values(s, a, w);
        else consume_keys(s, a, w);
    }
}

// out[i] = Σ parts[·][i], in order; four numbers a thread.
KERNEL attend_backward_sum(const float* parts, Real* out, i64 size, int count) {
    i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (at >= size) return;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int part = 0; part < count; part++) {
        auto x = *(const Vec<float, 4>*)(parts + part * size + at);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += x.at[i];
    }
    Vec<Real, 4> y;
#pragma unroll
    for (int i = 0; i < 4; i++) y.at[i] = narrow<Real>(sum[i]);
    *(Vec<Real, 4>*)(out + at) = y;
}
