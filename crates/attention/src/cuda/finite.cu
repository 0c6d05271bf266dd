// Whether some number is NaN or infinite: `flag` becomes 1, else it stays as it is.
#include "types.cuh"

KERNEL not_finite(const Real* x, i64 count, u32* flag) {
    constexpr int WIDE = 16 / sizeof(Real);
    i64 step = (i64)gridDim.x * blockDim.x * WIDE;
    bool found = false;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * WIDE; i < count; i += step) {
        if (i + WIDE <= count) {
            auto values = *(const Vec<Real, WIDE>*)(x + i);
#pragma unroll
            for (int j = 0; j < WIDE; j++) found |= !(fabsf(widen(values.at[j])) < INF);
        } else {
            for (i64 j = i; j < count; j++) found |= !(fabsf(widen(x[j])) < INF);
        }
    }
    if (found) *flag = 1;
}
