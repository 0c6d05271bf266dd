// Attention of every row (query, head of the group) to the keys it sees, by the online softmax:
// `attend` under a mask, `selected` to the blocks that each query chose.
//
// A tile is ROWS consecutive rows of one KV head; row n is query n / G, head n % G. Scores are
// raw q·k until the exponential, exp(scale · (s − max)): exactly 1 at the maximum.
#include "tile.cuh"

static constexpr int M = ROWS / SIDE, N = KEYS / SIDE;
static constexpr int KV_ROW = Width<DIM_K>::row > Width<DIM_V>::row ? Width<DIM_K>::row : Width<DIM_V>::row;

struct Tiles {
    float *q, *kv, *p;
    int* key;  // position of each of the tile's keys; MAX_INT where there is none
    int* rest;
    DEVICE Tiles(float* shared) {
        q = shared;
        kv = q + ROWS * Width<DIM_K>::row;
        p = kv + KEYS * KV_ROW;
        key = (int*)(p + ROWS * (KEYS + 4));
        rest = key + KEYS;
    }
};

// Where results go; null pointers are skipped.
struct Output {
    Real* branch;      // [T, H, V]
    float* lse;        // [T, H], natural log; −∞ where nothing is seen
    Real* out;         // [T, H, V] gated
    const Real* gate;  // [T, H, 3]
    int index;         // this branch's gate
    int add;           // to what `out` holds
};

struct Softmax {
    float max[M], sum[M];  // of raw scores; sums are of the thread's own keys
    float o[M][Width<DIM_V>::groups][4];

    DEVICE Softmax() {
#pragma unroll
        for (int i = 0; i < M; i++) max[i] = -INF, sum[i] = 0.0f;
        clear<DIM_V>(o);
    }

    // One tile of keys, whose positions stand in t.key. row(k) is the row of key k of the tile.
    template <class Row>
    DEVICE void add(const Tiles& t, const Real* k, const Real* v, int dim_k, int dim_v, Row row,
                    const Range (&see)[M], float scale) {
        int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
        load_rows<DIM_K, KEYS>(t.kv, k, dim_k, row);
        __syncthreads();
        float s[M][N];
        multiply<DIM_K>(t.q, t.kv, s);
#pragma unroll
        for (int i = 0; i < M; i++) {
            float top = max[i];
#pragma unroll
            for (int j = 0; j < N; j++) {
                int key = t.key[tx + SIDE * j];
                if (key < see[i].from || key >= see[i].to) s[i][j] = -INF;
                top = fmaxf(top, s[i][j]);
            }
            top = rows_max(top);
            float base = top == -INF ? 0.0f : top;
            float shrink = top == max[i] ? 1.0f : expf(scale * (max[i] - top));
            max[i] = top;
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < N; j++) {
                int key = t.key[tx + SIDE * j];
                float p = expf(scale * (s[i][j] - base));
                if (key < see[i].from || key >= see[i].to) p = 0.0f;
                t.p[(ty + SIDE * i) * (KEYS + 4) + tx + SIDE * j] = p;
                total += p;
            }
            sum[i] = sum[i] * shrink + total;
#pragma unroll
            for (int g = 0; g < Width<DIM_V>::groups; g++)
#pragma unroll
                for (int c = 0; c < 4; c++) o[i][g][c] *= shrink;
        }
        __syncthreads();
        bool bad = load_rows<DIM_V, KEYS>(t.kv, v, dim_v, row);
        if (__syncthreads_or(bad)) {
            accumulate_seen<DIM_V, KEYS>(t.p, t.kv, o, [&](int i, int k) {
                return t.key[k] >= see[i].from && t.key[k] < see[i].to;
            });
        } else {
            accumulate<DIM_V, KEYS>(t.p, t.kv, o);
        }
        __syncthreads();
    }

    // Row i's result goes to vector number at(i) of [T, H]; negative: nowhere.
    template <class At>
    DEVICE void write(const Output& to, int dim_v, At at, float scale) {
        int tx = threadIdx.x % SIDE;
#pragma unroll
        for (int i = 0; i < M; i++) {
            float total = rows_sum(sum[i]);
            float inverse = total == 0.0f ? 0.0f : 1.0f / total;
            i64 row = at(i);
            if (row < 0) continue;
            if (tx == 0 && to.lse) to.lse[row] = total == 0.0f ? -INF : fmaf(scale, max[i], logf(total));
            each_column<DIM_V>(dim_v, [&](int column, int g, int c) {
                Real x = narrow<Real>(o[i][g][c] * inverse);
                i64 place = row * dim_v + column;
                if (to.branch) to.branch[place] = x;
                if (!to.out) return;
                // One rounding, whatever a compiler makes of the cases.
                float before = to.add ? widen(to.out[place]) : 0.0f;
                to.out[place] = narrow<Real>(fmaf(widen(to.gate[row * 3 + to.index]), widen(x), before));
            });
        }
    }
};

