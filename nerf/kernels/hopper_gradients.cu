// Weight gradients: (deltas)^T x (activations), summed over rows, for all layers in one launch.
//
// A program has two warp groups, one for each of the two chunks of deltas of its block, and a third
// that brings 64 rows of these and of up to four chunks of activations into a slot of a ring.

constexpr int WORK = 8;  // integers of an item of work

// --- weight gradients ----------------------------------------------------------------------------------

struct Gradients {
    const char *deltas, *activations;
    const int *items, *first_item;
    float* partials;
    int delta_chunks, activation_chunks;
};

constexpr u32 GRADIENT_SLOT = 6 * TILE;  // 2 chunks of deltas, 4 of activations
constexpr int PARTIAL = 128 * 257;       // numbers of a partial block

// With GRADIENT_CLUSTER == 2 the two programs that read the same activations each fetch half of
// them and send it to both; a slot is free when both have read theirs.
DEVICE void gradient_release(u32 bar) {
    barrier_arrive(bar);
#if GRADIENT_CLUSTER == 2
    barrier_arrive_at(bar, cluster_rank() ^ 1);
#endif
}

template <int N>
DEVICE void sum_item(const Gradients& p, const int* item, const Place& at, int group, u32 ring,
                     u32 full, u32 empty, u32 ones, int& slot, u32& phase) {
    float d[128], bias[4] = {0, 0, 0, 0};
    const bool used = group < item[1];
#pragma unroll
    for (int j = 0; j < 32 * N; j++) d[j] = 0.0f;
    int before = -1;
    for (int row = item[4]; row < item[5]; row += 64) {
        barrier_wait(full + 8 * slot, phase, 30);
        if (used) {
            const u32 left = ring + slot * GRADIENT_SLOT + group * TILE;
            const u32 right = ring + slot * GRADIENT_SLOT + 2 * TILE;
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                mma_across<N>(d, across_k(left + 2048 * k), across_k(right + 2048 * k));
                mma_ones(bias, across_k(left + 2048 * k), u64(8) << 32 | u64(8) << 16 | ones >> 4);
            }
            mma_commit();
            mma_wait<1>();
        }
        if (before >= 0 && at.lane == 0) gradient_release(empty + 8 * before);
        before = slot;
        if (++slot == GRADIENT_STAGES) slot = 0, phase ^= 1;
    }
    mma_wait<0>();
    if (before >= 0 && at.lane == 0) gradient_release(empty + 8 * before);
    if (used) {
        float* out = p.partials + size_t(item[6]) * PARTIAL + (group * 64 + at.row) * 256;
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            *reinterpret_cast<float2*>(out + 8 * j + 2 * at.q) = make_float2(d[4 * j], d[4 * j + 1]);
            *reinterpret_cast<float2*>(out + 8 * 256 + 8 * j + 2 * at.q) =
                make_float2(d[4 * j + 2], d[4 * j + 3]);
        }
        float* sums = p.partials + size_t(item[6]) * PARTIAL + 128 * 256 + group * 64 + at.row;
        if (at.q == 0) sums[0] = bias[0], sums[8] = bias[2];
    }
}

// Before a program ends: the other one may still send it something.
DEVICE void leave() {
#if GRADIENT_CLUSTER == 2
    __syncwarp();
    cluster_sync();
#endif
}

#if GRADIENT_CLUSTER == 2
#define CLUSTERED __cluster_dims__(2, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(384, 1) weight_gradients(Gradients p) {
    const u32 ring = shared_address(dynamic);
    const u32 ones = ring + GRADIENT_STAGES * GRADIENT_SLOT;
    const u32 full = ones + 1024, empty = full + 8 * GRADIENT_STAGES;
    if (threadIdx.x < 256)
        reinterpret_cast<u32*>(dynamic + GRADIENT_STAGES * GRADIENT_SLOT)[threadIdx.x] = 0x3F803F80u;
    fence_async();
    if (threadIdx.x == 0) {
        for (int i = 0; i < GRADIENT_STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8 * GRADIENT_CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if GRADIENT_CLUSTER == 2
    cluster_sync();
#endif
    const int begin = p.first_item[blockIdx.x], end = p.first_item[blockIdx.x + 1];
    const int group = threadIdx.x / 128;
    int slot = 0;
    u32 phase = 0;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) {
            for (int index = begin; index < end; index++) {
                const int* item = p.items + index * WORK;
                const int delta = item[0], source = item[2], last = item[5] / 64;
                const u32 left = item[1] * TILE, right = item[3] * TILE;
                for (int tile = item[4] / 64; tile < last; tile++) {
                    const u32 bar = full + 8 * slot, to = ring + slot * GRADIENT_SLOT;
                    barrier_wait(empty + 8 * slot, phase ^ 1, 31);
                    barrier_expect(bar, left + right);
                    copy_in(to, p.deltas + (size_t(tile) * p.delta_chunks + delta) * TILE, left, bar);
                    const char* from =
                        p.activations + (size_t(tile) * p.activation_chunks + source) * TILE;
#if GRADIENT_CLUSTER == 2
                    if (item[7]) {  // both programs go through the same rows
                        const u32 mine = cluster_rank() * (right / 2);
                        copy_in_both(to + 2 * TILE + mine, from + mine, right / 2, bar);
                    } else
#endif
                        copy_in(to + 2 * TILE, from, right, bar);
                    if (++slot == GRADIENT_STAGES) slot = 0, phase ^= 1;
                }
            }
        }
        leave();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const Place at(threadIdx.x & 127);
        for (int index = begin; index < end; index++) {
            const int* item = p.items + index * WORK;
#define ITEM(N) sum_item<N>(p, item, at, group, ring, full, empty, ones, slot, phase)
            if (item[3] == 4)
                ITEM(4);
            else if (item[3] == 3)
                ITEM(3);
            else if (item[3] == 2)
                ITEM(2);
            else
                ITEM(1);
#undef ITEM
        }
        leave();
    }
}
