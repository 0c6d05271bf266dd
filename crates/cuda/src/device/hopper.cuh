// Hopper's own instructions (sm_90a), thinly wrapped: barriers in shared memory, the tensor copy
// engine (TMA), and warpgroup matrix products (wgmma). PTX ISA 8.x, sections 9.7.13–9.7.15.
//
// Tiles in shared memory are panels of 64 columns (128 bytes a row), 1024-byte aligned, written
// by TMA with the 128-byte swizzle: the 16-byte chunk c of row r lies at chunk c ^ (r & 7).
#pragma once
#include "types.cuh"

#if defined(REAL_F16)
#define REAL_PTX "f16"
#else
#define REAL_PTX "bf16"
#endif

struct alignas(64) TensorMap {
    u64 words[16];
};

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- barriers ----

DEVICE void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
DEVICE void barrier_fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive(u64* barrier, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
                 : "memory");
}
// Waits until the phase of this parity has completed.
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// Barriers among some of the warps, numbered 1 to 15; `threads` counts those that take part.
DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS>
DEVICE void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- the tensor copy engine ----

DEVICE void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the map's box at (column, head, row) into `target`; `barrier` counts its bytes. What lies
// outside the tensor arrives as zeros.
DEVICE void tma_load(void* target, const TensorMap* map, u64* barrier, int column, int head, int row) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
        "%5}], [%2];" ::"r"(shared_address(target)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(head), "r"(row)
        : "memory");
}

// Copies `bytes` (a multiple of 16) out of shared memory, or adds them to the numbers there, each sum
// rounded once. The thread commits what it started and may wait until it has been read.
DEVICE void bulk_store(void* target, const void* source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_add(void* target, const void* source, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz." REAL_PTX " [%0], [%1], %2;" ::"l"(target),
                 "r"(shared_address(source)), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Ordinary writes to shared memory become visible to wgmma and to the copy engine.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroup matrix products ----

// Rows of 128 bytes along the product's inner dimension (K-major); step 16 inner elements = 32 bytes.
DEVICE u64 descriptor_rows(const void* tile) {
    return ((u64)(shared_address(tile) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
// The inner dimension runs over rows (MN-major): panels `panel_bytes` apart hold 64 outer elements
// each; step 16 inner elements = 16 rows = 2048 bytes.
DEVICE u64 descriptor_columns(const void* tile, u32 panel_bytes) {
    return ((u64)(shared_address(tile) & 0x3ffff) >> 4) | ((u64)(panel_bytes >> 4) << 16) | (64ull << 32) |
           (1ull << 62);
}
DEVICE u64 descriptor_step(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving uses of an accumulator across a wait.
template <int N>
DEVICE void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define REGS_8 R8(0, 1, 2, 3, 4, 5, 6, 7)
#define REGS_16 REGS_8 "," R8(8, 9, 10, 11, 12, 13, 14, 15)
#define REGS_32 REGS_16 "," R8(16, 17, 18, 19, 20, 21, 22, 23) "," R8(24, 25, 26, 27, 28, 29, 30, 31)
#define REGS_48 REGS_32 "," R8(32, 33, 34, 35, 36, 37, 38, 39) "," R8(40, 41, 42, 43, 44, 45, 46, 47)
#define REGS_56 REGS_48 "," R8(48, 49, 50, 51, 52, 53, 54, 55)
#define REGS_64 REGS_48 "," R8(48, 49, 50, 51, 52, 53, 54, 55) "," R8(56, 57, 58, 59, 60, 61, 62, 63)
#define REGS_96                                                                                          \
    REGS_64 "," R8(64, 65, 66, 67, 68, 69, 70, 71) "," R8(72, 73, 74, 75, 76, 77, 78, 79) "," R8(        \
        80, 81, 82, 83, 84, 85, 86, 87) "," R8(88, 89, 90, 91, 92, 93, 94, 95)
#define REGS_128                                                                                         \
    REGS_96 "," R8(96, 97, 98, 99, 100, 101, 102, 103) "," R8(104, 105, 106, 107, 108, 109, 110,         \
                                                             111) "," R8(112, 113, 114, 115, 116, 117,   \
                                                                         118, 119) "," R8(120, 121, 122, \
                                                                                          123, 124, 125, \
                                                                                          126, 127)
#define D8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),       \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUTS_8 D8(0)
#define OUTS_16 OUTS_8, D8(8)
#define OUTS_32 OUTS_16, D8(16), D8(24)
#define OUTS_48 OUTS_32, D8(32), D8(40)
#define OUTS_56 OUTS_48, D8(48)
#define OUTS_64 OUTS_48, D8(48), D8(56)
#define OUTS_96 OUTS_64, D8(64), D8(72), D8(80), D8(88)
#define OUTS_128 OUTS_96, D8(96), D8(104), D8(112), D8(120)

// d[64×N] (+)= a·b. SS: both from shared memory. RS: a is 64×16 in registers. TA, TB: the operand is
// MN-major. `keep` 0 starts a new sum. A thread's d[4j + 0..4] are
// (row, col), (row, col+1), (row+8, col), (row+8, col+1) with row = lane/4 of its warp's 16 rows and
// col = 8j + 2·(lane%4).
template <int N>
struct Wgmma;
#define WGMMA(N, COUNT, A, B, C, E, F, G)                                                               \
    template <>                                                                                         \
    struct Wgmma<N> {                                                                                   \
        template <int TA, int TB>                                                                       \
        static DEVICE void ss(float (&d)[COUNT], u64 a, u64 b, int keep) {                              \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\n"                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." REAL_PTX "." REAL_PTX        \
                         " {" REGS_##COUNT "}, %" #A ", %" #B ", p, 1, 1, %" #E ", %" #F ";\n}\n"       \
                         : OUTS_##COUNT                                                                 \
                         : "l"(a), "l"(b), "r"(keep), "n"(TA), "n"(TB));                                \
        }                                                                                               \
        template <int TB>                                                                               \
        static DEVICE void rs(float (&d)[COUNT], const u32* a, u64 b, int keep) {                       \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #F ", 0;\n"                               \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." REAL_PTX "." REAL_PTX        \
                         " {" REGS_##COUNT "}, {%" #A ", %" #B ", %" #C ", %" #E "}, %" #G              \
                         ", p, 1, 1, %" RS_TB(COUNT) ";\n}\n"                                           \
                         : OUTS_##COUNT                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(keep), "l"(b), "n"(TB));     \
        }                                                                                               \
    };
#define RS_TB(COUNT) RS_TB_##COUNT
#define RS_TB_8 "14"
#define RS_TB_16 "22"
#define RS_TB_32 "38"
#define RS_TB_48 "54"
#define RS_TB_56 "62"
#define RS_TB_64 "70"
#define RS_TB_96 "102"
#define RS_TB_128 "134"
WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
WGMMA(112, 56, 56, 57, 58, 59, 60, 61)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#undef WGMMA
