// Gradients of attention, without atomics: `attend_queries` and `selected_queries` own rows of dQ
// and walk the keys they see; `attend_keys` and `selected_keys` own keys, so dK and dV, and walk
// the rows that see them (for chosen blocks through the inverse index).
//
// With P = exp(scale·s − lse), dO the branch's (gate · dO) and Δ = ⟨dO, O⟩ of the branch:
// dV += Pᵀ·dO, dS = P∘(dO·Vᵀ − Δ), dQ += scale·dS·K, dK += scale·dSᵀ·Q.
#include "tile.cuh"

static constexpr int M = ROWS / SIDE, N = KEYS / SIDE;
static constexpr int K_ROW = Width<DIM_K>::row, V_ROW = Width<DIM_V>::row;

// What arrives from above, for the rows [T, H].
struct Upstream {
    const Real* d_out;   // [T, H, V]
    const Real* gate;    // [T, H, 3], or null: 1
    int index;           // this branch's gate
    const float* lse;    // [T, H]
    const float* delta;  // [T, H]
    DEVICE float gate_of(i64 row) const { return gate ? widen(gate[row * 3 + index]) : 1.0f; }
};

// dQ is summed over branches in f32: the first one overwrites `sum`, the last one rounds into `d_q`. Without
// `sum` they add up in `d_q` itself.
struct QueryGrad {
    Real* d_q;   // [T, H, D]
    float* sum;  // [T, H, D], or null
    int first, last;
};

DEVICE float probability(float score, float scale, float lse) {
    // A row that saw nothing weighs nothing.
    return lse == -INF ? 0.0f : expf(fmaf(scale, score, -lse));
}

struct QueryTiles {
    float *q, *d_o, *k, *v, *d_s;
    int* key;
    int* rest;
    DEVICE QueryTiles(float* shared) {
        q = shared;
        d_o = q + ROWS * K_ROW;
        k = d_o + ROWS * V_ROW;
        v = k + KEYS * K_ROW;
        d_s = v + KEYS * V_ROW;
        key = (int*)(d_s + ROWS * (KEYS + 4));
        rest = key + KEYS;
    }
};

struct QuerySums {
    float lse[M], delta[M];
    Range see[M];
    float d_q[M][Width<DIM_K>::groups][4];

    // Loads the rows' q, dO, lse and Δ; at(n) is row n of the tile in [T, H], negative for none.
    template <class At>
    DEVICE QuerySums(const QueryTiles& t, const Real* q, const Upstream& up, int dim_k, int dim_v, At at) {
        load_rows<DIM_K, ROWS>(t.q, q, dim_k, at);
        load_rows<DIM_V, ROWS>(t.d_o, up.d_out, dim_v, at, [&](int n) { return up.gate_of(at(n)); });
#pragma unroll
        for (int i = 0; i < M; i++) {
            i64 row = at(threadIdx.x / SIDE + SIDE * i);
            lse[i] = row < 0 ? -INF : up.lse[row];
            delta[i] = row < 0 ? 0.0f : up.delta[row];
        }
        clear<DIM_K>(d_q);
    }

    // One tile of keys, whose positions stand in t.key.
    template <class Row>
    DEVICE void add(const QueryTiles& t, const Real* k, const Real* v, int dim_k, int dim_v, Row row,
                    float scale) {
        int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
        bool bad = load_rows<DIM_K, KEYS>(t.k, k, dim_k, row);
        load_rows<DIM_V, KEYS>(t.v, v, dim_v, row);
        bad = __syncthreads_or(bad);
        float s[M][N], d_p[M][N];
        multiply<DIM_K>(t.q, t.k, s);
        multiply<DIM_V>(t.d_o, t.v, d_p);
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                int key = t.key[tx + SIDE * j];
                bool seen = key >= see[i].from && key < see[i].to;
                float d_s = probability(s[i][j], scale, lse[i]) * (d_p[i][j] - delta[i]);
                t.d_s[(ty + SIDE * i) * (KEYS + 4) + tx + SIDE * j] = seen ? d_s : 0.0f;
            }
        __syncthreads();
        if (bad) {
            accumulate_seen<DIM_K, KEYS>(t.d_s, t.k, d_q, [&](int i, int k) {
                return t.key[k] >= see[i].from && t.key[k] < see[i].to;
            });
        } else {
            accumulate<DIM_K, KEYS>(t.d_s, t.k, d_q);
        }
        __syncthreads();
    }

    template <class At>
    DEVICE void write(const QueryGrad& to, int dim_k, At at, float scale) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            i64 row = at(threadIdx.x / SIDE + SIDE * i);
            if (row < 0) continue;
            each_column<DIM_K>(dim_k, [&](int column, int g, int c) {
                i64 place = row * dim_k + column;
                float x = scale * d_q[i][g][c];
                if (!to.first) x += to.sum == nullptr ? widen(to.d_q[place]) : to.sum[place];
                if (to.last || to.sum == nullptr) to.d_q[place] = narrow<Real>(x);
                else to.sum[place] = x;
            });
        }
    }
};

