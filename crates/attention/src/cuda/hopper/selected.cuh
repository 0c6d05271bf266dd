// What the kernels of the selected branch's gradients share: work items, a count of what was issued.
#pragma once
#include "hopper.cuh"
#include "sequences.cuh"

// A run of one block's queries: what one block of threads owns of the keys' gradient.
struct alignas(16) Item {
    int key, keys, kv_head;  // the block's first row of k, and how many of its rows there are
    int origin;              // position p's query is row origin + p of q
    int position;            // of the block's first key
    int count;               // queries; −1: the item is not needed
    int slot, slots;         // where its partial sums go (−1: it is the block's only item), of how many
    i64 first;               // into the list of queries
    int run, spare;          // which of the block's items this is
};

// A barrier's phases go by parity only, so whoever does not wait for each of them must first know that
// the one it wants has begun: the producer counts what it has issued.
struct Issued {
    u32 count;
    DEVICE void publish(u32 n) {
        asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(&count)), "r"(n) : "memory");
    }
    // Until number n is issued; `seen` is the count last read.
    DEVICE void wait(u32 n, u32& seen) {
        while (seen <= n)
            asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(seen) : "r"(shared_address(&count)) : "memory");
    }
};
