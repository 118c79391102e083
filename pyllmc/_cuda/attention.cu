// Causal attention: the choice between the kernels for tensor cores (flash_forward.cu, flash_backward.cu: bfloat16,
// heads of a multiple of 8 channels up to 128, aligned arrays) and those of this file, which take any head at any
// address and compute in float; what both need before their backward pass; and the step of generation.
#include <initializer_list>

#include "attention.cuh"

namespace pyllmc {
namespace {

// ---- products of small matrices in shared memory --------------------------------------------------------------------

struct Matrix {
    const float* data;
    int row, column;  // distances in floats
    __device__ __forceinline__ float operator()(int i, int j) const { return data[i * row + j * column]; }
};

// out[m][n] = scale[m] out[m][n] + sum over k < K of a(m, k) b(k, n); without scale the old value does not count.
// A thread has rows and columns in pairs, each half the matrix apart, so that neighbours read neighbouring banks.
__device__ void multiply_tiles(float* out, int pitch, const float* scale, Matrix a, Matrix b, int M, int N, int K) {
    const int down = (M + 1) / 2, across = (N + 1) / 2;
    for (int at = threadIdx.x; at < down * across; at += blockDim.x) {
        const int m[2] = {at / across, at / across + down}, n[2] = {at % across, at % across + across};
        const int last_m = min(m[1], M - 1), last_n = min(n[1], N - 1);
        float sum[2][2] = {};
        for (int k = 0; k < K; ++k) {
            const float left[2] = {a(m[0], k), a(last_m, k)}, right[2] = {b(k, n[0]), b(k, last_n)};
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
        }
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) {
                if (m[i] >= M || n[j] >= N) continue;
                float& to = out[m[i] * pitch + n[j]];
                to = scale == nullptr ? sum[i][j] : fmaf(to, scale[m[i]], sum[i][j]);
            }
    }
}

// rows x HS elements to shared memory as float.
template <class E>
__device__ void load_tile(float* tile, int pitch, const E* from, size_t stride, int rows, int HS) {
    for (int at = threadIdx.x; at < rows * HS; at += blockDim.x)
        tile[at / HS * pitch + at % HS] = to_float(from[at / HS * stride + at % HS]);
}

__host__ __device__ constexpr int odd_pitch(int columns) { return columns | 1; }

// The rows of a tile: at most 32, and so many that `tiles` of them with `squares` of rows x rows fit in 96 KiB.
int tile_rows(int HS, int tiles, int squares) {
    int rows = 32;
    const auto floats = [&] { return tiles * rows * odd_pitch(HS) + squares * rows * odd_pitch(rows) + 3 * rows; };
    while (rows > 1 && floats() * sizeof(float) > 96 << 10) rows /= 2;
    return rows;
}

size_t tile_bytes(int HS, int rows, int tiles, int squares) {
    return (tiles * rows * odd_pitch(HS) + squares * rows * odd_pitch(rows) + 3 * rows) * sizeof(float);
}

// ---- any head at any address ----------------------------------------------------------------------------------------

// A block has R queries of one head, and goes over the keys that they see R at a time.
template <class E>
__global__ void __launch_bounds__(BLOCK) forward_of_any_head(const Heads<E> h, int R) {
    DYNAMIC_SHARED(float, shared);
    const int pitch = odd_pitch(h.HS), square = odd_pitch(R);
    float* const q = shared;
    float* const kv = q + R * pitch;
    float* const out = kv + R * pitch;
    float* const p = out + R * pitch;
    float* const top = p + R * square;
    float* const total = top + R;
    float* const shrink = total + R;
    const int blocks = ceil_div(h.T, R), head = blockIdx.x / blocks;
    const int q0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * R;  // those with most keys first
    const int queries = min(R, h.T - q0), before = h.S - h.T + q0;  // query i of the block sees keys 0 .. before + i
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const E* const k = h.k + h.kv(head);
    const E* const v = h.v + h.kv(head);
    load_tile(q, pitch, h.queries(head) + q0 * h.q_row, h.q_row, queries, h.HS);
    for (int i = threadIdx.x; i < R; i += BLOCK) top[i] = -INFINITY, total[i] = 0.0f;
    for (int k0 = 0; k0 < before + queries; k0 += R) {
        const int keys = min(R, h.S - k0);
        load_tile(kv, pitch, k + k0 * h.kv_row, h.kv_row, keys, h.HS);
        __syncthreads();
        multiply_tiles(p, square, nullptr, {q, pitch, 1}, {kv, 1, pitch}, queries, keys, h.HS);
        __syncthreads();
        for (int i = warp; i < queries; i += BLOCK / WARP) {
            float* const row = p + i * square;
            const int seen = min(keys, before + i + 1 - k0);
            float peak = -INFINITY, sum = 0.0f;
            for (int j = lane; j < seen; j += WARP) peak = fmaxf(peak, row[j]);
            peak = fmaxf(top[i], h.scale * warp_reduce(peak, Max{}));
            for (int j = lane; j < keys; j += WARP) {
                row[j] = j < seen ? expf(fmaf(row[j], h.scale, -peak)) : 0.0f;
                sum += row[j];
            }
            sum = warp_sum(sum);
            const float factor = expf(top[i] - peak);
            __syncwarp();
            if (lane == 0) {
                top[i] = peak;
                total[i] = fmaf(total[i], factor, sum);
                shrink[i] = factor;
            }
        }
        load_tile(kv, pitch, v + k0 * h.kv_row, h.kv_row, keys, h.HS);
        __syncthreads();
        multiply_tiles(out, pitch, k0 == 0 ? nullptr : shrink, {p, square, 1}, {kv, pitch, 1}, queries, h.HS, keys);
        __syncthreads();
    }
    for (int at = threadIdx.x; at < queries * h.HS; at += BLOCK) {
        const int i = at / h.HS, c = at % h.HS;
        h.out[h.row(head, q0 + i) + c] = from_float<E>(out[i * pitch + c] / total[i]);
    }
    if (h.lse != nullptr)
        for (int i = threadIdx.x; i < queries; i += BLOCK)
            h.lse[static_cast<size_t>(head) * h.T + q0 + i] = top[i] + logf(total[i]);
}

// OF_KEYS: a block has R keys of one head and goes over the queries that see them, for dK and dV; else R queries and
// the keys that they see, for dQ.
template <class E, bool OF_KEYS>
__global__ void __launch_bounds__(BLOCK) backward_of_any_head(const Gradients<E> g, int R) {
    DYNAMIC_SHARED(float, shared);
    const Heads<E>& h = g.heads;
    const int pitch = odd_pitch(h.HS), square = odd_pitch(R), tile = R * pitch;
    float* const q = shared;
    float* const dout = q + tile;
    float* const k = dout + tile;
    float* const v = k + tile;
    float* const sum1 = v + tile;  // dV; or dQ
    float* const sum2 = sum1 + tile;  // dK
    float* const p = sum2 + tile;
    float* const ds = p + R * square;
    float* const ones = ds + R * square;
    const int blocks = ceil_div(h.T, R), head = blockIdx.x / blocks, own = static_cast<int>(blockIdx.x) % blocks * R;
    const int rows = min(R, h.T - own);
    const size_t row = static_cast<size_t>(h.NH) * h.HS;
    const auto load_queries = [&](int first, int count) {
        load_tile(q, pitch, h.queries(head) + first * h.q_row, h.q_row, count, h.HS);
        load_tile(dout, pitch, g.dout + h.row(head, first), row, count, h.HS);
    };
    const auto load_keys = [&](int first, int count) {
        load_tile(k, pitch, h.k + h.kv(head) + first * h.kv_row, h.kv_row, count, h.HS);
        load_tile(v, pitch, h.v + h.kv(head) + first * h.kv_row, h.kv_row, count, h.HS);
    };
    if (OF_KEYS)
        load_keys(own, rows);
    else
        load_queries(own, rows);
    for (int i = threadIdx.x; i < tile; i += BLOCK) sum1[i] = sum2[i] = 0.0f;
    for (int i = threadIdx.x; i < R; i += BLOCK) ones[i] = 1.0f;
    const float* const statistics = g.statistics + static_cast<size_t>(head) * h.T * 2;  // blocks of one query
    for (int other = OF_KEYS ? own : 0; other < (OF_KEYS ? h.T : own + rows); other += R) {
        const int others = min(R, h.T - other);
        const int q0 = OF_KEYS ? other : own, k0 = OF_KEYS ? own : other;
        const int queries = OF_KEYS ? others : rows, keys = OF_KEYS ? rows : others;
        if (OF_KEYS)
            load_queries(other, others);
        else
            load_keys(other, others);
        __syncthreads();
        multiply_tiles(p, square, nullptr, {q, pitch, 1}, {k, 1, pitch}, queries, keys, h.HS);
        multiply_tiles(ds, square, nullptr, {dout, pitch, 1}, {v, 1, pitch}, queries, keys, h.HS);
        __syncthreads();
        for (int at = threadIdx.x; at < queries * keys; at += BLOCK) {
            const int i = at / keys, j = at % keys;
            float& probability = p[i * square + j];
            const float x = fmaf(probability, h.scale2, -statistics[2 * (q0 + i)]);
            probability = k0 + j > q0 + i ? 0.0f : exp2f(x);
            ds[i * square + j] = probability * (ds[i * square + j] - statistics[2 * (q0 + i) + 1]);
        }
        __syncthreads();
        if (OF_KEYS) {
            multiply_tiles(sum1, pitch, ones, {p, 1, square}, {dout, pitch, 1}, keys, h.HS, queries);
            multiply_tiles(sum2, pitch, ones, {ds, 1, square}, {q, pitch, 1}, keys, h.HS, queries);
        } else {
            multiply_tiles(sum1, pitch, ones, {ds, square, 1}, {k, pitch, 1}, queries, h.HS, keys);
        }
        __syncthreads();
    }
    E* const to = g.dqkv + head / h.NH * h.q_batch + head % h.NH * h.HS + own * h.q_row;
    for (int at = threadIdx.x; at < rows * h.HS; at += BLOCK) {
        const int i = at / h.HS, c = at % h.HS;
        E* const element = to + i * h.q_row + c;
        if (OF_KEYS) {
            element[row] = from_float<E>(sum2[i * pitch + c] * h.scale);
            element[2 * row] = from_float<E>(sum1[i * pitch + c]);
        } else {
            element[0] = from_float<E>(sum1[i * pitch + c] * h.scale);
        }
    }
}

// ---- before either backward pass ------------------------------------------------------------------------------------

// Eight lanes for each query of each head, neighbours in time. Also sets `turns` zeros.
template <class E, int W>
__global__ void __launch_bounds__(BLOCK)
row_statistics(const Gradients<E> g, const E* out, const float* lse, float* statistics, int* turns, size_t zeros) {
    constexpr int LANES = 8;
    const Heads<E>& h = g.heads;
    const size_t thread = static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x, item = thread / LANES;
    if (thread < zeros) turns[thread] = 0;
    const bool exists = item < static_cast<size_t>(h.B) * h.NH * g.Tp;
    const int head = exists ? static_cast<int>(item / g.Tp) : 0, t = exists ? static_cast<int>(item % g.Tp) : h.T;
    float dot = 0.0f;
    if (t < h.T) {
        const size_t at = h.row(head, t);
        for (int c = thread % LANES * W; c < h.HS; c += LANES * W) {
            const Floats<W> a = load<W>(out + at + c), b = load<W>(g.dout + at + c);
#pragma unroll
            for (int i = 0; i < W; ++i) dot = fmaf(a[i], b[i], dot);
        }
    }
    for (int offset = LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, offset);
    if (!exists || thread % LANES != 0) return;
    float* const to = statistics + item / g.queries * 2 * g.queries + item % g.queries;
    to[0] = t < h.T ? lse[static_cast<size_t>(head) * h.T + t] * LOG2_E : INFINITY;
    to[g.queries] = dot;
}

// ---- generation -----------------------------------------------------------------------------------------------------

// The new keys and values into the caches (B, NH, maxT, HS).
template <class E>
__global__ void __launch_bounds__(BLOCK)
append(const E* qkv, E* keys, E* values, int B, int n, int NH, int HS, int position, int maxT) {
    const size_t C = static_cast<size_t>(NH) * HS, at = static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (at >= B * n * C) return;
    const size_t row = at / C, b = row / n, t = position + row % n, head = at % C / HS, c = at % HS;
    const size_t to = ((b * NH + head) * maxT + t) * HS + c;
    keys[to] = qkv[row * 3 * C + C + at % C];
    values[to] = qkv[row * 3 * C + 2 * C + at % C];
}

constexpr int SPLIT = 128;  // keys of one block: few heads and a long cache still keep many blocks busy

// What one block knows of a query's result after its keys: the sums of values are relative to the largest score.
__device__ __forceinline__ float* partial_result(float* partial, size_t block, int HS) {
    return partial + block * (HS + 2);  // HS sums, the largest score, the sum of probabilities
}

// Scores, eight lanes a key; then their softmax; then each thread sums W channels over every so-manieth key. Where one
// block sees all keys of its query, it writes the output.
template <class E, int W>
__global__ void __launch_bounds__(BLOCK, 2) attend_to_split(const Heads<E> h, int splits, float* partial) {
    DYNAMIC_SHARED(float, shared);
    SHARED(float, scores, [SPLIT]);
    constexpr int LANES = 8;
    const int row = blockIdx.x / splits, head = row / h.T, t = row % h.T;
    const int k0 = static_cast<int>(blockIdx.x) % splits * SPLIT;
    const int keys = max(0, min(SPLIT, h.S - h.T + t + 1 - k0));
    const E* const k = h.k + h.kv(head) + k0 * h.kv_row;
    const E* const v = h.v + h.kv(head) + k0 * h.kv_row;
    const E* const query = h.queries(head) + t * h.q_row;
    float* const q = shared;        // HS
    float* const parts = q + h.HS;  // a sum of HS channels from each group of threads
    const int columns = min(ceil_div(h.HS, W), BLOCK), groups = BLOCK / columns;
    for (int c = threadIdx.x; c < h.HS; c += BLOCK) q[c] = to_float(query[c]) * h.scale;
    __syncthreads();

    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int first = 0; first < SPLIT; first += BLOCK / LANES) {
        const int i = first + threadIdx.x / LANES;
        float dot = 0.0f;
        if (i < keys)
            for (int c = threadIdx.x % LANES * W; c < h.HS; c += LANES * W) {
                const Floats<W> x = load<W>(k + i * h.kv_row + c);
#pragma unroll
                for (int j = 0; j < W; ++j) dot = fmaf(x[j], q[c + j], dot);
            }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, offset);
        if (i >= keys) continue;
        if (threadIdx.x % LANES == 0) scores[i] = dot;
        top = Max{}(top, dot);
    }
    top = block_reduce(top, Max{});
    for (int i = threadIdx.x; i < keys; i += BLOCK) total += scores[i] = expf(scores[i] - top);
    total = block_sum(total);  // its barriers also show everyone the probabilities

    const int group = threadIdx.x / columns;
    for (int c = threadIdx.x % columns * W; c < h.HS && group < groups; c += columns * W) {
        Floats<W> x{};
#pragma unroll 4
        for (int i = group; i < keys; i += groups) {
            const Floats<W> value = load<W>(v + i * h.kv_row + c);
#pragma unroll
            for (int j = 0; j < W; ++j) x[j] = fmaf(scores[i], value[j], x[j]);
        }
        store<TILE>(parts + group * h.HS + c, x);
    }
    __syncthreads();
    float* const result = partial_result(partial, blockIdx.x, h.HS);
    for (int c = threadIdx.x; c < h.HS; c += BLOCK) {
        float x = 0.0f;
        for (int i = 0; i < groups; ++i) x += parts[i * h.HS + c];
        if (splits == 1)
            h.out[h.row(head, t) + c] = from_float<E>(x / total);
        else
            result[c] = x;
    }
    if (splits == 1 || threadIdx.x != 0) return;
    result[h.HS] = top;
    result[h.HS + 1] = total;
}

