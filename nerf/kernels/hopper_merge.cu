// The merged layer (see nerf/kernels/plan.py): its weights before a step, its gradients after.

// --- weights into tiles --------------------------------------------------------------------------------

// Where the parameters of the merged layer lie in the extended vector, and their sizes.
struct Merged {
    int view_weight, view_bias, feature_weight, feature_bias, mix;
    int view, feature, last, direction;  // channels, and features of an encoded direction
};

// mix = (view's feature columns) x (feature), constant = view's bias + its columns x feature's bias:
// a program an output channel, four threads a column.
extern "C" __global__ void __launch_bounds__(1024) merge(Merged m, float* extended, float* constant) {
    __shared__ float row[256], parts[4][256], warps[8];
    const int v = blockIdx.x, t = threadIdx.x, column = t % 256, quarter = t / 256;
    const float* left = extended + m.view_weight + v * (m.feature + m.direction);
    if (t < 256) {
        const bool inside = t < m.feature;
        row[t] = inside ? left[t] : 0.0f;
        float part = inside ? row[t] * extended[m.feature_bias + t] : 0.0f;
        for (int i = 16; i > 0; i /= 2) part += __shfl_xor_sync(0xffffffff, part, i);
        if (t % 32 == 0) warps[t / 32] = part;
    }
    __syncthreads();
    if (t == 0) {
        float sum = extended[m.view_bias + v];
        for (int i = 0; i < 8; i++) sum += warps[i];
        constant[v] = sum;
    }
    const float* feature = extended + m.feature_weight + column;
    float sum = 0;
    if (column < m.last) {
#pragma unroll 16
        for (int f = quarter; f < m.feature; f += 4) sum = fmaf(row[f], feature[f * m.last], sum);
    }
    parts[quarter][column] = sum;
    __syncthreads();
    if (t < m.last)
        extended[m.mix + v * m.last + t] =
            (parts[0][t] + parts[1][t]) + (parts[2][t] + parts[3][t]);
}

struct Pack {
    const float* extended;
    const int *forward_index, *backward_index, *vector_index;
    u32 *forward, *backward;
    float* vector;
    int forward_count, backward_count, vector_count;
};

DEVICE void pack_tiles(const float* extended, const int* index, u32* target, int count, int at) {
    if (at >= count) return;
    const int4 a = *reinterpret_cast<const int4*>(index + at);
    const int4 b = *reinterpret_cast<const int4*>(index + at + 4);
    *reinterpret_cast<uint4*>(target + at / 2) =
        make_uint4(pack(extended[a.x], extended[a.y]), pack(extended[a.z], extended[a.w]),
                   pack(extended[b.x], extended[b.y]), pack(extended[b.z], extended[b.w]));
}

// Tiles in bf16 and the vector in fp32 from the extended vector. blockIdx.y: which of the three.
extern "C" __global__ void __launch_bounds__(256) pack_weights(Pack p) {
    const int at = 8 * (blockIdx.x * 256 + threadIdx.x);
    if (blockIdx.y == 0) {
        pack_tiles(p.extended, p.forward_index, p.forward, p.forward_count, at);
    } else if (blockIdx.y == 1) {
        pack_tiles(p.extended, p.backward_index, p.backward, p.backward_count, at);
    } else {
        for (int i = at; i < min(at + 8, p.vector_count); i++)
            p.vector[i] = p.extended[p.vector_index[i]];
    }
}

// --- gradients of what was merged ------------------------------------------------------------------------

constexpr int RAYS = 8;  // rays a program of ray_gradients takes

struct RayGradients {
    const char* deltas;
    const float* encoded;  // encoded directions, (rays, direction)
    float* parts;          // (programs, view, direction)
    int rays, samples, delta_chunks, view_delta, view_chunks, view, direction;
};

// Sums of the view layer's deltas over the samples of each ray, times the encoded directions.
extern "C" __global__ void __launch_bounds__(512) ray_gradients(RayGradients p) {
    __shared__ float sums[RAYS][256];
    __shared__ float encoded[RAYS][64];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32, unit = lane % 8;
    const int local = warp % RAYS, ray = blockIdx.x * RAYS + local;
    for (int i = t; i < RAYS * p.direction; i += 512) {
        const int r = i / p.direction, k = i % p.direction;
        const int from = blockIdx.x * RAYS + r;
        encoded[r][k] = from < p.rays ? p.encoded[from * p.direction + k] : 0.0f;
    }
    for (int chunk = warp / RAYS; chunk < p.view_chunks; chunk += 16 / RAYS) {
        float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const int samples = ray < p.rays ? p.samples : 0;
        for (int first = lane / 8; first < samples; first += 32) {
            uint4 v[8];  // in flight at the same time
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int row = ray * p.samples + first + 4 * j;
                v[j] = make_uint4(0, 0, 0, 0);
                if (first + 4 * j < samples)
                    v[j] = *reinterpret_cast<const uint4*>(
                        p.deltas +
                        (size_t(row / 64) * p.delta_chunks + p.view_delta + chunk) * TILE +
                        (row % 64) * 128 + ((unit ^ (row & 7)) << 4));
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 words[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    total[2 * i] += __uint_as_float(words[i] << 16);
                    total[2 * i + 1] += __uint_as_float(words[i] & 0xFFFF0000u);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            total[i] += __shfl_xor_sync(0xffffffff, total[i], 8);
            total[i] += __shfl_xor_sync(0xffffffff, total[i], 16);
            if (lane < 8) sums[local][64 * chunk + 8 * unit + i] = total[i];
        }
    }
    __syncthreads();
    const int count = p.view * p.direction;
    for (int i = t; i < count; i += 512) {
        const int v = i / p.direction, k = i % p.direction;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < RAYS; r++) sum = fmaf(sums[r][v], encoded[r][k], sum);
        p.parts[size_t(blockIdx.x) * count + i] = sum;
    }
}

