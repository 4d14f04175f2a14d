// The layers of a network in one launch, for rendering, all of them padded to one WIDTH that is known
// when this is compiled: what `hopper_chain.cu` does for any widths in whole chunks of 64 columns, at
// a granularity of 16 columns and without its waits. One module a width.
//
// A warp group carries tiles of 64 rows through all layers in registers, as there. RESIDENT: all
// weights lie in shared memory from the start on, and GROUPS warp groups work on tiles of their own,
// in nobody's step; while one waits for its products, its bias or its rays, others multiply. Where
// the weights do not fit, one more group streams them through a ring that all groups read in step.
//
// Weights are **panels**: 16 inputs x N outputs, without swizzle: 8 outputs x 8 inputs are 128 bytes
// in a row (the core matrix of wgmma), the two of 16 inputs side by side, then the next 8 outputs.
// Vectors and shares are exchanged within 16 columns so that a thread reads its four at once.

constexpr int STEPS = WIDTH / 16;                    // panels of a layer that reads activations
constexpr int POINT_STEPS = 4;                       // panels of the encoded point
constexpr int HALF = (WIDTH / 2 + 15) / 16 * 16;     // a view layer of half the width
constexpr int SLOT_STEPS = 4;                        // panels of a slot of the ring
constexpr u32 SLOT = SLOT_STEPS * WIDTH * 32;        // bytes of a slot
constexpr int THREADS = 128 * (GROUPS + !RESIDENT);

struct Network {
    const float *origins, *directions, *distances, *share;
    const char* weights;
    const float* vector;
    float *density, *rgb;
    int n_rows, samples, tiles, layers, points, octaves, vector_size, wide_view;
    u32 inverse, weight_bytes;
};

// Descriptor of a panel.
DEVICE u64 panel(u32 address) {
    return (u64(256 >> 4) << 32) | (u64(128 >> 4) << 16) | ((address & 0x3FFFF) >> 4);
}

// The compiler may not touch accumulators before the products have been waited for.
template <int COUNT>
DEVICE void settle(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]));
}

// --- weights -------------------------------------------------------------------------------------

#if RESIDENT
struct Weights {
    u32 base, at;
    DEVICE void rewind() { at = base; }
};
#else
struct Weights {
    u32 base, full, empty;  // shared addresses: slots, barriers of STAGES each
    int slot;
    u32 phase;

    DEVICE void rewind() {}
    DEVICE u32 panels() const { return base + slot * SLOT; }
    DEVICE void advance() {
        if (++slot == STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }
    DEVICE void wait(int place) const { barrier_wait(full + 8 * slot, phase, place); }
    DEVICE void release(int which, int lane) const {
        if (lane == 0) barrier_arrive(empty + 8 * which);
    }
};

// The panels of one layer into the ring.
DEVICE const char* bring(const char* from, int panels, int outputs, Weights& w) {
    for (int first = 0; first < panels; first += SLOT_STEPS) {
        const u32 bytes = (panels - first < SLOT_STEPS ? panels - first : SLOT_STEPS) * outputs * 32;
        const u32 full = w.full + 8 * w.slot;
        barrier_wait(w.empty + 8 * w.slot, w.phase ^ 1, 20);
        barrier_expect(full, bytes);
        copy_in(w.panels(), from, bytes, full);
        from += bytes;
        w.advance();
    }
    return from;
}

DEVICE void stream_weights(const Network& p, Weights w) {
    const int blocks = (p.tiles + GROUPS - 1) / GROUPS;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const char* from = bring(p.weights, POINT_STEPS, WIDTH, w);
        for (int layer = 1; layer < p.layers; layer++)
            from = bring(from, STEPS + (p.points >> layer & 1) * POINT_STEPS, WIDTH, w);
        bring(from, STEPS, p.wide_view ? WIDTH : HALF, w);
    }
}
#endif

