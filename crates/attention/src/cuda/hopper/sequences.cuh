// Where the sequences of a batch lie, and a tile of queries found from its number: no table has to be
// made for a launch.
#pragma once
#include "types.cuh"

// Queries are rows query.. of q at positions position.., keys rows key.. of k, compressed keys rows block.. .
struct Sequence {
    int query, queries, position, key, keys, block, blocks, spare;
};

struct Batch {
    const Sequence* sequences;
    int count;
};

// Queries `token..token+rows` at positions `position..` of a sequence whose keys (compressed keys) start
// at row `key` (`block`). No rows: the number belongs to no tile.
struct Tile {
    int token, rows, position, key, block;
};

// Tile `item` when UNIT queries make one and every sequence starts a new one: a sequence's tiles are
// numbered from ⌊start/UNIT⌋ + its own number.
template <int UNIT>
DEVICE Tile find_tile(const Batch& batch, int item) {
    int low = 0, high = batch.count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (batch.sequences[middle].query / UNIT + middle <= item) low = middle;
        else high = middle - 1;
    }
    Sequence of = batch.sequences[low];
    int first = (item - (of.query / UNIT + low)) * UNIT;
    int rows = max(0, min(UNIT, of.queries - first));
    return {of.query + first, rows, of.position + first, of.key, of.block};
}
