// The layers of a network in one launch: forward and backward chains.
//
// A program has two warp groups that multiply and a third that only brings data. A warp group
// carries 64 rows through all layers *in registers*: the accumulators of m64nNk16 hold, once
// rounded to bf16, exactly the fragments that the next product reads as its left operand. Weights
// come from L2 through a ring of `STAGES` slots of 64 inputs x up to 256 outputs that both groups
// read. The groups take turns: one multiplies while the other finishes its layer.
//
// One file, three modules: the forward chain for rendering, the one that keeps activations (TRAIN),
// and the backward chain (TRAIN, BACKWARD).

constexpr u32 SLOT = 4 * TILE;  // bytes of a slot of the ring of weights
constexpr int TABLE = 8;        // integers of a step
constexpr int MAX_STEPS = 40;

// --- the ring of weights -----------------------------------------------------------------------

struct Ring {
    u32 base, full, empty;  // shared addresses: slots, barriers of STAGES each
    int slot;
    u32 phase;

    DEVICE u32 tiles() const { return base + slot * SLOT; }
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

// The groups take turns of TURN chunks of inputs (0: no turns): one waits until the other has issued
// its products. A turn must fit into the ring, which frees a slot when both have read it.
DEVICE void take_turn(int chunk) {
    if (TURN > 0 && chunk % TURN == 0) named_sync(3 + threadIdx.x / 128, 256);
}
DEVICE void end_turn(int chunk, int chunks) {
    if (TURN > 0 && ((chunk + 1) % TURN == 0 || chunk + 1 == chunks))
        named_arrive(4 - threadIdx.x / 128, 256);
}

// d += [point, activations] x weights: 64 rows x 64 N outputs of one layer. The numbers of chunks
// are compile-time constants: a branch between two products would make the compiler wait for each.
template <int N, int SOURCES, bool POINT>
DEVICE void product(float (&d)[128], u32 (&a)[16][4], u32 point_tile, Ring& ring, int lane) {
    constexpr int CHUNKS = SOURCES + POINT;
    int before = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        take_turn(i);
        ring.wait(1 + i);
        mma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (POINT && i == 0)
                mma_shared<N>(d, along_k(point_tile + 32 * k), along_k(ring.tiles() + 32 * k));
            else
                mma_registers<N>(d, a[4 * (i - POINT) + k], along_k(ring.tiles() + 32 * k));
        }
        mma_commit();
        end_turn(i, CHUNKS);
        if (i > 0) {
            mma_wait<1>();
            ring.release(before, lane);
        }
        before = ring.slot;
        ring.advance();
    }
    mma_wait<0>();
    ring.release(before, lane);
}

template <int N, bool POINT>
DEVICE void product_of(float (&d)[128], u32 (&a)[16][4], int sources, u32 point_tile, Ring& ring,
                       int lane) {
    if (sources == 4)
        product<N, 4, POINT>(d, a, point_tile, ring, lane);
    else if (sources == 3)
        product<N, 3, POINT>(d, a, point_tile, ring, lane);
    else if (sources == 2)
        product<N, 2, POINT>(d, a, point_tile, ring, lane);
    else if (!POINT || sources == 1)
        product<N, 1, POINT>(d, a, point_tile, ring, lane);
    else
        product<N, 0, POINT>(d, a, point_tile, ring, lane);
}

// The producer: every block of rows needs all weights once, in the order in which they lie.
DEVICE void stream_weights(const char* weights, const int* table, int steps, int blocks, Ring ring) {
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        const char* from = weights;
        for (int step = 0; step < steps; step++) {
            const u32 bytes = table[step * TABLE] * TILE;
            const int count = table[step * TABLE + 2] + table[step * TABLE + 3];
            for (int k = 0; k < count; k++) {
                const u32 full = ring.full + 8 * ring.slot;
                barrier_wait(ring.empty + 8 * ring.slot, ring.phase ^ 1, 20);
                barrier_expect(full, bytes);
                copy_in(ring.tiles(), from, bytes, full);
                from += bytes;
                ring.advance();
            }
        }
    }
}

// --- activations and gates