// A tile of 16 x 32 of left x right (summed over `depth`), rows from i0, columns from j0.
// LEFT_K, RIGHT_K: whether that operand is contiguous along the summed dimension.
template <bool LEFT_K, bool RIGHT_K, typename Left, typename Right, typename Put>
DEVICE void small_product(int i0, int j0, int depth, Left left, Right right, Put put) {
    __shared__ float a[16][65], b[64][33];
    const int t = threadIdx.x, x = t % 32, y = t / 32;
    float next_a[4], next_b[8], upper = 0, lower = 0;
    auto fetch = [&](int k0) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int e = t + 256 * r, i = LEFT_K ? e / 64 : e % 16, k = LEFT_K ? e % 64 : e / 16;
            next_a[r] = k0 + k < depth ? left(i0 + i, k0 + k) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const int e = t + 256 * r, j = RIGHT_K ? e / 64 : e % 32, k = RIGHT_K ? e % 64 : e / 32;
            next_b[r] = k0 + k < depth ? right(k0 + k, j0 + j) : 0.0f;
        }
    };
    fetch(0);
    for (int k0 = 0; k0 < depth; k0 += 64) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int e = t + 256 * r;
            a[LEFT_K ? e / 64 : e % 16][LEFT_K ? e % 64 : e / 16] = next_a[r];
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const int e = t + 256 * r;
            b[RIGHT_K ? e % 64 : e / 32][RIGHT_K ? e / 64 : e % 32] = next_b[r];
        }
        __syncthreads();
        fetch(k0 + 64);
#pragma unroll 16
        for (int k = 0; k < 64; k++) {
            upper = fmaf(a[y][k], b[k][x], upper);
            lower = fmaf(a[y + 8][k], b[k][x], lower);
        }
        __syncthreads();
    }
    put(i0 + y, j0 + x, upper);
    put(i0 + y + 8, j0 + x, lower);
}

// Gradients of feature and view from those of mix and view's bias (`nerf.kernels.mlp` has the
// formulas). Programs: tiles of view's feature columns, tiles of feature, 64 of feature's biases
// each, and 64 of view's direction columns each.
extern "C" __global__ void __launch_bounds__(256) unmerge(Merged m, const float* weights,
                                                          float* gradients, const float* parts,
                                                          int count) {
    const float* d_mix = gradients + m.mix;
    const float* total = gradients + m.view_bias;
    const float* feature = weights + m.feature_weight;
    const float* view = weights + m.view_weight;
    const int stride = m.feature + m.direction, t = threadIdx.x;
    const int f_columns = (m.feature + 31) / 32, l_columns = (m.last + 31) / 32;
    const int view_tiles = (m.view + 15) / 16 * f_columns;
    const int feature_tiles = (m.feature + 15) / 16 * l_columns;
    int program = blockIdx.x;
    if (program < view_tiles) {
        small_product<true, true>(
            program / f_columns * 16, program % f_columns * 32, m.last,
            [=](int v, int c) { return v < m.view ? d_mix[v * m.last + c] : 0.0f; },
            [=](int c, int f) { return f < m.feature ? feature[f * m.last + c] : 0.0f; },
            [=](int v, int f, float sum) {
                if (v < m.view && f < m.feature)
                    gradients[m.view_weight + v * stride + f] =
                        fmaf(total[v], weights[m.feature_bias + f], sum);
            });
        return;
    }
    program -= view_tiles;
    if (program < feature_tiles) {
        small_product<false, false>(
            program / l_columns * 16, program % l_columns * 32, m.view,
            [=](int f, int v) { return f < m.feature ? view[v * stride + f] : 0.0f; },
            [=](int v, int c) { return c < m.last ? d_mix[v * m.last + c] : 0.0f; },
            [=](int f, int c, float sum) {
                if (f < m.feature && c < m.last)
                    gradients[m.feature_weight + f * m.last + c] = sum;
            });
        return;
    }
    program -= feature_tiles;
    __shared__ float quarters[4][64];
    const int bias_programs = (m.feature + 63) / 64, quarter = t / 64;
    const bool bias = program < bias_programs;
    const int i = (bias ? program : program - bias_programs) * 64 + t % 64;
    const int size = bias ? m.feature : m.view * m.direction;
    float sum = 0;
    if (i < size && bias) {
#pragma unroll 8
        for (int v = quarter; v < m.view; v += 4) sum = fmaf(view[v * stride + i], total[v], sum);
    } else if (i < size) {
#pragma unroll 8
        for (int part = quarter; part < count; part += 4) sum += parts[size_t(part) * size + i];
    }
    quarters[quarter][t % 64] = sum;
    __syncthreads();
    if (t >= 64 || i >= size) return;
    sum = (quarters[0][t] + quarters[1][t]) + (quarters[2][t] + quarters[3][t]);
    if (bias)
        gradients[m.feature_bias + i] = sum;
    else
        gradients[m.view_weight + i / m.direction * stride + m.feature + i % m.direction] = sum;
}
