// y = 1/(1 + e⁻ˣ).
#include "pieces.cuh"

KERNEL sigmoid_forward(const Real* x, Real* y, i64 n) {
    map1(x, y, n, [](float x) { return logistic(x); });
}

// dx = dy·y·(1 − y); dx may be dy.
KERNEL sigmoid_backward(const Real* dy, const Real* y, Real* dx, i64 n) {
    map2(dy, y, dx, n, [](float d, float y) { return d * y * (1.0f - y); });
}
