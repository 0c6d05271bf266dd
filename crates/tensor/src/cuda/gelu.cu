// GELU: y = x·Φ(x), exact or by the tanh formula, where Φ(x) ≈ σ(2√(2/π)(x + 0.044715 x³)).
#include "pieces.cuh"

static constexpr float TWO_SQRT_2_PI = 1.595769f, CUBIC = 0.044715f, DENSITY = 0.3989423f;

// Φ(x). For 16-bit storage `erfc t = u·2^(p(u) − t² log₂ e)` with t = |x|/√2, u = 1/(1 + t/2); p is
// the interpolation at the Chebyshev nodes of 0 ≤ t ≤ 9.5, within 1e-5 relative.
DEVICE float normal_cdf(float x) {
    if (sizeof(Real) == 4) return normcdff(x);
    float u = __fdividef(1.0f, 1.0f + 0.35355339f * fabsf(x));
    float p = 0.33360666f;
    p = p * u - 1.0342549f;
    p = p * u + 0.69784364f;
    p = p * u + 0.35959608f;
    p = p * u + 1.4706416f;
    p = p * u - 1.8274209f;
    float tail = 0.5f * u * exp2_approx(p - 0.72134752f * x * x);
    return x < 0.0f ? tail : 1.0f - tail;
}

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
    map1(x, y, n, [](float x) { return x * normal_cdf(x); });
}

// dx = dy·(Φ(x) + x·φ(x)); dx may be dy.
KERNEL gelu_exact_backward(const Real* dy, const Real* x, Real* dx, i64 n) {
    map2(dy, x, dx, n, [](float d, float x) {
        return d * (normal_cdf(x) + x * (DENSITY * exponential(-0.5f * x * x)));
    });
}
