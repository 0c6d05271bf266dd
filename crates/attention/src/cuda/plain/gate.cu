// Blending the branches and what its backward gives for free. One warp a row (token, head) of `dim`
// numbers.
#include "types.cuh"

// out = Σ g_c · o_c.
KERNEL gate(const Real* gates, const Real* cmp, const Real* slc, const Real* win, Real* out, i64 rows, int dim) {
    i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float a = widen(gates[row * 3]), b = widen(gates[row * 3 + 1]), c = widen(gates[row * 3 + 2]);
    for (int i = threadIdx.x % 32; i < dim; i += 32) {
        i64 at = row * dim + i;
        out[at] = narrow<Real>(a * widen(cmp[at]) + b * widen(slc[at]) + c * widen(win[at]));
    }
}

DEVICE float row_dot(const Real* a, const Real* b, i64 row, int dim) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < dim; i += 32)
        sum = fmaf(widen(a[row * dim + i]), widen(b[row * dim + i]), sum);
    return warp_sum(sum);
}

// d_gate[c] = ⟨dO, o_c⟩ and the softmax corrections Δ_c = g_c · ⟨dO, o_c⟩, `delta` [3, rows].
KERNEL gate_backward(const Real* gates, const Real* cmp, const Real* slc, const Real* win, const Real* d_out,
                     Real* d_gate, float* delta, i64 rows, int dim) {
    i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const Real* branches[3] = {cmp, slc, win};
#pragma unroll
    for (int c = 0; c < 3; c++) {
        float product = row_dot(branches[c], d_out, row, dim);
        if (threadIdx.x % 32 == 0) {
            d_gate[row * 3 + c] = narrow<Real>(product);
            delta[c * rows + row] = widen(gates[row * 3 + c]) * product;
        }
    }
}

// Δ = ⟨dO, O⟩ of attention without gates.
KERNEL correction(const Real* out, const Real* d_out, float* delta, i64 rows, int dim) {
    i64 row = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float product = row_dot(out, d_out, row, dim);
    if (threadIdx.x % 32 == 0) delta[row] = product;
}