#if !defined(ONE_ENTRY) || defined(ENTRY_attend_queries)
KERNEL __launch_bounds__(THREADS, 1)
    attend_queries(const Real* q, const Real* k, const Real* v, const Real* d_out, const Real* gate, int index,
        const float* lse, const float* delta, Real* d_q, float* sum, int first_branch, int last_branch,
        const Sequence* sequences, int count,
        int heads, int kv_heads, int dim_k, int dim_v, float scale, int kind, int window, int mask_block, int stride,
        const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Upstream up = {d_out, gate, index, lse, delta};
    QueryGrad to = {d_q, sum, first_branch, last_branch};
    Mask mask = {kind, window, mask_block, stride};
    extern __shared__ float shared[];
    QueryTiles t(shared);
    int ty = threadIdx.x / SIDE, group = heads / kv_heads;
    i64 id = (i64)gridDim.x - 1 - blockIdx.x;
    int kv_head = (int)(id % kv_heads);
    Item item = find_item(count, id / kv_heads, ROWS, [&](int b) { return (i64)sequences[b].query * group; });
    Sequence s = sequences[item.sequence];
    i64 first = item.index * ROWS, rows = (i64)s.queries * group;
    if (first >= rows) return;
    int first_key = mask.kind == COMPRESSED ? s.block : s.key, keys = mask.kind == COMPRESSED ? s.blocks : s.keys;
    auto row_of = [&](int n) -> i64 {
        i64 row = first + n;
        if (row >= rows) return -1;
        return (s.query + row / group) * heads + kv_head * group + row % group;
    };
    QuerySums sums(t, q, up, dim_k, dim_v, row_of);
#pragma unroll
    for (int i = 0; i < M; i++) {
        i64 row = first + ty + SIDE * i;
        sums.see[i] = row < rows ? visible(mask, s.position + (int)(row / group), keys) : Range{0, 0};
    }
    i64 last = min(first + ROWS, rows) - 1;
    int from = visible(mask, s.position + (int)(first / group), keys).from / KEYS * KEYS;
    int to_key = visible(mask, s.position + (int)(last / group), keys).to;
    for (int start = from; start < to_key; start += KEYS) {
        if (threadIdx.x < KEYS) t.key[threadIdx.x] = start + threadIdx.x;
        auto row = [&](int n) -> i64 {
            return start + n < keys ? (i64)(first_key + start + n) * kv_heads + kv_head : -1;
        };
        sums.add(t, k, v, dim_k, dim_v, row, scale);
    }
    sums.write(to, dim_k, row_of, scale);
}
#endif

#if !defined(ONE_ENTRY) || defined(ENTRY_selected_queries)
// One query and up to ROWS heads of one group a block.
KERNEL __launch_bounds__(THREADS, 1)
    selected_queries(const Real* q, const Real* k, const Real* v, const Real* d_out, const Real* gate, int index,
        const float* lse, const float* delta, Real* d_q, float* sum, int first_branch, int last_branch,
        const Sequence* sequences, int count,
        int heads, int kv_heads, int dim_k, int dim_v, float scale, const int* indices, int length, int block,
        const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Upstream up = {d_out, gate, index, lse, delta};
    QueryGrad to = {d_q, sum, first_branch, last_branch};
    extern __shared__ float shared[];
    QueryTiles t(shared);
    int ty = threadIdx.x / SIDE, group = heads / kv_heads, parts = (group + ROWS - 1) / ROWS;
    i64 id = (i64)gridDim.x - 1 - blockIdx.x;
    int part = (int)(id % parts), kv_head = (int)(id / parts % kv_heads), query = (int)(id / parts / kv_heads);
    Sequence s = sequences[find_sequence(sequences, count, query)];
    int position = s.position + query - s.query, current = position / block;
    auto row_of = [&](int n) -> i64 {
        int head = part * ROWS + n;
        return head < group ? (i64)query * heads + kv_head * group + head : -1;
    };
    QuerySums sums(t, q, up, dim_k, dim_v, row_of);
#pragma unroll
    for (int i = 0; i < M; i++) sums.see[i] = {0, row_of(ty + SIDE * i) < 0 ? 0 : min(position + 1, s.keys)};

    int* chosen = t.rest + 1;
    if (threadIdx.x < 32) {
        int found = chosen_blocks(indices + ((i64)query * kv_heads + kv_head) * length, length, current, chosen);
        if (threadIdx.x == 0) t.rest[0] = found;
    }
    __syncthreads();
    i64 total = (i64)t.rest[0] * block;
    for (i64 start = 0; start < total; start += KEYS) {
        if (threadIdx.x < KEYS) {
            i64 n = start + threadIdx.x;
            int key = MAX_INT;
            if (n < total) {
                i64 at = (i64)chosen[n / block] * block + n % block;
                if (at <= position && at < s.keys) key = (int)at;
            }
            t.key[threadIdx.x] = key;
        }
        __syncthreads();
        auto row = [&](int n) -> i64 {
            int key = t.key[n];
            return key == MAX_INT ? -1 : (i64)(s.key + key) * kv_heads + kv_head;
        };
        sums.add(t, k, v, dim_k, dim_v, row, scale);
    }
    sums.write(to, dim_k, row_of, scale);
}
#endif

