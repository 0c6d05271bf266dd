// Warp-wide matrix products (sm_80 and later): 16×8 tiles over 16 inner elements, operands in
// registers, 16-bit numbers in and f32 sums. A lane's accumulators are rows lane/4 and lane/4 + 8,
// columns 2·(lane%4) + {0, 1}: d[0..2] of the first row, d[2..4] of the second.
#pragma once
#include "types.cuh"

// d += a·b. a: row-major 16×16 as (row, k), (row+8, k), (row, k+8), (row+8, k+8) with
// k = 2·(lane%4) + {0, 1}; b: (k, column lane/4), (k+8, column lane/4).
DEVICE void mma_16_8_16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if defined(REAL_F16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8×8 tiles from shared memory: lane 8i + r gives the address of row r of tile i (16 bytes); a
// lane receives of each tile row lane/4, columns 2·(lane%4) + {0, 1}.
DEVICE void load_tiles(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
// The same, each tile transposed.
DEVICE void load_tiles_transposed(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