// The output of each query from its blocks' parts, in order.
template <class E>
__global__ void __launch_bounds__(BLOCK) join_splits(const Heads<E> h, int splits, float* partial) {
    const size_t at = static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x, row = at / h.HS;
    if (row >= static_cast<size_t>(h.B) * h.NH * h.T) return;
    const int c = static_cast<int>(at % h.HS);
    float top = -INFINITY, total = 0.0f, sum = 0.0f;
    for (int i = 0; i < splits; ++i) top = Max{}(top, partial_result(partial, row * splits + i, h.HS)[h.HS]);
    for (int i = 0; i < splits; ++i) {
        const float* const result = partial_result(partial, row * splits + i, h.HS);
        const float weight = expf(result[h.HS] - top);
        sum = fmaf(weight, result[c], sum);
        total = fmaf(weight, result[h.HS + 1], total);
    }
    h.out[h.row(static_cast<int>(row / h.T), static_cast<int>(row % h.T)) + c] = from_float<E>(sum / total);
}

// ---- the choice -----------------------------------------------------------------------------------------------------

constexpr int FEW_QUERIES = 4;  // up to so many the keys are read once for each

bool fits_tensor_cores(int HS, std::initializer_list<const void*> arrays) {
    for (const void* array : arrays)
        if (reinterpret_cast<uintptr_t>(array) % 16 != 0) return false;
    return HS % 8 == 0 && HS <= 128;
}

