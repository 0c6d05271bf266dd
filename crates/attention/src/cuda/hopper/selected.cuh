// What the kernels of the selected branch's gradients share: work items, a count of what was issued,
// the way out. Constants of the latter: D, V (head dims, multiples of 32, at most 256).
#pragma once
#include "products.cuh"
#include "sequences.cuh"

// A run of one block's queries: what one block of threads owns of the keys' gradient.
struct alignas(16) Item {
    int key, keys, kv_head;  // the block's first row of k, and how many of its rows there are
    int origin;              // position p's query is row origin + p of q
    int position;            // of the block's first key
    int count;               // queries
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

#if defined(D)
static constexpr int DP = (D + 63) / 64 * 64, VP = (V + 63) / 64 * 64;

// One of a thread's two rows of a 64×N accumulator, times `factor`, to `row` (N numbers) in 16-byte pieces,
// added to what is there if `add`. All lanes of a warp take part; `inside` says which store. ONCE: read once,
// soon to leave the L2.
template <int N, bool ONCE = false>
DEVICE void store_row(const float (&d)[N / 2], int r, float factor, Real* row, bool inside, bool add) {
#pragma unroll
    for (int j = 0; j < N / 8; j += 4) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = d + 4 * (j + i) + 2 * r;
            words[i] = pack<Real>(pair[0] * factor, pair[1] * factor);
        }
        transpose_quad(words);
        if (!inside) continue;
        auto* place = (Vec<u32, 4>*)(row + 8 * (j + (threadIdx.x & 3)));
        Vec<u32, 4> sum;
        if (add) sum = *place;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!add) sum.at[i] = words[i];
            else {
                float2 x = unpack<Real>(words[i]), y = unpack<Real>(sum.at[i]);
                sum.at[i] = pack<Real>(x.x + y.x, x.y + y.y);
            }
        }
        if (ONCE)
            asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(sum.at[0]), "r"(sum.at[1]),
                         "r"(sum.at[2]), "r"(sum.at[3])
                         : "memory");
        else *place = sum;
    }
}
#endif
