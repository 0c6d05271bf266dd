// The constants of `step.cu` and what its blocks keep in shared memory.
//
// Constants: REAL_BF16 or REAL_F16; GROUP, D, V; SPLITS (blocks that share the keys, a power of
// two), SLOTS (tiles of keys or values in flight), TILE (tokens in one, 32 or 64), CHOOSERS
// (threads), RESIDENT (blocks on a multiprocessor); of the spec COMPRESS_BLOCK, COMPRESS_STRIDE,
// SELECT_BLOCK (a multiple of TILE), SELECT_COUNT, SELECT_INITIAL, SELECT_LOCAL, WINDOW;
// LOGITS_GLOBAL: logits do not fit in shared memory.
#pragma once
#include "decode.cuh"

constexpr int HEADS = 16, WORKERS = 128, PRODUCERS = 32;
#ifdef DENSE
#undef CHOOSERS
#define CHOOSERS 0
constexpr int BRANCHES = 1;
#else
#include "select.cuh"
constexpr int BRANCHES = 3;
static_assert(SELECT_BLOCK % TILE == 0, "selection blocks are whole tiles");
constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
// Compressed blocks that start in a selection block, and that each token of the sequence is in.
constexpr int RATIO = SELECT_BLOCK / COMPRESS_STRIDE, COVER = COMPRESS_BLOCK / COMPRESS_STRIDE;
static_assert(TILE % RATIO == 0 && COVER <= TILE, "a split's tiles hold whole selection blocks");
#endif
constexpr int THREADS = WORKERS + PRODUCERS + CHOOSERS;
constexpr int HEAD_TILES = (GROUP + HEADS - 1) / HEADS, CLUSTER = SPLITS * HEAD_TILES;
constexpr int OWN = HEADS / SPLITS;  // heads that a block writes in the end
constexpr int K_PANELS = (D + 63) / 64, V_PANELS = (V + 63) / 64, PANEL = TILE * 128;
constexpr int SLOT = PANEL * (K_PANELS > V_PANELS ? K_PANELS : V_PANELS);
constexpr int STEPS = D / 16;     // products of one QK tile
constexpr int PARTS = TILE / 32;  // 8-wide tiles of a worker warp's keys
constexpr int COLUMNS = V / 32;   // 8-wide tiles of a worker warp's quarter of the output
static_assert(SLOTS >= 3 && (TILE == 32 || TILE == 64) && D % 32 == 0 && V % 32 == 0 && HEADS % SPLITS == 0, "tiles");

// Where chunk c (16 bytes) of a row of a swizzled tile lies.
DEVICE u32 chunk_at(int row, int chunk) { return chunk / 8 * PANEL + row * 128 + ((chunk ^ row) & 7) * 16; }
// The same for probabilities [16, TILE], which no copy engine touches.
DEVICE u32 weight_at(int row, int chunk) {
    return TILE == 64 ? row * 128 + ((chunk ^ row) & 7) * 16 : row * 64 + ((chunk ^ row >> 1) & 3) * 16;
}

struct Softmax {
    float max[2], sum[2];
};

struct alignas(16) Shared {
    u16 weights[HEADS * TILE];
    u64 full[SLOTS], empty[SLOTS];
    int2 edges[SLOTS];  // first and last + 1 token of the tile that count
    float max[4][HEADS], sum[4][HEADS];
    float2 totals[BRANCHES][HEADS];  // of this block: maximum and sum
    // From all splits, this one's heads.
    u64 merged;
    float2 parts[SPLITS][BRANCHES][OWN];
    float factors[SPLITS][BRANCHES][OWN];
#ifndef DENSE
    u64 summed, joined, begun, scored;
    float2 peers[SPLITS][HEADS];  // the compressed branch's totals
    float before[COVER];          // importance of the last blocks of the split before
    float most[HEADS], inverse[HEADS];
    i32 chosen[SELECT_COUNT];
    Choice choice;
#endif
};

// A tile of the stream.
struct Spot {
    int which, page, token, low, high;
};