// Two groups take turns of a layer: one waits until the other has issued its products.
DEVICE void take_turn() {
    if (GROUPS == 2) named_sync(3 + threadIdx.x / 128, 256);
}
DEVICE void end_turn() {
    if (GROUPS == 2) named_arrive(4 - threadIdx.x / 128, 256);
}

// d += [point, activations] x weights.
template <int N, int SOURCES, bool POINT>
DEVICE void product(float (&d)[N / 2], u32 (&a)[STEPS][4], u32 point_tile, Weights& w,
                    [[maybe_unused]] int lane) {
    constexpr int FIRST = POINT ? POINT_STEPS : 0;
    constexpr int PANELS = SOURCES + FIRST;
#if RESIDENT
    mma_fence();
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
        if (i < FIRST)
            mma_shared<N>(d, along_k(point_tile + 32 * i), panel(w.at + i * (N * 32)));
        else
            mma_registers<N>(d, a[i < FIRST ? 0 : i - FIRST], panel(w.at + i * (N * 32)));
    }
    mma_commit();
    w.at += PANELS * (N * 32);
    mma_wait<0>();
#else
    constexpr int SLOTS = (PANELS + SLOT_STEPS - 1) / SLOT_STEPS;
    int before = 0;
    take_turn();
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        w.wait(1 + s);
        mma_fence();
#pragma unroll
        for (int i = SLOT_STEPS * s; i < SLOT_STEPS * s + SLOT_STEPS; i++) {
            if (i < PANELS) {
                const u64 b = panel(w.panels() + (i - SLOT_STEPS * s) * (N * 32));
                if (i < FIRST)
                    mma_shared<N>(d, along_k(point_tile + 32 * i), b);
                else
                    mma_registers<N>(d, a[i < FIRST ? 0 : i - FIRST], b);
            }
        }
        mma_commit();
        if (s == SLOTS - 1) end_turn();
        if (s > 0) {
            mma_wait<1>();
            w.release(before, lane);
        }
        before = w.slot;
        w.advance();
    }
    mma_wait<0>();
    w.release(before, lane);
#endif
    settle(d);
}

// --- rows ----------------------------------------------------------------------------------------

// n / samples, where `inverse` is 2^32 / samples rounded down (2^32 - 1 at most).
DEVICE int ray_of(const Network& p, int n) {
    const int ray = __umulhi(u32(n), p.inverse);
    return n - ray * p.samples >= p.samples ? ray + 1 : ray;
}

// Where a row is on its ray; a row behind the last one repeats that.
struct Sample {
    float t, origin[3], direction[3];

    DEVICE void fetch(const Network& p, int row) {
        row = row < p.n_rows ? row : p.n_rows - 1;
        const int ray = ray_of(p, row);
        t = p.distances[row];
#pragma unroll
        for (int i = 0; i < 3; i++) {
            origin[i] = p.origins[3 * ray + i];
            direction[i] = p.directions[3 * ray + i];
        }
    }
};

// Columns 32 SIDE to 32 SIDE + 31 of an encoded point (`nerf.encoding.encode`), into a tile. Sines
// and cosines of an octave follow from those of the octave below, sin 2x = 2 sin x cos x and cos 2x =
// 1 - 2 sin^2 x, which doubles an error: after five octaves 2e-5, a hundredth of what bf16 rounds.
template <int SIDE>
DEVICE void encode_side(const Sample& at, int octaves, int row, u32 tile) {
    constexpr float INVERSE = 0.15915494f, REST = 6.4206384e-09f;  // 1 / 2 pi, and what rounding lost
    constexpr int FIRST = 4 * SIDE;                                // octave
    float v[32], sine[3], cosine[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const float x = fmaf(at.t, at.direction[i], at.origin[i]);
        if (SIDE == 0) v[i] = x;
        const float high = x * INVERSE;
        const float low = fmaf(x, INVERSE, -high) + x * REST;
        const float turns = high * float(1 << FIRST);
        const float angle = ((turns - rintf(turns)) + low * float(1 << FIRST)) * 6.2831853f;
        sine[i] = __sinf(angle), cosine[i] = __cosf(angle);
    }
#pragma unroll
    for (int octave = FIRST; octave < FIRST + 6 - (SIDE == 0); octave++) {
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const int column = 3 + 6 * octave + i - 32 * SIDE;
            if (column >= 0 && column < 32) v[column] = octave < octaves ? sine[i] : 0.0f;
            if (column + 3 >= 0 && column + 3 < 32)
                v[column + 3] = octave < octaves ? cosine[i] : 0.0f;
            const float twice = 2.0f * sine[i];
            sine[i] = twice * cosine[i];
            cosine[i] = fmaf(-twice, 0.5f * twice, 1.0f);
        }
    }
    if (SIDE == 1) v[31] = 0.0f;
