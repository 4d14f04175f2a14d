// What the kernels for Hopper GPUs (compute capability 9.0) share. `nerf/kernels/hopper.py` puts the
// wgmma wrappers and a kernel's constants before this text and the kernel behind it, compiles it
// with NVRTC and launches it.
//
// Tiles of 64 x 64 bf16 (8 KiB) lie in memory as they lie in shared memory (rows of 128 bytes, the
// 16-byte units of a row exchanged by the 128-byte swizzle), so that plain bulk copies move them.
// Activations and deltas are kept as [row tile][chunk][64 x 64].

#define DEVICE __device__ __forceinline__

constexpr u32 TILE = 8192;  // bytes of a tile

// --- shared memory, barriers, copies ---------------------------------------------------------

DEVICE u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

DEVICE void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

DEVICE void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrive at the same barrier of another program of the cluster.
DEVICE void barrier_arrive_at(u32 bar, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
        "r"(rank)
        : "memory");
}

#ifdef WATCH
extern "C" __device__ int reports[1 + 4 * 64];
#endif

DEVICE void barrier_wait(u32 bar, u32 parity, [[maybe_unused]] int place) {
#ifdef WATCH
    // For debugging: who waits too long says so, and then nobody waits any more.
    for (int i = 0; i < WATCH; i++) {
        u32 done;
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
        if (done || *(volatile int*)reports) return;
    }
    const int i = atomicAdd(reports, 1);
    if (i < 64) {
        reports[4 * i + 1] = blockIdx.x, reports[4 * i + 2] = threadIdx.x;
        reports[4 * i + 3] = place, reports[4 * i + 4] = bar * 2 + parity;
    }
#else
    asm volatile(
        "{\n.reg .pred p;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
#endif
}

DEVICE void copy_in(u32 target, const void* source, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(target),
        "l"(source), "r"(bytes), "r"(bar)
        : "memory");
}

// The same into both programs of a cluster.
DEVICE void copy_in_both(u32 target, const void* source, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(target),
        "l"(source), "r"(bytes), "r"(bar), "h"((unsigned short)3)
        : "memory");
}

DEVICE void copy_out(void* target, u32 source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
                 "r"(source), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

DEVICE void copies_out_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// What ordinary stores wrote to shared memory becomes visible to wgmma and to bulk copies.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

DEVICE void store_shared(u32 at, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

// --- wgmma -----------------------------------------------------------------------------------

DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of rows of 64 values along the summed dimension ("K-major"), 128-byte swizzle.
DEVICE u64 along_k(u32 address) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | ((address & 0x3FFFF) >> 4);
}

// Descriptor of tiles whose rows are the summed dimension ("MN-major"), 128-byte swizzle; the
// next 64 columns are a tile further.
DEVICE u64 across_k(u32 address) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(TILE >> 4) << 16) |
           ((address & 0x3FFFF) >> 4);
}

// --- numbers -----------------------------------------------------------------------------------

DEVICE u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE u32 pack_relu(float low, float high) {
    u32 both;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE float positive(float x) { return fmaxf(x, 0.0f); }

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// --- what a warp group's thread holds ------------------------------------------------------------

// Thread `lane` of warp w has, of rows 16 w + lane / 4 and 8 below, columns 8 j + 2 (lane % 4) + {0, 1}.
struct Place {
    int lane, warp, q, row;  // row: the upper one of the two

    DEVICE explicit Place(int thread)
        : lane(thread & 31), warp((thread >> 5) & 3), q(thread & 3),
          row(16 * warp + ((thread >> 2) & 7)) {}
};

extern __shared__ __align__(1024) char dynamic[];