// Keys are rows of this product: thread (ty, tx) has keys ty + 16·i and query rows tx + 16·j.
struct KeyTiles {
    float *k, *v, *q, *d_o, *p, *d_s, *lse, *delta;
    int* position;  // of each query row; −1 for none
    DEVICE KeyTiles(float* shared) {
        k = shared;
        v = k + KEYS * K_ROW;
        q = v + KEYS * V_ROW;
        d_o = q + ROWS * K_ROW;
        p = d_o + ROWS * V_ROW;
        d_s = p + KEYS * (ROWS + 4);
        lse = d_s + KEYS * (ROWS + 4);
        delta = lse + ROWS;
        position = (int*)(delta + ROWS);
    }
};

// dK and dV of the keys at positions first..end of their sequence. Row n of `rows` is row row(n) of
// [T, H], whose query is at position(n) and sees visible(mask, …). Rows are summed tile by tile
// before they join the rest: a key may meet a million of them.
template <class Row, class Position, class KeyRow>
DEVICE void keys_of(const KeyTiles& t, const Real* q, const Real* k, const Real* v, const Upstream& up,
                    i64 rows, Row row, Position position, KeyRow key_row, int first, int end, int keys,
                    const Mask& mask, float scale, Real* d_k, Real* d_v, int dim_k, int dim_v) {
    int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
    load_rows<DIM_K, KEYS>(t.k, k, dim_k, key_row);
    load_rows<DIM_V, KEYS>(t.v, v, dim_v, key_row);
    float sum_k[N][Width<DIM_K>::groups][4], sum_v[N][Width<DIM_V>::groups][4];
    clear<DIM_K>(sum_k);
    clear<DIM_V>(sum_v);
    for (i64 start = 0; start < rows; start += ROWS) {
        auto at = [&](int n) -> i64 { return start + n < rows ? row(start + n) : -1; };
        if (threadIdx.x < ROWS) {
            int n = threadIdx.x;
            i64 r = at(n);
            t.position[n] = r < 0 ? -1 : position(start + n);
            t.lse[n] = r < 0 ? -INF : up.lse[r];
            t.delta[n] = r < 0 ? 0.0f : up.delta[r];
        }
        bool bad = load_rows<DIM_K, ROWS>(t.q, q, dim_k, at);
        bad |= load_rows<DIM_V, ROWS>(t.d_o, up.d_out, dim_v, at, [&](int n) { return up.gate_of(at(n)); });
        bad = __syncthreads_or(bad);
        auto sees = [&](int i, int n) -> bool {
            int key = first + ty + SIDE * i, p = t.position[n];
            if (p < 0 || key >= end) return false;
            Range range = visible(mask, p, keys);
            return key >= range.from && key < range.to;
        };
        float s[N][M], d_p[N][M];
        multiply<DIM_K>(t.k, t.q, s);
        multiply<DIM_V>(t.v, t.d_o, d_p);
#pragma unroll
        for (int j = 0; j < M; j++) {
            int n = tx + SIDE * j;
#pragma unroll
            for (int i = 0; i < N; i++) {
                bool seen = sees(i, n);
                float p = probability(s[i][j], scale, t.lse[n]);
                float d_s = p * (d_p[i][j] - t.delta[n]);
                int place = (ty + SIDE * i) * (ROWS + 4) + n;
                t.p[place] = seen ? p : 0.0f;
                t.d_s[place] = seen ? d_s : 0.0f;
            }
        }
        __syncthreads();
        {
            float part[N][Width<DIM_V>::groups][4];
            clear<DIM_V>(part);
            if (bad) accumulate_seen<DIM_V, ROWS>(t.p, t.d_o, part, sees);
            else accumulate<DIM_V, ROWS>(t.p, t.d_o, part);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int g = 0; g < Width<DIM_V>::groups; g++)
#pragma unroll
                    for (int c = 0; c < 4; c++) sum_v[i][g][c] += part[i][g][c];
        }
        {
            float part[N][Width<DIM_K>::groups][4];
            clear<DIM_K>(part);
            if (bad) accumulate_seen<DIM_K, ROWS>(t.d_s, t.q, part, sees);
            else accumulate<DIM_K, ROWS>(t.d_s, t.q, part);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int g = 0; g < Width<DIM_K>::groups; g++)
#pragma unroll
                    for (int c = 0; c < 4; c++) sum_k[i][g][c] += part[i][g][c];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        i64 r = key_row(ty + SIDE * i);
        if (r < 0) continue;
        each_column<DIM_K>(dim_k, [&](int column, int g, int c) {
            d_k[r * dim_k + column] = narrow<Real>(scale * sum_k[i][g][c]);
        });
        each_column<DIM_V>(dim_v, [&](int column, int g, int c) {
            d_v[r * dim_v + column] = narrow<Real>(sum_v[i][g][c]);
        });
    }
}