#pragma unroll
    for (int unit = 0; unit < 4; unit++) {
        const float* u = v + 8 * unit;
        store_shared(tile + row * 128 + (((unit + 4 * SIDE) ^ (row & 7)) << 4), pack(u[0], u[1]),
                     pack(u[2], u[3]), pack(u[4], u[5]), pack(u[6], u[7]));
    }
}

// Accumulators of both rows of a thread from a vector (exchanged within 16 columns), one each.
template <int N>
DEVICE void start(float (&d)[N / 2], const float* upper, const float* lower) {
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
        const float4 u = *reinterpret_cast<const float4*>(upper + 16 * j);
        const float4 v = *reinterpret_cast<const float4*>(lower + 16 * j);
        d[8 * j] = u.x, d[8 * j + 1] = u.y, d[8 * j + 4] = u.z, d[8 * j + 5] = u.w;
        d[8 * j + 2] = v.x, d[8 * j + 3] = v.y, d[8 * j + 6] = v.z, d[8 * j + 7] = v.w;
    }
}

// A head: the sum over columns of relu(d) x weights, for both rows, in all four threads of a row.
template <int N>
DEVICE float2 head(const float (&d)[N / 2], const float* weights) {
    float upper = 0, lower = 0;
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
        const float4 w = *reinterpret_cast<const float4*>(weights + 16 * j);
        upper += positive(d[8 * j]) * w.x + positive(d[8 * j + 1]) * w.y +
                 positive(d[8 * j + 4]) * w.z + positive(d[8 * j + 5]) * w.w;
        lower += positive(d[8 * j + 2]) * w.x + positive(d[8 * j + 3]) * w.y +
                 positive(d[8 * j + 6]) * w.z + positive(d[8 * j + 7]) * w.w;
    }
    return make_float2(quad_sum(upper), quad_sum(lower));
}

// The view layer of N columns, and the colours.
template <int N>
DEVICE void view_layer(const Network& p, const float* heads, u32 (&a)[STEPS][4], int row,
                       const Place& at, Weights& w) {
    float d[N / 2];
    const int last = p.n_rows - 1;
    const int upper = ray_of(p, row < last ? row : last);
    const int lower = ray_of(p, row + 8 < last ? row + 8 : last);
    start<N>(d, p.share + upper * N + 4 * at.q, p.share + lower * N + 4 * at.q);
    product<N, STEPS, false>(d, a, 0, w, at.lane);
    float2 sums[3];
#pragma unroll
    for (int c = 0; c < 3; c++) sums[c] = head<N>(d, heads + c * N + 4 * at.q);
    if (at.q < 3) {
        const float2 mine = at.q == 0 ? sums[0] : at.q == 1 ? sums[1] : sums[2];
        const float bias = heads[3 * N + 1 + at.q];
        if (row < p.n_rows) p.rgb[row * 3 + at.q] = mine.x + bias;
        if (row + 8 < p.n_rows) p.rgb[(row + 8) * 3 + at.q] = mine.y + bias;
    }
}