template <class E>
Heads<E> heads_of(const E* qkv, int B, int T, int NH, int HS) {
    const size_t C = static_cast<size_t>(NH) * HS;
    Heads<E> h{};
    h.B = B, h.NH = NH, h.HS = HS, h.T = h.S = T;
    h.scale = 1.0f / std::sqrt(static_cast<float>(HS));
    h.scale2 = h.scale * LOG2_E;
    h.q = qkv, h.k = qkv + C, h.v = qkv + 2 * C;
    h.q_row = h.kv_row = 3 * C;
    h.q_batch = h.kv_batch = T * 3 * C;
    h.kv_head = HS;
    return h;
}

template <class E>
void attend(const Heads<E>& h, bool aligned) {
    if constexpr (std::is_same_v<E, bf16>)
        if (aligned) return flash_forward(h);
    const int rows = tile_rows(h.HS, 3, 1);
    const Launch launch(static_cast<unsigned>(ceil_div(h.T, rows)) * h.B * h.NH, BLOCK, tile_bytes(h.HS, rows, 3, 1));
    launch(forward_of_any_head<E>, h, rows);
}

}  // namespace

void attention_forward(DType type, const void* qkv, void* out, float* lse, size_t B, size_t T, size_t NH, size_t HS) {
    by_type(type, [&](auto zero) {
        using E = decltype(zero);
        Heads<E> h = heads_of(static_cast<const E*>(qkv), B, T, NH, HS);
        h.out = static_cast<E*>(out);
        h.lse = lse;
        attend(h, fits_tensor_cores(h.HS, {qkv, out}));
    });
}

