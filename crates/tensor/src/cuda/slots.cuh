// Many tensors in one launch: a table of them, each cut into blocks of SPAN numbers.
#ifndef SLOTS
#define SLOTS
#include "types.cuh"

static constexpr int SLOT_THREADS = 256, SLOT_STEPS = 4;
// Numbers of a block: four a thread at a time.
static constexpr i64 SPAN = SLOT_THREADS * 4 * SLOT_STEPS;

// The last slot whose first block is not beyond this one; `first_block` ascends.
template <class Slot>
DEVICE const Slot& slot_of(const Slot* table, int slots) {
    int low = 0, high = slots - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (table[middle].first_block <= (i64)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    return table[low];
}
#endif