#if !defined(ONE_ENTRY) || defined(ENTRY_attend)
KERNEL __launch_bounds__(THREADS, 1)
    attend(const Real* q, const Real* k, const Real* v, Real* branch, float* lse, Real* out, const Real* gate,
           int index, int add, const Sequence* sequences, int count, int heads, int kv_heads, int dim_k,
           int dim_v, float scale,
           int kind, int window, int block, int stride, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Output to = {branch, lse, out, gate, index, add};
    Mask mask = {kind, window, block, stride};
    extern __shared__ float shared[];
    Tiles t(shared);
    int ty = threadIdx.x / SIDE, group = heads / kv_heads;
    // Late tiles see the most keys: they start first.
    i64 id = (i64)gridDim.x - 1 - blockIdx.x;
    int kv_head = (int)(id % kv_heads);
    Item item = find_item(count, id / kv_heads, ROWS, [&](int b) { return (i64)sequences[b].query * group; });
    Sequence s = sequences[item.sequence];
    i64 first = item.index * ROWS, rows = (i64)s.queries * group;
    if (first >= rows) return;
    int first_key = mask.kind == COMPRESSED ? s.block : s.key, keys = mask.kind == COMPRESSED ? s.blocks : s.keys;

    // Row n of the tile as a vector of [T, H].
    auto row_of = [&](int n) -> i64 {
        i64 row = first + n;
        if (row >= rows) return -1;
        return (s.query + row / group) * heads + kv_head * group + row % group;
    };
    load_rows<DIM_K, ROWS>(t.q, q, dim_k, row_of);
    Range see[M];
#pragma unroll
    for (int i = 0; i < M; i++) {
        i64 row = first + ty + SIDE * i;
        see[i] = row < rows ? visible(mask, s.position + (int)(row / group), keys) : Range{0, 0};
    }
    i64 last = min(first + ROWS, rows) - 1;
    int from = visible(mask, s.position + (int)(first / group), keys).from / KEYS * KEYS;
    int to_key = visible(mask, s.position + (int)(last / group), keys).to;

    Softmax softmax;
    for (int start = from; start < to_key; start += KEYS) {
        if (threadIdx.x < KEYS) t.key[threadIdx.x] = start + threadIdx.x;
        auto row = [&](int n) -> i64 {
            return start + n < keys ? (i64)(first_key + start + n) * kv_heads + kv_head : -1;
        };
        softmax.add(t, k, v, dim_k, dim_v, row, see, scale);
    }
    softmax.write(to, dim_v, [&](int i) { return row_of(ty + SIDE * i); }, scale);
}
#endif

#if !defined(ONE_ENTRY) || defined(ENTRY_selected)
// One query and up to ROWS heads of one group a block. `t.rest` holds the list of its blocks.
KERNEL __launch_bounds__(THREADS, 1)
    selected(const Real* q, const Real* k, const Real* v, Real* branch, float* lse, Real* out, const Real* gate,
             int index, int add, const Sequence* sequences, int count, int heads, int kv_heads, int dim_k,
           int dim_v, float scale,
             const int* indices, int length, int block, const u32* wanted) {
    if (wanted != nullptr && *wanted == 0) return;
    Output to = {branch, lse, out, gate, index, add};
    extern __shared__ float shared[];
    Tiles t(shared);
    int ty = threadIdx.x / SIDE, group = heads / kv_heads, parts = (group + ROWS - 1) / ROWS;
    i64 id = (i64)gridDim.x - 1 - blockIdx.x;
    int part = (int)(id % parts), kv_head = (int)(id / parts % kv_heads), query = (int)(id / parts / kv_heads);
    Sequence s = sequences[find_sequence(sequences, count, query)];
    int position = s.position + query - s.query, current = position / block;

    auto row_of = [&](int n) -> i64 {
        int head = part * ROWS + n;
        return head < group ? (i64)query * heads + kv_head * group + head : -1;
    };
    load_rows<DIM_K, ROWS>(t.q, q, dim_k, row_of);
    Range see[M];
#pragma unroll
    for (int i = 0; i < M; i++) see[i] = {0, row_of(ty + SIDE * i) < 0 ? 0 : min(position + 1, s.keys)};

    int* chosen = t.rest + 1;
    if (threadIdx.x < 32) {
        int found = chosen_blocks(indices + ((i64)query * kv_heads + kv_head) * length, length, current, chosen);
        if (threadIdx.x == 0) t.rest[0] = found;
    }
    __syncthreads();
    i64 total = (i64)t.rest[0] * block;

    Softmax softmax;
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
        softmax.add(t, k, v, dim_k, dim_v, row, see, scale);
    }
    softmax.write(to, dim_v, [&](int i) { return row_of(ty + SIDE * i); }, scale);
}
#endif
