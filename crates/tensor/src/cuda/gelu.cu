// GELU: y = x·Φ(x), exact or by the tanh formula, where Φ(x) ≈ σ(2√(2/π)(x + 0.044715 x³)).
#include "pieces.cuh"

static constexpr float TWO_SQRT_2_PI = 1.595769f, CUBIC = 0.044715f, DENSITY = 0.3989423f;

KERNEL gelu_tanh_forward(const Real* x, Real* y, i64 n) {
    map1(x, y, n, [](float x) { return x * logistic(TWO_SQRT_2_PI * (x + CUBIC * x * x * x)); });
}

// dx = dy·(s + x·s(1 − s)·slope); dx may be dy.
KERNEL gelu_tanh_backward(const Real* dy, const Real* x, Real* dx, i64 n) {
    map2(dy, x, dx, n, [](float d, float x) {
        float s = logistic(TWO_SQRT_2_PI * (x + CUBIC * x * x * x));
        float slope = TWO_SQRT_2_PI * (1.0f + 3.0f * CUBIC * x * x);
        return d * (s + x * s * (1.0f - s) * slope);
    });
}

KERNEL gelu_exact_forward(const Real* x, Real* y, i64 n) {
    map1(x, y, n, [](float x) { return x * normcdff(x); });
}

// dx = dy·(Φ(x) + x·φ(x)); dx may be dy.
KERNEL gelu_exact_backward(const Real* dy, const Real* x, Real* dx, i64 n) {
    map2(dy, x, dx, n, [](float d, float x) {
        return d * (normcdff(x) + x * (DENSITY * exponential(-0.5f * x * x)));
    });
}
