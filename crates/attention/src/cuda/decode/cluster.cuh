// What decode needs of Hopper beside `hopper.cuh`: a copy of one page's tokens, and blocks of a
// cluster that write into each other's shared memory.
#pragma once
#include "hopper.cuh"

// Copies a box of 64 columns and some tokens of one head of one page. `policy` is for the L2.
DEVICE void load_tokens(u32 target, const TensorMap* map, u64* barrier, int column, int token, int head, int page, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
        "%5, %6}], [%2], %7;" ::"r"(target),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head), "r"(page), "l"(policy)
        : "memory");
}
// Data read once leaves the L2 first; else nothing special.
DEVICE u64 policy_of(bool once) {
    u64 first, normal;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
    return once ? first : normal;
}

template <int ID, int THREADS>
DEVICE void group_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
template <int ID, int THREADS>
DEVICE void group_arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all blocks; orders only barriers made ready by `barrier_fence_init`.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// The address of a peer's copy of something in shared memory.
DEVICE u32 peer_address(u32 local, u32 rank) {
    u32 y;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"(local), "r"(rank));
    return y;
}
// Writes into a peer's shared memory; its barrier counts the bytes.
DEVICE void peer_store(u32 at, u32 barrier, float2 x) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(at),
                 "f"(x.x), "f"(x.y), "r"(barrier)
                 : "memory");
}
DEVICE void peer_store(u32 at, u32 barrier, float4 x) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(at),
                 "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
                 : "memory");
}
// Arrives at a peer's barrier after everything before, in global memory too.
DEVICE void peer_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits for a phase that peers' writes complete.
DEVICE void barrier_wait_peers(u64* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(shared_address(barrier))
        : "memory");
}