void attention_backward(DType type, const void* dout, const void* qkv, const void* out, const float* lse, void* dqkv,
                        size_t B, size_t T, size_t NH, size_t HS) {
    by_type(type, [&](auto zero) {
        using E = decltype(zero);
        const bool flash = std::is_same_v<E, bf16> && fits_tensor_cores(HS, {dout, qkv, out, dqkv});
        Gradients<E> g{};
        g.heads = heads_of(static_cast<const E*>(qkv), B, T, NH, HS);
        g.dout = static_cast<const E*>(dout);
        g.dqkv = static_cast<E*>(dqkv);
        g.queries = flash ? flash_queries(HS) : 1;
        const size_t blocks = ceil_div<size_t>(T, g.queries);
        g.Tp = blocks * g.queries;
        const size_t items = B * NH * g.Tp, zeros = flash ? B * NH * blocks + 1 : 0;
        const Scratch statistics(items * 2 * sizeof(float)), turns(zeros * sizeof(int));
        const bool vectors = vectors_fit<E>(HS, out, dout);
        Launch(ceil_div<size_t>(items * 8, BLOCK), BLOCK)(
            vectors ? row_statistics<E, VECTOR<E>> : row_statistics<E, 1>, g, static_cast<const E*>(out), lse,
            statistics.template as<float>(), turns.template as<int>(), zeros);
        g.statistics = statistics.template as<float>();
        if constexpr (std::is_same_v<E, bf16>)
            if (flash) {
                const Scratch dq(items * flash_columns(HS) * sizeof(float));
                return flash_backward(g, turns.template as<int>(), dq.as<float>());
            }
        const int rows = tile_rows(HS, 6, 2);
        const Launch launch(ceil_div<size_t>(T, rows) * B * NH, BLOCK, tile_bytes(HS, rows, 6, 2));
        launch(backward_of_any_head<E, true>, g, rows);
        launch(backward_of_any_head<E, false>, g, rows);
    });
}

