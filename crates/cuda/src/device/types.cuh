// Number types, vector loads and reductions for every kernel. NVRTC is given no toolkit headers,
// so what a kernel needs stands here. The storage type of a kernel is `Real`, chosen with
// -DREAL_F32, -DREAL_BF16 or -DREAL_F16; arithmetic is always f32.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

struct alignas(2) bf16 {
    u16 bits;
};
struct alignas(2) f16 {
    u16 bits;
};

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest even.
template <class T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) {
    return x;
}
template <>
DEVICE bf16 narrow<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
DEVICE f16 narrow<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

#if defined(REAL_BF16)
typedef bf16 Real;
#elif defined(REAL_F16)
typedef f16 Real;
#else
typedef float Real;
#endif

// Two numbers in one register, `low` in the low half.
template <class T>
DEVICE u32 pack(float low, float high);
template <>
DEVICE u32 pack<bf16>(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
DEVICE u32 pack<f16>(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The two numbers of a register.
template <class T>
DEVICE float2 unpack(u32 x) {
    T low, high;
    low.bits = (u16)x;
    high.bits = (u16)(x >> 16);
    return make_float2(widen(low), widen(high));
}

// N numbers moved at once; N·sizeof(T) is 4, 8 or 16 bytes and the address is so aligned.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T at[N];
};

#define INF __int_as_float(0x7f800000)
static constexpr u32 ALL_LANES = 0xffffffffu;

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A number that is the same in every lane, said so to the compiler: what is made of it then lives in
// uniform registers, where wgmma wants its descriptors.
DEVICE int uniform(int x) { return __shfl_sync(ALL_LANES, x, 0); }

// Sum over a warp, the same bits in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Sum over a block of whole warps (at most 32), the same bits in every thread. `scratch` holds 32
// floats of shared memory; safe to call again at once with the same scratch.
DEVICE float block_sum(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
