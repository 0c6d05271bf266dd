// AdamW of all parameters in one launch. Every operation is rounded by itself, as on the CPU.
#include "slots.cuh"

// The same as `Slot` in adamw.rs.
struct Slot {
    float* weight;  // the f32 weight, or the master of a bf16 one
    bf16* half;     // the bf16 weight, or null
    float* m;
    float* v;
    const float* gradient;
    i64 len;
    i64 first_block;
    float keep;  // 1 − lr·decay
    float unused;
};

struct Rule {
    float beta1, rest1, beta2, rest2, rate, root, eps, grad_scale;
};

DEVICE void update(float& w, float& m, float& v, float g, float keep, const Rule& rule) {
    g = __fmul_rn(g, rule.grad_scale);
    m = __fadd_rn(__fmul_rn(rule.beta1, m), __fmul_rn(rule.rest1, g));
    v = __fadd_rn(__fmul_rn(rule.beta2, v), __fmul_rn(rule.rest2, __fmul_rn(g, g)));
    float below = __fadd_rn(__fmul_rn(__fsqrt_rn(v), rule.root), rule.eps);
    w = __fsub_rn(__fmul_rn(w, keep), __fdiv_rn(__fmul_rn(rule.rate, m), below));
}

KERNEL adamw(const Slot* table, int slots, float beta1, float rest1, float beta2, float rest2,
             float rate, float root, float eps, float grad_scale) {
    Rule rule = {beta1, rest1, beta2, rest2, rate, root, eps, grad_scale};
    const Slot slot = slot_of(table, slots);
    i64 start = ((i64)blockIdx.x - slot.first_block) * SPAN;
    typedef Vec<float, 4> Four;
#pragma unroll
    for (int step = 0; step < SLOT_STEPS; ++step) {
        i64 at = start + (step * SLOT_THREADS + threadIdx.x) * 4;
        if (at + 4 <= slot.len) {
            Four w = *reinterpret_cast<Four*>(slot.weight + at);
            Four m = *reinterpret_cast<Four*>(slot.m + at);
            Four v = *reinterpret_cast<Four*>(slot.v + at);
            Four g = *reinterpret_cast<const Four*>(slot.gradient + at);
            Vec<bf16, 4> half;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                update(w.at[j], m.at[j], v.at[j], g.at[j], slot.keep, rule);
                half.at[j] = narrow<bf16>(w.at[j]);
            }
            *reinterpret_cast<Four*>(slot.weight + at) = w;
            *reinterpret_cast<Four*>(slot.m + at) = m;
            *reinterpret_cast<Four*>(slot.v + at) = v;
            if (slot.half) *reinterpret_cast<Vec<bf16, 4>*>(slot.half + at) = half;
        } else {
            for (i64 i = at; i < slot.len; ++i) {
                update(slot.weight[i], slot.m[i], slot.v[i], slot.gradient[i], slot.keep, rule);
                if (slot.half) slot.half[i] = narrow<bf16>(slot.weight[i]);
            }
        }
    }
}