#if TRAIN
// Keep `chunks` chunks of a warp group's fragment in device memory: into shared memory first (the
// four matrices of a fragment are what stmatrix stores), from there by the copy engine, which leaves
// the warps free.
struct Keeper {
    u32 staging;
    int group, thread;

    DEVICE void wait() const {
        if (thread == 0) copies_out_read();
        named_sync(1 + group, 128);
    }
    DEVICE void stage(const u32 (&a)[16][4], int c, const Place& at) const {
        const int row = 16 * at.warp + at.lane % 16;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const u32 unit = ((2 * k + at.lane / 16) ^ (row & 7)) << 4;
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    staging + c * TILE + row * 128 + unit),
                "r"(a[4 * c + k][0]), "r"(a[4 * c + k][1]), "r"(a[4 * c + k][2]),
                "r"(a[4 * c + k][3])
                : "memory");
        }
    }
    DEVICE void send(char* target, int chunks, bool live) const {
        fence_async();
        named_sync(1 + group, 128);
        if (thread == 0 && live) copy_out(target, staging, chunks * TILE);
    }
};
#endif

// One bit a value that is not zero (values are not negative), of the 16 registers of a chunk.
DEVICE u32 gate_word(const u32 (&a)[16][4], int c) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 16; i++)
        word = (word >> 1) | ((a[4 * c + i / 4][i % 4] + 0x7FFF7FFFu) & 0x80008000u);
    return word;
}

// All ones in the halves of register i of a chunk whose gate is open.
DEVICE u32 gate_mask(u32 word, int i) {
    u32 mask;  // each half filled with the sign of its upper byte; __byte_perm cannot do that
    asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(word << (15 - i)));
    return mask;
}

// --- the encoding ----------------------------------------------------------------------------------

// Columns 32 HALF to 32 HALF + 31 of an encoded point (`nerf.encoding.encode`), into a tile.
template <int HALF>
DEVICE void encode_half(float x, float y, float z, int octaves, int row, u32 tile) {
    constexpr float INVERSE = 0.15915494f, REST = 6.4206384e-09f;  // 1 / 2 pi, and what rounding lost
    const float point[3] = {x, y, z};
    float high[3], low[3];
#pragma unroll
    for (int i = 0; i < 3; i++) {
        high[i] = point[i] * INVERSE;
        low[i] = fmaf(point[i], INVERSE, -high[i]) + point[i] * REST;
    }
#pragma unroll
    for (int unit = 4 * HALF; unit < 4 * HALF + 4; unit++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int column = 8 * unit + i, wave = column - 3;
            if (column < 3) {
                v[i] = point[column];
            } else {
                const int octave = wave / 6, which = wave % 6;
                const float scale = float(1 << octave);
                const float turns = high[which % 3] * scale;
                const float part = (turns - rintf(turns)) + low[which % 3] * scale;
                const float angle = part * 6.2831853f;
                const float value = which < 3 ? __sinf(angle) : __cosf(angle);
                v[i] = octave < octaves ? value : 0.0f;
            }
        }
        store_shared(tile + row * 128 + ((unit ^ (row & 7)) << 4), pack(v[0], v[1]),
                     pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
    }
}

// --- the forward chain -----------------------------------------------------------------------------

struct Forward {
    const float *origins, *directions, *distances, *share;
    const int* table;
    const char* weights;
    const float* vector;
    char* activations;
    uint4* gates;
    float *density, *rgb;
    int n_rows, samples, tiles, chunks, steps, density_at, rgb_at, bias_at, octaves, vector_size;
};