#if !defined(ONE_ENTRY) || defined(ENTRY_attend_keys)
KERNEL __launch_bounds__(THREADS, 1)
    attend_keys(const Real* q, const Real* k, const Real* v, const Real* d_out, const Real* gate, int index,
        const float* lse, const float* delta, Real* d_k, Real* d_v,
        const Sequence* sequences, int count,
        int heads, int kv_heads, int dim_k, int dim_v, float scale, int kind, int window, int mask_block, int stride,
        const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Upstream up = {d_out, gate, index, lse, delta};
    Mask mask = {kind, window, mask_block, stride};
    extern __shared__ float shared[];
    KeyTiles t(shared);
    int group = heads / kv_heads;
    bool compressed = mask.kind == COMPRESSED;
    // Early keys are seen by the most queries: they start first.
    int kv_head = blockIdx.x % kv_heads;
    Item item = find_item(count, blockIdx.x / kv_heads, KEYS, [&](int b) {
        return (i64)(compressed ? sequences[b].block : sequences[b].key);
    });
    Sequence s = sequences[item.sequence];
    int first_key = compressed ? s.block : s.key, keys = compressed ? s.blocks : s.keys;
    if (item.index * KEYS >= keys) return;
    int first = (int)item.index * KEYS, end = min(first + KEYS, keys);
    Range seen_by = observers(mask, first, end);
    int from = max(seen_by.from - s.position, 0);
    int to = (int)min((i64)seen_by.to - s.position + 1, (i64)s.queries);
    i64 rows = to > from ? (i64)(to - from) * group : 0;
    keys_of(
        t, q, k, v, up, rows,
        [&](i64 n) -> i64 { return (s.query + from + n / group) * heads + kv_head * group + n % group; },
        [&](i64 n) -> int { return s.position + from + (int)(n / group); },
        [&](int n) -> i64 { return first + n < end ? (i64)(first_key + first + n) * kv_heads + kv_head : -1; },
        first, end, keys, mask, scale, d_k, d_v, dim_k, dim_v);
}
#endif

#if !defined(ONE_ENTRY) || defined(ENTRY_selected_keys)
// `starts` [K, J + 1] and `queries` are the inverse index of `inverse.cu`; a block of `block` keys
// is `parts` tiles.
KERNEL __launch_bounds__(THREADS, 1)
    selected_keys(const Real* q, const Real* k, const Real* v, const Real* d_out, const Real* gate, int index,
        const float* lse, const float* delta, Real* d_k, Real* d_v,
        const Sequence* sequences, int count,
        int heads, int kv_heads, int dim_k, int dim_v, float scale, const i64* starts, const int* queries,
        int blocks, int block, int parts, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Upstream up = {d_out, gate, index, lse, delta};
    extern __shared__ float shared[];
    KeyTiles t(shared);
    int group = heads / kv_heads, part = blockIdx.x % parts, kv_head = blockIdx.x / parts % kv_heads;
    int number = blockIdx.x / parts / kv_heads;
    Item item = find_item(count, number, block, [&](int b) { return (i64)sequences[b].key; });
    Sequence s = sequences[item.sequence];
    i64 first = item.index * block + part * KEYS, end = min(min(first + KEYS, (item.index + 1) * block), (i64)s.keys);
    if (first >= end) return;
    const i64* range = starts + (i64)kv_head * blocks + number;
    const int* list = queries + range[0];
    keys_of(
        t, q, k, v, up, (range[1] - range[0]) * group,
        [&](i64 n) -> i64 { return (i64)(s.query + list[n / group]) * heads + kv_head * group + n % group; },
        [&](i64 n) -> int { return s.position + list[n / group]; },
        [&](int n) -> i64 { return first + n < end ? (s.key + first + n) * kv_heads + kv_head : -1; },
        (int)first, (int)end, s.keys, Mask{0, 0, 1, 1}, scale, d_k, d_v, dim_k, dim_v);
}
#endif
