// Rotary embedding, halves convention: pairs (a, b) of a head's first and second half turn by
// φ_i = position · inv_freq_i. The angle is rounded to f32 as Hugging Face does; its sine and
// cosine are computed here, once for all heads that a thread turns, so no table is read.
//
// HALF is half the head dimension; VEC divides it.
#include "types.cuh"

typedef Vec<Real, VEC> Piece;

// sin and cos of an f32 angle of any size, within 1.5 ulp: reduced by multiples of π/2 in f64,
// then the polynomials of Cephes.
DEVICE void sine_cosine(float angle, float& sine, float& cosine) {
    double turns = rint((double)angle * 0.63661977236758134);
    float r = (float)fma(-turns, 1.5707963267948966, (double)angle), z = r * r;
    float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z +
               4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    int quadrant = (int)((i64)turns & 3);
    sine = quadrant & 1 ? c : s;
    cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) sine = -sine;
    if ((quadrant + 1) & 2) cosine = -cosine;
}

// x, out [tokens, heads, 2·HALF], the same storage or not; positions [tokens]. `sign` −1 turns
// back. Thread: VEC pairs of a token, `per` heads. Grid: [tokens·HALF/VEC / block, heads / per].
KERNEL rope(const Real* x, Real* out, const i32* positions, const float* inv_freq, float factor,
            float sign, i64 tokens, int heads, int per) {
    constexpr int PIECES = HALF / VEC;
    i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 token = index / PIECES;
    int at = (int)(index % PIECES) * VEC;
    if (token >= tokens) return;
    float position = (float)positions[token];
    float cosines[VEC], sines[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        sine_cosine(position * inv_freq[at + i], sines[i], cosines[i]);
        sines[i] *= sign * factor;
        cosines[i] *= factor;
    }
    int first = blockIdx.y * per, last = first + per < heads ? first + per : heads;
    i64 base = (token * heads + first) * (2 * HALF) + at;
#pragma unroll 4
    for (int head = first; head < last; ++head, base += 2 * HALF) {
        Piece low = *reinterpret_cast<const Piece*>(x + base);
        Piece high = *reinterpret_cast<const Piece*>(x + base + HALF);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            float a = widen(low.at[i]), b = widen(high.at[i]);
            low.at[i] = narrow<Real>(a * cosines[i] - b * sines[i]);
            high.at[i] = narrow<Real>(b * cosines[i] + a * sines[i]);
        }
        *reinterpret_cast<Piece*>(out + base) = low;
        *reinterpret_cast<Piece*>(out + base + HALF) = high;
    }
}