template <int N>
DEVICE void forward_layer(const Forward& p, const int* step, const float* vector, int kind, int layer,
                          u32 (&a)[16][4], u32 point_tile, int row_tile, const Place& at, Ring& ring,
                          [[maybe_unused]] int group) {
    float d[128];
    const int row = row_tile * 64 + at.row;
    const bool here = row < p.n_rows, below = row + 8 < p.n_rows;
    if (kind == 2) {
        const int upper = here ? row / p.samples : 0, lower = below ? (row + 8) / p.samples : 0;
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            const float2 u = *reinterpret_cast<const float2*>(
                p.share + upper * (64 * N) + 8 * j + 2 * at.q);
            const float2 v = *reinterpret_cast<const float2*>(
                p.share + lower * (64 * N) + 8 * j + 2 * at.q);
            d[4 * j] = u.x, d[4 * j + 1] = u.y, d[4 * j + 2] = v.x, d[4 * j + 3] = v.y;
        }
    } else {
        const float* bias = vector + step[5] * 64 + 2 * at.q;
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j);
            d[4 * j] = d[4 * j + 2] = b.x, d[4 * j + 1] = d[4 * j + 3] = b.y;
        }
    }
    if (step[3])
        product_of<N, true>(d, a, step[2], point_tile, ring, at.lane);
    else
        product_of<N, false>(d, a, step[2], 0, ring, at.lane);
    if (kind == 1) {
        float upper = 0, lower = 0;
        const float* head = vector + p.density_at * 64 + 2 * at.q;
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            const float2 w = *reinterpret_cast<const float2*>(head + 8 * j);
            upper += positive(d[4 * j]) * w.x + positive(d[4 * j + 1]) * w.y;
            lower += positive(d[4 * j + 2]) * w.x + positive(d[4 * j + 3]) * w.y;
        }
        upper = quad_sum(upper), lower = quad_sum(lower);
        const float bias = vector[p.bias_at * 64];
        if (at.q == 0 && here) p.density[row] = upper + bias;
        if (at.q == 0 && below) p.density[row + 8] = lower + bias;
    }
    if (kind == 2) {
#pragma unroll
        for (int c = 0; c < 3; c++) {
            float upper = 0, lower = 0;
            const float* head = vector + (p.rgb_at + c * N) * 64 + 2 * at.q;
#pragma unroll
            for (int j = 0; j < 8 * N; j++) {
                const float2 w = *reinterpret_cast<const float2*>(head + 8 * j);
                upper += positive(d[4 * j]) * w.x + positive(d[4 * j + 1]) * w.y;
                lower += positive(d[4 * j + 2]) * w.x + positive(d[4 * j + 3]) * w.y;
            }
            upper = quad_sum(upper), lower = quad_sum(lower);
            const float bias = vector[p.bias_at * 64 + 1 + c];
            if (at.q == 0 && here) p.rgb[row * 3 + c] = upper + bias;
            if (at.q == 0 && below) p.rgb[(row + 8) * 3 + c] = lower + bias;
        }
#if !TRAIN
        return;
#endif
    }
#pragma unroll
    for (int k = 0; k < 4 * N; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[k][i] = pack_relu(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
    }
#if TRAIN
    const Keeper keeper{point_tile + (2 + 3 * group) * TILE, group, 32 * at.warp + at.lane};
    keeper.wait();
    u32 words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < N; c++) keeper.stage(a, c, at);
    const bool live = row_tile < p.tiles;
    keeper.send(p.activations + (size_t(row_tile) * p.chunks + step[6]) * TILE, N, live);
#pragma unroll
    for (int c = 0; c < N; c++) words[c] = gate_word(a, c);
    if (live)
        p.gates[(size_t(layer) * p.tiles + row_tile) * 128 + at.warp * 32 + at.lane] =
            make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// Set up barriers, copy table and vector into shared memory, and send the producer off. Returns
// false in threads that have nothing to multiply.
struct Setup {
    Ring ring;
    u32 points;  // two tiles of encoded points (forward) behind the ring, then 2 x 4 of staging (TRAIN)
    const int* table;
    const float* vector;
};

DEVICE Setup set_up(char* memory, const int* table, int steps, const float* vector, int size) {
    Setup s;
    s.ring = Ring{shared_address(memory), 0, 0, 0, 0};
    s.points = s.ring.base + STAGES * SLOT;
    char* rest = memory + STAGES * SLOT + (TRAIN ? 10 : 2) * TILE;
    s.ring.full = shared_address(rest);
    s.ring.empty = s.ring.full + 8 * STAGES;
    int* table_here = reinterpret_cast<int*>(rest + 256);
    float* vector_here = reinterpret_cast<float*>(rest + 256 + MAX_STEPS * TABLE * 4);
    s.table = table_here;
    s.vector = vector_here;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(s.ring.full + 8 * i, 1);
            barrier_init(s.ring.empty + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < steps * TABLE; i += blockDim.x) table_here[i] = table[i];
    for (int i = threadIdx.x; i < size; i += blockDim.x) vector_here[i] = vector[i];
    __syncthreads();
    return s;
}

