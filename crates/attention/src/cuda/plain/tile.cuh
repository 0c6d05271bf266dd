// What every plain kernel shares: tiles of f32 in shared memory, products of two of them in
// registers, sequences, masks. 16 × 16 threads; thread (ty, tx) has rows ty + 16·i and columns
// tx + 16·j of a product.
//
// Constants: DIM_K and DIM_V (head dims or a little more, multiples of 32, so that few kernels serve
// all dims; the dims themselves are arguments), ROWS and KEYS (a tile's query rows and keys,
// multiples of 16), VECTOR (numbers that may be loaded at once, a power of two up to 8).
#pragma once
#include "types.cuh"

static constexpr int SIDE = 16, THREADS = SIDE * SIDE;
static constexpr int MAX_INT = 0x7fffffff;

// f32s between rows of a tile: whole float4s, an odd number of them, so that eight rows at one
// column lie in different banks.
template <int DIM>
struct Width {
    static constexpr int row = 4 * (DIM / 4 | 1);
    static constexpr int groups = (DIM / 4 + SIDE - 1) / SIDE;  // float4s a thread has of a row
};

// Queries `query..query+queries` are positions `position..` of a sequence whose keys are rows
// `key..key+keys`, and whose compressed keys are rows `block..block+blocks`.
struct Sequence {
    int query, queries, position, key, keys, block, blocks, spare;
};

// The sequence that work item `item` belongs to, when `unit` rows make an item, every sequence
// starts a new one, and a sequence's items are numbered from first(sequence) = ⌊start/unit⌋ + its
// index; some numbers belong to nobody.
struct Item {
    int sequence;
    i64 index;  // within the sequence
};
template <class Start>
DEVICE Item find_item(int sequences, i64 item, i64 unit, Start start) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (start(middle) / unit + middle <= item) low = middle;
        else high = middle - 1;
    }
    return {low, item - (start(low) / unit + low)};
}

// The last sequence that starts at or before a query.
DEVICE int find_sequence(const Sequence* s, int sequences, int query) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (s[middle].query <= query) low = middle;
        else high = middle - 1;
    }
    return low;
}

// Which keys a position sees; both ends grow with it.
struct Mask {
    int kind;           // one of the following
    int window;         // w
    int block, stride;  // l, d
};
static constexpr int WINDOW = 1, COMPRESSED = 2;  // 0 is causal
struct Range {
    int from, to;
};
DEVICE Range visible(const Mask& m, int position, int keys) {
    if (m.kind == COMPRESSED) {
        int count = position + 1 < m.block ? 0 : (position + 1 - m.block) / m.stride + 1;
        return {0, min(count, keys)};
    }
    int from = m.kind == WINDOW ? max(0, position - m.window + 1) : 0;
    return {from, min(position + 1, keys)};
}
// The first and last position that may see keys from..to.
DEVICE Range observers(const Mask& m, int from, int to) {
    if (m.kind == COMPRESSED) {
        i64 first = (i64)from * m.stride + m.block - 1;
        return {first > MAX_INT ? MAX_INT : (int)first, MAX_INT};
    }
    i64 last = m.kind == WINDOW ? (i64)to - 2 + m.window : MAX_INT;
    return {from, last > MAX_INT ? MAX_INT : (int)last};
}

DEVICE bool not_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u; }

// Loads vectors number at(r) of `source`, `dim` numbers each, into the rows of a tile, times
// factor(r); zeros where at(r) is negative and beyond `dim`. Returns whether this thread met an
// infinity or NaN.
template <int DIM, int COUNT, class At, class Factor>
DEVICE bool load_rows(float* tile, const Real* source, int dim, At at, Factor factor) {
    constexpr int PIECES = DIM / VECTOR;
    bool bad = false;
    for (int i = threadIdx.x; i < COUNT * PIECES; i += THREADS) {
        int row = i / PIECES, column = i % PIECES * VECTOR;
        i64 from = at(row);
        float* to = tile + row * Width<DIM>::row + column;
        if (from >= 0 && column < dim) {
            Vec<Real, VECTOR> x = *(const Vec<Real, VECTOR>*)(source + from * dim + column);
            float times = factor(row);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                float y = widen(x.at[j]) * times;
                bad |= not_finite(y);
                to[j] = y;
            }
        } else {
#pragma unroll
            for (int j = 0; j < VECTOR; j++) to[j] = 0.0f;
        }
    }
    return bad;
}
template <int DIM, int COUNT, class At>
DEVICE bool load_rows(float* tile, const Real* source, int dim, At at) {
    return load_rows<DIM, COUNT>(tile, source, dim, at, [](int) { return 1.0f; });
}

// s = a·bᵀ of two tiles.
template <int DIM, int M, int N>
DEVICE void multiply(const float* a, const float* b, float (&s)[M][N]) {
    constexpr int W = Width<DIM>::row;
    int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++) s[i][j] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < DIM; c += 4) {
        float4 x[M], y[N];
#pragma unroll
        for (int i = 0; i < M; i++) x[i] = *(const float4*)(a + (ty + SIDE * i) * W + c);
#pragma unroll
        for (int j = 0; j < N; j++) y[j] = *(const float4*)(b + (tx + SIDE * j) * W + c);
#pragma unroll
        for (int i = 0; i < M; i++)
#pragma unroll
            for (int j = 0; j < N; j++) {
                s[i][j] = fmaf(x[i].x, y[j].x, s[i][j]);
                s[i][j] = fmaf(x[i].y, y[j].y, s[i][j]);
                s[i][j] = fmaf(x[i].z, y[j].z, s[i][j]);
                s[i][j] = fmaf(x[i].w, y[j].w, s[i][j]);
            }
    }
}