// One tile through all layers.
DEVICE void through(const Network& p, const float* vector, const Sample& sample, int tile,
                    u32 point_tile, int group, int thread, const Place& at, Weights& w) {
    named_sync(1 + group, 128);  // all warps must have read the points before they are overwritten
    if (thread < 64)
        encode_side<0>(sample, p.octaves, thread & 63, point_tile);
    else
        encode_side<1>(sample, p.octaves, thread & 63, point_tile);
    fence_async();
    named_sync(1 + group, 128);
    const int row = tile * 64 + at.row;
    u32 a[STEPS][4];
    w.rewind();
    for (int layer = 0; layer < p.layers; layer++) {
        float d[WIDTH / 2];
        const float* bias = vector + layer * WIDTH + 4 * at.q;
        start<WIDTH>(d, bias, bias);
        if (layer == 0)
            product<WIDTH, 0, true>(d, a, point_tile, w, at.lane);
        else if (p.points >> layer & 1)
            product<WIDTH, STEPS, true>(d, a, point_tile, w, at.lane);
        else
            product<WIDTH, STEPS, false>(d, a, 0, w, at.lane);
        if (layer == p.layers - 1) {
            const float2 sums = head<WIDTH>(d, vector + p.layers * WIDTH + 4 * at.q);
            const float mine = at.q == 0 ? sums.x : sums.y;
            const int mine_row = row + 8 * at.q;
            if (at.q < 2 && mine_row < p.n_rows)
                p.density[mine_row] = mine + vector[p.vector_size - 4];
        }
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[k][i] = pack_relu(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
        }
    }
    const float* heads = vector + (p.layers + 1) * WIDTH;
    if (HALF < WIDTH && !p.wide_view)
        view_layer<HALF>(p, heads, a, row, at, w);
    else
        view_layer<WIDTH>(p, heads, a, row, at, w);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(Network p) {
    // Shared memory: points of each group, weights (RESIDENT) or the ring, barriers, the vector.
    const u32 points = shared_address(dynamic);
    const u32 weights = points + GROUPS * TILE;
    const u32 held = RESIDENT ? p.weight_bytes : STAGES * SLOT;
    char* rest = dynamic + GROUPS * TILE + held;
    const u32 full = shared_address(rest);
    float* vector = reinterpret_cast<float*>(rest + 256);
    if (threadIdx.x == 0) {
#if RESIDENT
        barrier_init(full, 1);
#else
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(full + 8 * (STAGES + i), 4 * GROUPS);
        }
#endif
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < p.vector_size; i += blockDim.x) vector[i] = p.vector[i];
    __syncthreads();
    const int group = threadIdx.x / 128, thread = threadIdx.x & 127;
    const Place at(thread);
    const u32 point_tile = points + group * TILE;
#if RESIDENT
    if (threadIdx.x == 0) {
        barrier_expect(full, held);
        copy_in(weights, p.weights, held, full);
    }
    barrier_wait(full, 0, 1);
    Weights w{weights, weights};
    const int stride = gridDim.x * GROUPS;
    int tile = blockIdx.x * GROUPS + group;
    Sample sample;
    sample.fetch(p, tile * 64 + (thread & 63));
    for (; tile < p.tiles; tile += stride) {
        const Sample here = sample;
        sample.fetch(p, (tile + stride) * 64 + (thread & 63));
        through(p, vector, here, tile, point_tile, group, thread, at, w);
    }
#else
    Weights w{weights, full, full + 8 * STAGES, 0, 0};
    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (thread == 0) stream_weights(p, w);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
        if (GROUPS == 2 && group == 1) named_arrive(3, 256);
        const int blocks = (p.tiles + GROUPS - 1) / GROUPS;
        Sample sample;
        sample.fetch(p, (blockIdx.x * GROUPS + group) * 64 + (thread & 63));
        for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
            const Sample here = sample;
            sample.fetch(p, ((block + gridDim.x) * GROUPS + group) * 64 + (thread & 63));
            through(p, vector, here, block * GROUPS + group, point_tile, group, thread, at, w);
        }
    }
#endif
}
