// y = factor·x; y may be x.
#include "pieces.cuh"

KERNEL scale(const Real* x, Real* y, float factor, i64 n) {
    map1(x, y, n, [factor](float x) { return x * factor; });
}

// x *= *factor, a number on the device; nothing is read or written when it is 1.
KERNEL scale_by(Real* x, const float* factor, i64 n) {
    float by = *factor;
    if (by != 1.0f) map1(x, x, n, [by](float x) { return x * by; });
}