void attention_decode(DType type, const void* qkv, void* key_cache, void* value_cache, void* out, size_t B, size_t n,
                      size_t position, size_t maxT, size_t NH, size_t HS) {
    by_type(type, [&](auto zero) {
        using E = decltype(zero);
        E* const keys = static_cast<E*>(key_cache);
        E* const values = static_cast<E*>(value_cache);
        const E* const x = static_cast<const E*>(qkv);
        const Launch all_new(ceil_div<size_t>(B * n * NH * HS, BLOCK), BLOCK);
        all_new(append<E>, x, keys, values, B, n, NH, HS, position, maxT);
        Heads<E> h = heads_of(x, B, n, NH, HS);
        h.S = position + n;
        h.k = keys, h.v = values;
        h.kv_row = HS, h.kv_head = maxT * HS, h.kv_batch = NH * h.kv_head;
        h.out = static_cast<E*>(out);
        if (n > FEW_QUERIES) return attend(h, fits_tensor_cores(h.HS, {qkv, keys, values, out}));
        const bool vectors = vectors_fit<E>(HS, keys, values);
        const int width = vectors ? VECTOR<E> : 1, groups = BLOCK / std::min(ceil_div<int>(HS, width), BLOCK);
        const size_t splits = ceil_div<size_t>(h.S, SPLIT), rows = B * NH * n;
        const Scratch partial(splits > 1 ? rows * splits * (HS + 2) * sizeof(float) : 0);
        const Launch launch(rows * splits, BLOCK, (1 + groups) * HS * sizeof(float));
        float* const parts = partial.template as<float>();
        launch(vectors ? attend_to_split<E, VECTOR<E>> : attend_to_split<E, 1>, h, splits, parts);
        if (splits > 1) Launch(ceil_div<size_t>(rows * HS, BLOCK), BLOCK)(join_splits<E>, h, splits, parts);
    });
}

}  // namespace pyllmc