DEVICE int blocks_of(int tiles) { return (tiles + 1) / 2; }

DEVICE void forward(const Forward& p, char* memory) {
    const Setup s = set_up(memory, p.table, p.steps, p.vector, p.vector_size);
    const int blocks = blocks_of(p.tiles);
    const int group = threadIdx.x / 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) stream_weights(p.weights, s.table, p.steps, blocks, s.ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Ring ring = s.ring;
        const int thread = threadIdx.x & 127;
        const Place at(thread);
        const u32 point_tile = s.points + group * TILE;
        u32 a[16][4];
        if (TURN > 0 && group == 1) named_arrive(3, 256);
        for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
            const int row_tile = 2 * block + group;
            const int row = row_tile * 64 + (thread & 63);
            const bool valid = row < p.n_rows;
            const int ray = valid ? row / p.samples : 0;
            const float t = valid ? p.distances[row] : 0.0f;
            const float x = fmaf(t, p.directions[3 * ray], p.origins[3 * ray]);
            const float y = fmaf(t, p.directions[3 * ray + 1], p.origins[3 * ray + 1]);
            const float z = fmaf(t, p.directions[3 * ray + 2], p.origins[3 * ray + 2]);
            // All warps must have read the tile before it is overwritten.
            if (TRAIN && thread == 0) copies_out_read();
            named_sync(1 + group, 128);
            if (thread < 64)
                encode_half<0>(x, y, z, p.octaves, thread & 63, point_tile);
            else
                encode_half<1>(x, y, z, p.octaves, thread & 63, point_tile);
            fence_async();
            named_sync(1 + group, 128);
            if (TRAIN && thread == 0 && row_tile < p.tiles)
                copy_out(p.activations + size_t(row_tile) * p.chunks * TILE, point_tile, TILE);
            for (int index = 0; index < p.steps; index++) {
                const int* step = s.table + index * TABLE;
                const int kind = index == p.steps - 1 ? 2 : index == p.steps - 2 ? 1 : 0;
                const int outputs = step[0];
#define LAYER(N)                                                                              \
    forward_layer<N>(p, step, s.vector, kind, index, a, point_tile, row_tile, at, ring, group)
                if (outputs == 4)
                    LAYER(4);
                else if (outputs == 3)
                    LAYER(3);
                else if (outputs == 2)
                    LAYER(2);
                else
                    LAYER(1);
#undef LAYER
            }
        }
        if (TRAIN && thread == 0) copies_out_read();
    }
}

#if !TRAIN
extern "C" __global__ void __launch_bounds__(384, 1) forward_render(Forward p) {
    forward(p, dynamic);
}
#elif !BACKWARD
extern "C" __global__ void __launch_bounds__(384, 1) forward_train(Forward p) {
    forward(p, dynamic);
}
#else

// --- the backward chain ------------------------------------------------------------------------------

struct Backward {
    const float *g_density, *g_rgb;
    const int* table;
    const char* weights;
    const float* vector;
    const uint4* gates;
    char* deltas;
    int n_rows, tiles, chunks, steps, view_chunks, view_delta, density_at, rgb_at, vector_size;
};

template <int N>
DEVICE void backward_layer(const Backward& p, const int* step, const float* vector, int layer,
                           bool first, float upper, float lower, u32 (&a)[16][4], int row_tile,
                           const Place& at, Ring& ring, const Keeper& keeper) {
    float d[128];
    if (first) {
        const float* head = vector + p.density_at * 64 + 2 * at.q;
#pragma unroll
        for (int j = 0; j < 8 * N; j++) {
            const float2 w = *reinterpret_cast<const float2*>(head + 8 * j);
            d[4 * j] = upper * w.x, d[4 * j + 1] = upper * w.y;
            d[4 * j + 2] = lower * w.x, d[4 * j + 3] = lower * w.y;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 32 * N; j++) d[j] = 0.0f;
    }
    const bool live = row_tile < p.tiles;
    const int shown = live ? row_tile : p.tiles - 1;
    const uint4 gate = p.gates[(size_t(layer) * p.tiles + shown) * 128 + at.warp * 32 + at.lane];
    product_of<N, false>(d, a, step[2], 0, ring, at.lane);
    const u32 words[4] = {gate.x, gate.y, gate.z, gate.w};
#pragma unroll
    for (int k = 0; k < 4 * N; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[k][i] = pack(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]) &
                      gate_mask(words[k / 4], 4 * (k % 4) + i);
    }
    keeper.wait();
