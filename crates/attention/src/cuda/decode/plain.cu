// A decode step in the simplest form: any dimensions up to 256, any group, any spec, any type. One
// block for each (row, KV head); its heads one after another; logits in global scratch.
#define CHOOSERS 256
#include "decode.cuh"
#include "select.cuh"

// Constants: GROUP, D, V; of the spec as in step.cu; DENSE for a single branch.
constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Shared {
    float q[256], out[256], reduce[32];
    Choice choice;
};

DEVICE float block_max(float x, float* scratch) {
    const int lane = threadIdx.x & 31;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_max(lane < WARPS ? scratch[lane] : -INF);
}

// Attention of the head in `shared.q` to `count` keys; `start(i, dim)` is where the i-th lies, or
// -1. Leaves probabilities times the returned sum in `logits`, the output of column
// threadIdx.x < V in the returned pair.
template <class Start>
DEVICE float2 attend(const Shared& shared, float* reduce, const Cache& cache, float* logits, int count, float scale, Start start) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float most = -INF;
    for (int i = warp; i < count; i += WARPS) {
        const i64 at = start(i, D);
        float dot = 0.0f;
        if (at >= 0)
            for (int d = lane; d < D; d += 32) dot += shared.q[d] * widen(cache.k[at + d]);
        dot = at >= 0 ? warp_sum(dot) * scale : -INF;
        if (lane == 0) logits[i] = dot;
        most = fmaxf(most, dot);
    }
    most = block_max(most, reduce);
    most = most == -INF ? 0.0f : most;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float p = exp2f(logits[i] - most);
        logits[i] = p;
        sum += p;
    }
    sum = block_sum(sum, reduce);
    __syncthreads();
    float out = 0.0f;
    if (threadIdx.x < V)
        for (int i = 0; i < count; ++i) {
            const i64 at = start(i, V);
            if (at >= 0) out += logits[i] * widen(cache.v[at + threadIdx.x]);
        }
    __syncthreads();
    return make_float2(out, sum);
}

KERNEL __launch_bounds__(THREADS) decode_plain(const __grid_constant__ Params p) {
    __shared__ Shared shared;
    const int pair = blockIdx.x, row = pair / p.kv_heads, head = pair % p.kv_heads;
    const int position = p.positions[row], sequence = p.sequences ? p.sequences[row] : row;
    const i64 first_head = ((i64)row * p.kv_heads + head) * GROUP;
    const float scale = p.scale * 1.4426950408889634f;
#ifdef DENSE
    float* logits = p.scratch + (i64)pair * p.slice;
#else
    // `slice` numbers for logits, as many for importance, `blocks` for keys, the list of blocks, and
    // the compressed branch's output.
    float* logits = p.scratch + (i64)pair * (2 * (i64)p.slice + p.blocks + SELECT_COUNT + GROUP * V);
#endif
    auto load_q = [&](int h) {
        __syncthreads();
        for (int d = threadIdx.x; d < D; d += THREADS) shared.q[d] = widen(p.q[(first_head + h) * D + d]);
        __syncthreads();
    };
    auto token_of = [&](const Cache& cache, int token, int dim) {
        const int slot = cache.ring ? token % cache.page : token;
        return token_start(cache, sequence, slot, head, p.kv_heads, dim);
    };
#ifdef DENSE
    const int oldest = WINDOW > 0 ? max(position - WINDOW + 1, 0) : 0;
    for (int h = 0; h < GROUP; ++h) {
        load_q(h);
        const float2 x = attend(shared, shared.reduce, p.slc, logits, position + 1 - oldest, scale,
                                [&](int i, int dim) { return token_of(p.slc, oldest + i, dim); });
        if (threadIdx.x < V) p.out[(first_head + h) * V + threadIdx.x] = narrow<Real>(x.y != 0.0f ? x.x / x.y : 0.0f);
    }
#else
    float* importance = logits + p.slice;
    u32* keys = (u32*)(importance + p.slice);
    i32* list = (i32*)(keys + p.blocks);
    float* cmp = (float*)(list + SELECT_COUNT);
    const int visible = position < 0 ? 0 : visible_compressed(position), current = position / SELECT_BLOCK;
    const bool ranked = position >= 0 && !all_selected(position);
    const int local = current + 1 - SELECT_LOCAL;
    for (int i = threadIdx.x; i < visible; i += THREADS) importance[i] = 0.0f;
    for (int h = 0; h < GROUP; ++h) {
        load_q(h);
        const float2 x = attend(shared, shared.reduce, p.cmp, logits, visible, scale,
                                [&](int i, int dim) { return token_of(p.cmp, i, dim); });
        if (threadIdx.x < V) cmp[h * V + threadIdx.x] = x.y != 0.0f ? x.x / x.y : 0.0f;
        if (x.y != 0.0f)
            for (int i = threadIdx.x; i < visible; i += THREADS) importance[i] += logits[i] * (1.0f / x.y);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SELECT_COUNT; i += THREADS) {
        int block = position >= 0 && i <= current ? i : -1;
        if (ranked && i >= SELECT_COUNT - SELECT_LOCAL) block = local + i - (SELECT_COUNT - SELECT_LOCAL);
        list[i] = block;
    }
    constexpr int FREE = SELECT_COUNT - SELECT_INITIAL - SELECT_LOCAL;
    if (ranked && FREE > 0) {
        constexpr int R = SELECT_BLOCK / COMPRESS_STRIDE, S = COMPRESS_BLOCK / COMPRESS_STRIDE;
        const int candidates = local - SELECT_INITIAL;
        for (int i = threadIdx.x; i < candidates; i += THREADS) {
            float score = 0.0f;
            for (int offset = 1 - S; offset < R; ++offset) {
                const int block = (i + SELECT_INITIAL) * R + offset;
                if (block >= 0 && block < visible) score = __fadd_rn(score, __fmul_rn((float)overlap(offset), importance[block]));
            }
            keys[i] = score_key(score);
        }
        __syncthreads();
        choose<1>(keys, candidates, FREE, SELECT_INITIAL, list + SELECT_INITIAL, shared.choice, threadIdx.x);
    }
    __syncthreads();
    if (p.indices)
        for (int i = threadIdx.x; i < SELECT_COUNT; i += THREADS) p.indices[(i64)pair * SELECT_COUNT + i] = list[i];
    const int oldest = max(position - WINDOW + 1, 0);
    for (int h = 0; h < GROUP; ++h) {
        load_q(h);
        const float2 slc = attend(shared, shared.reduce, p.slc, logits, position < 0 ? 0 : SELECT_COUNT * SELECT_BLOCK, scale,
                                  [&](int i, int dim) -> i64 {
                                      const int block = list[i / SELECT_BLOCK], token = block * SELECT_BLOCK + i % SELECT_BLOCK;
                                      return block < 0 || token > position ? -1 : token_of(p.slc, token, dim);
                                  });
        const float2 win = attend(shared, shared.reduce, p.win, logits, position + 1 - oldest, scale,
                                  [&](int i, int dim) { return token_of(p.win, oldest + i, dim); });
        if (threadIdx.x < V) {
            const Real* gate = p.gate + (first_head + h) * 3;
            float out = widen(gate[0]) * cmp[h * V + threadIdx.x];
            out += widen(gate[1]) * (slc.y != 0.0f ? slc.x / slc.y : 0.0f);
            out += widen(gate[2]) * (win.y != 0.0f ? win.x / win.y : 0.0f);
            p.out[(first_head + h) * V + threadIdx.x] = narrow<Real>(position < 0 ? 0.0f : out);
        }
    }
#endif
}
