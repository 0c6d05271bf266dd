// Between f32 and bf16, rounding to nearest even.
#include "types.cuh"

// Eight numbers a thread: 32 bytes on one side, 16 on the other.
template <class From, class To>
DEVICE void convert(const From* x, To* y, i64 n) {
    i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i + 8 <= n) {
        Vec<From, 16 / sizeof(From)> from[sizeof(From) / 2];
        Vec<To, 16 / sizeof(To)> to[sizeof(To) / 2];
#pragma unroll
        for (int j = 0; j < (int)sizeof(From) / 2; ++j)
            from[j] = reinterpret_cast<const Vec<From, 16 / sizeof(From)>*>(x + i)[j];
#pragma unroll
        for (int j = 0; j < 8; ++j)
            to[j / (16 / sizeof(To))].at[j % (16 / sizeof(To))] =
                narrow<To>(widen(from[j / (16 / sizeof(From))].at[j % (16 / sizeof(From))]));
#pragma unroll
        for (int j = 0; j < (int)sizeof(To) / 2; ++j)
            reinterpret_cast<Vec<To, 16 / sizeof(To)>*>(y + i)[j] = to[j];
        return;
    }
    for (; i < n; ++i) y[i] = narrow<To>(widen(x[i]));
}

KERNEL to_bf16(const float* x, bf16* y, i64 n) { convert(x, y, n); }
KERNEL to_f32(const bf16* x, float* y, i64 n) { convert(x, y, n); }