#pragma unroll
    for (int c = 0; c < N; c++) keeper.stage(a, c, at);
    keeper.send(p.deltas + (size_t(row_tile) * p.chunks + step[6]) * TILE, N, live);
}

extern "C" __global__ void __launch_bounds__(384, 1) backward(Backward p) {
    const Setup s = set_up(dynamic, p.table, p.steps, p.vector, p.vector_size);
    const int blocks = blocks_of(p.tiles);
    const int group = threadIdx.x / 128;
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) stream_weights(p.weights, s.table, p.steps, blocks, s.ring);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Ring ring = s.ring;
        const int thread = threadIdx.x & 127;
        const Place at(thread);
        const Keeper keeper{s.points + (2 + 4 * group) * TILE, group, thread};
        u32 a[16][4];
        if (TURN > 0 && group == 1) named_arrive(3, 256);
        for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
            const int row_tile = 2 * block + group;
            const bool live = row_tile < p.tiles;
            const int shown = live ? row_tile : p.tiles - 1;
            const int row = row_tile * 64 + at.row;
            float g[2][4];  // density, red, green, blue of the upper and the lower row
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = row + 8 * i;
                const bool valid = r < p.n_rows;
                g[i][0] = valid ? p.g_density[r] : 0.0f;
#pragma unroll
                for (int c = 0; c < 3; c++) g[i][1 + c] = valid ? p.g_rgb[3 * r + c] : 0.0f;
            }
            const uint4 gate =
                p.gates[(size_t(p.steps) * p.tiles + shown) * 128 + at.warp * 32 + at.lane];
            const u32 words[4] = {gate.x, gate.y, gate.z, gate.w};
            char* tile = p.deltas + (size_t(row_tile) * p.chunks + p.view_delta) * TILE;
            keeper.wait();
            const float* red = s.vector + p.rgb_at * 64 + 2 * at.q;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (c < p.view_chunks) {
#pragma unroll
                    for (int k = 4 * c; k < 4 * c + 4; k++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            // Registers: upper left, lower left, upper right, lower right.
                            const int column = 16 * k + 8 * (i / 2);
                            float u = 0, v = 0;
#pragma unroll
                            for (int h = 0; h < 3; h++) {
                                const float2 w = *reinterpret_cast<const float2*>(
                                    red + h * p.view_chunks * 64 + column);
                                u = fmaf(g[i % 2][1 + h], w.x, u);
                                v = fmaf(g[i % 2][1 + h], w.y, v);
                            }
                            a[k][i] = pack(u, v) & gate_mask(words[c], 4 * (k % 4) + i);
                        }
                    }
                    keeper.stage(a, c, at);
                }
            }
            keeper.send(tile, p.view_chunks, live);
            if (live && at.q == 0) {
                // The heads' chunk: its other columns stay zero.
                char* heads = tile + p.view_chunks * TILE;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int r = at.row + 8 * i;
                    *reinterpret_cast<uint2*>(heads + r * 128 + ((r & 7) << 4)) =
                        make_uint2(pack(g[i][0], g[i][1]), pack(g[i][2], g[i][3]));
                }
            }
            for (int index = 0; index < p.steps; index++) {
                const int* step = s.table + index * TABLE;
                const int outputs = step[0];
#define LAYER(N)                                                                               \
    backward_layer<N>(p, step, s.vector, p.steps - 1 - index, index == 0, g[0][0], g[1][0], a, \
                      row_tile, at, ring, keeper)
                if (outputs == 4)
                    LAYER(4);
                else if (outputs == 3)
                    LAYER(3);
                else if (outputs == 2)
                    LAYER(2);
                else
                    LAYER(1);
#undef LAYER
            }
        }
        if (thread == 0) copies_out_read();
    }
}
#endif
