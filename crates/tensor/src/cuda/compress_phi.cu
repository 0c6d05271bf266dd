// What stands between the matrix products of φ: the position encoding, which is the same for every
// block and so joins the bias, and the GELU of the hidden layer. See compress.cu. Every tensor has
// heads outermost, and the grid's last dimension counts them.
#include "types.cuh"

static constexpr int COLUMNS = 32, SLICES = 32;

DEVICE i64 thread_index() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// shift [outer] = pe [inner] · weight [inner, outer] + bias [outer] (or null), in a fixed order.
// Grid: [outer / 32, heads]; block: [32, 32].
KERNEL compress_shift(const Real* pe, const Real* weight, const Real* bias, float* shift, i64 inner,
                      int outer) {
    __shared__ float sums[SLICES][COLUMNS + 1];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    pe += blockIdx.y * inner;
    weight += blockIdx.y * inner * outer;
    float sum = 0.0f;
    if (column < outer) {
#pragma unroll 8
        for (i64 i = threadIdx.y; i < inner; i += SLICES)
            sum += widen(pe[i]) * widen(weight[i * outer + column]);
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= outer) return;
    i64 at = (i64)blockIdx.y * outer + column;
    float total = bias ? widen(bias[at]) : 0.0f;
    for (int s = 0; s < SLICES; ++s) total += sums[s][threadIdx.x];
    shift[at] = total;
}

// active = gelu(hidden + shift), exact; hidden [count, width].
KERNEL compress_hidden_forward(const float* hidden, const float* shift, Real* active, i64 count,
                               int width) {
    i64 index = thread_index();
    if (index >= count * width) return;
    shift += blockIdx.y * width + index % width;
    index += blockIdx.y * count * width;
    float z = hidden[index] + *shift;
    active[index] = narrow<Real>(z * normcdff(z));
}

// d_hidden = d_active · gelu′(hidden + shift), in f32 in the place of d_active too.
KERNEL compress_hidden_backward(const float* hidden, const float* shift, float* d_active,
                                Real* d_hidden, i64 count, int width) {
    i64 index = thread_index();
    if (index >= count * width) return;
    shift += blockIdx.y * width + index % width;
    index += blockIdx.y * count * width;
    float z = hidden[index] + *shift;
    float slope = normcdff(z) + z * (0.3989423f * expf(-0.5f * z * z));
    float d = d_active[index] * slope;
    d_active[index] = d;
    d_hidden[index] = narrow<Real>(d);
}

// pe is added to every block: d_weight += pe ⊗ columns and d_pe = weight · columns, where columns
// [outer] sums the gradients of the first layer's outputs over all blocks. Warp: an input.
KERNEL compress_pe_grads(const Real* pe, const Real* weight, const float* columns, float* d_weight,
                         float* d_pe, i64 inner, int outer) {
    i64 i = thread_index() / 32;
    if (i >= inner) return;
    columns += blockIdx.y * outer;
    i += blockIdx.y * inner;
    float factor = widen(pe[i]), sum = 0.0f;
    for (int o = threadIdx.x % 32; o < outer; o += 32) {
        d_weight[i * outer + o] += factor * columns[o];
        sum += widen(weight[i * outer + o]) * columns[o];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) d_pe[i] = sum;
}
