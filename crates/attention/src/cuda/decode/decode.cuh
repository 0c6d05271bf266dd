// What the kernels of a decode step share: where caches keep a token, and the parameters.
//
// A row is one query token: of any sequence, at any position, with the caches already holding the
// keys and values of every token up to its own.
#pragma once
#include "types.cuh"

// Keys and values in pages. Page `table[sequence · width + token / page]` holds a token; without
// a table the page of a sequence is its number. A ring is one page a sequence, token modulo page.
// A page is [K, page, dim], or [page, K, dim] when `interleaved`.
struct Cache {
    Real* k;
    Real* v;
    const i32* table;
    i32 page;
    i32 width;
    i32 interleaved;
    i32 ring;
};

// Numbers between two tokens of a head.
DEVICE i64 token_stride(const Cache& cache, int kv_heads, int dim) {
    return cache.interleaved ? (i64)kv_heads * dim : dim;
}

// Where a token's numbers of one head start.
DEVICE i64 token_start(const Cache& cache, int sequence, int token, int head, int kv_heads, int dim) {
    u32 page = (u32)token / (u32)cache.page;
    i64 slot = (u32)token % (u32)cache.page;
    i64 at = cache.table ? cache.table[(i64)sequence * cache.width + page] : sequence;
    at *= (i64)kv_heads * cache.page;
    return (at + (cache.interleaved ? slot * kv_heads + head : (i64)head * cache.page + slot)) * dim;
}

struct Params {
    const Real* q;         // [R, H, D]
    const Real* gate;      // [R, H, 3] after the sigmoid: cmp, slc, win
    Real* out;             // [R, H, V]
    i32* indices;          // [R, K, S] or null
    const i32* positions;  // [R], -1: the row is idle and its output 0
    const i32* sequences;  // [R], null: row i is of sequence i
    Cache cmp;
    Cache slc;  // of a dense layer: its only cache
    Cache win;
    float* scratch;
    i32 rows;
    i32 kv_heads;
    i32 slice;   // most compressed blocks of one split
    i32 blocks;  // most selection blocks
    float scale;
};

#ifdef COMPRESS_BLOCK
// Compressed blocks that a position sees.
DEVICE int visible_compressed(int position) {
    return position + 1 < COMPRESS_BLOCK ? 0 : (position + 1 - COMPRESS_BLOCK) / COMPRESS_STRIDE + 1;
}

#ifdef SELECT_BLOCK
// Whether a position has no more blocks than it may select.
DEVICE bool all_selected(int position) { return position / SELECT_BLOCK < SELECT_COUNT; }

// How often selection block j meets compressed block `j·r + offset` (Eq. 9 in 0-based terms).
DEVICE int overlap(int offset) {
    constexpr int R = SELECT_BLOCK / COMPRESS_STRIDE, S = COMPRESS_BLOCK / COMPRESS_STRIDE;
    int shared = min(R - max(offset, 0), S + min(offset, 0));
    return min(shared, min(R, S));
}

// A score as an integer of the same order; NaN ranks with -inf, and -0 with 0.
DEVICE u32 score_key(float score) {
    u32 bits = score != score ? 0xff800000u : __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
#endif
#endif
