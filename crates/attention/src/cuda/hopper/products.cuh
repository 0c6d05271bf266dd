// Products on tiles, from registers and from shared memory, and the lanes' exchange on the way out.
#pragma once
#include "hopper.cuh"

static constexpr int PANEL = 64;  // columns of a panel

template <int N>
DEVICE void clear(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) d[i] = 0.0f;
}

// d = a·bᵀ over INNER columns: 64 rows of `a`, N rows of `b`; panels of 64 columns lie A_PANEL and
// B_PANEL bytes apart.
template <int N, int INNER, int A_PANEL, int B_PANEL>
DEVICE void multiply_rows(float (&d)[N / 2], u64 a, u64 b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < INNER / 16; i++) {
        int panel = i / 4, inner = i % 4;
        Wgmma<N>::template ss<0, 0>(d, descriptor_step(a, panel * A_PANEL + inner * 32),
                                    descriptor_step(b, panel * B_PANEL + inner * 32), i > 0);
    }
    wgmma_commit();
}

// d += p·b: `p` 64×ROWS in registers, `b` ROWS×N in shared memory.
template <int N, int ROWS>
DEVICE void add_product(float (&d)[N / 2], const u32 (&p)[ROWS / 4], u64 b) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < ROWS / 16; i++) Wgmma<N>::template rs<1>(d, p + 4 * i, descriptor_step(b, i * 2048), 1);
    wgmma_commit();
}

// Among four neighbouring lanes: word i of lane l becomes word l of lane i.
DEVICE void transpose_quad(u32 (&w)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        u32 given = __shfl_xor_sync(ALL_LANES, odd ? w[i] : w[i + 1], 1);
        if (odd) w[i] = given;
        else w[i + 1] = given;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 given = __shfl_xor_sync(ALL_LANES, high ? w[i] : w[i + 2], 2);
        if (high) w[i] = given;
        else w[i + 2] = given;
    }
}