// o += p·v, where p [·, COUNT] has rows COUNT + 4 apart and v is a tile of COUNT rows. Thread
// (ty, tx) has rows ty + 16·i and the columns 4·(tx + 16·g)…; those past the end are junk.
template <int DIM, int COUNT, int M>
DEVICE void accumulate(const float* p, const float* v, float (&o)[M][Width<DIM>::groups][4]) {
    constexpr int W = Width<DIM>::row, G = Width<DIM>::groups;
    int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
#pragma unroll 2
    for (int k = 0; k < COUNT; k += 4) {
        float weights[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            float4 w = *(const float4*)(p + (ty + SIDE * i) * (COUNT + 4) + k);
            weights[i][0] = w.x, weights[i][1] = w.y, weights[i][2] = w.z, weights[i][3] = w.w;
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                int column = 4 * (tx + SIDE * g);
                if (column >= DIM) column = 0;
                float4 x = *(const float4*)(v + (k + n) * W + column);
#pragma unroll
                for (int i = 0; i < M; i++) {
                    o[i][g][0] = fmaf(weights[i][n], x.x, o[i][g][0]);
                    o[i][g][1] = fmaf(weights[i][n], x.y, o[i][g][1]);
                    o[i][g][2] = fmaf(weights[i][n], x.z, o[i][g][2]);
                    o[i][g][3] = fmaf(weights[i][n], x.w, o[i][g][3]);
                }
            }
        }
    }
}

// The same where `v` holds infinities or NaN: 0 · NaN is NaN, so what is hidden, !see(i, k), must
// not be multiplied at all.
template <int DIM, int COUNT, int M, class See>
DEVICE void accumulate_seen(const float* p, const float* v, float (&o)[M][Width<DIM>::groups][4],
                            See see) {
    constexpr int W = Width<DIM>::row, G = Width<DIM>::groups;
    int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
    for (int k = 0; k < COUNT; k++) {
#pragma unroll
        for (int i = 0; i < M; i++) {
            if (!see(i, k)) continue;
            float weight = p[(ty + SIDE * i) * (COUNT + 4) + k];
#pragma unroll
            for (int g = 0; g < G; g++) {
                int column = 4 * (tx + SIDE * g);
                if (column >= DIM) column = 0;
#pragma unroll
                for (int c = 0; c < 4; c++)
                    o[i][g][c] = fmaf(weight, v[k * W + column + c], o[i][g][c]);
            }
        }
    }
}

template <int DIM, int M>
DEVICE void clear(float (&o)[M][Width<DIM>::groups][4]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int g = 0; g < Width<DIM>::groups; g++)
#pragma unroll
            for (int c = 0; c < 4; c++) o[i][g][c] = 0.0f;
}

// Calls f(column, g, c) for the thread's columns of a row of `dim` numbers.
template <int DIM, class F>
DEVICE void each_column(int dim, F f) {
    int tx = threadIdx.x % SIDE;
#pragma unroll
    for (int g = 0; g < Width<DIM>::groups; g++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int column = 4 * (tx + SIDE * g) + c;
            if (column < dim) f(column, g, c);
        }
}

// Over the 16 threads that share rows; the same bits in each.
DEVICE float rows_sum(float x) {
#pragma unroll
    for (int offset = SIDE / 2; offset > 0; offset >>= 1)
        x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}
DEVICE float rows_max(float x) {
#pragma unroll
    for (int offset = SIDE / 2; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// A query's list of chosen blocks may hold anything: an entry counts when it is one of the blocks
// 0..=current and stands for the first time. Whole warps call these.
DEVICE bool is_ascending(const int* list, int length) {
    bool fine = true;
    for (int i = threadIdx.x & 31; i < length; i += 32)
        fine &= i == 0 || list[i] < 0 || (list[i - 1] >= 0 && list[i] > list[i - 1]);
    return __all_sync(ALL_LANES, fine);
}
DEVICE bool counts_once(const int* list, int i, int current, bool ascending) {
    int block = list[i];
    if (block < 0 || block > current) return false;
    if (!ascending) {
        for (int j = 0; j < i; j++)
            if (list[j] == block) return false;
    }
    return true;
}
// Writes the entries that count, in their order; returns how many.
DEVICE int chosen_blocks(const int* list, int length, int current, int* chosen) {
    bool ascending = is_ascending(list, length);
    int found = 0, lane = threadIdx.x & 31;
    for (int base = 0; base < length; base += 32) {
        bool good = base + lane < length && counts_once(list, base + lane, current, ascending);
        u32 vote = __ballot_sync(ALL_LANES, good);
        if (good) chosen[found + __popc(vote & ((1u << lane) - 1))] = list[base + lane];
        found += __popc(vote);
    }
    return found;
}
