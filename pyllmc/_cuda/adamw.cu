// The optimizer's two passes over memory: the norm of the gradient, and the update.
#include <vector>

#include "common.cuh"

namespace pyllmc {
namespace {

// ---- parts -----------------------------------------------------------------------------------------------------------

// Elements of a tile. Every part is cut into tiles, the last of them shorter; a block goes through whole ones.
constexpr size_t UPDATE_TILE = 4096, NORM_TILE = 16384;

struct Part {
    size_t start, size, state;  // where it is in param and grad, and where in m, v and master
    size_t before;              // tiles of the parts before it
    bool decayed;
    bool vectors;  // whether it starts at a multiple of 16 bytes in all of them
};

// A table of parts on the device, for one launch that goes through all of them.
struct Parts {
    const int count;
    size_t tiles = 0;
    const Scratch memory;

    // rows: start, stop, state, decayed of each part. fits(start, state): whether vectors can be used there.
    template <class F>
    Parts(const int64_t* rows, size_t count, size_t tile, F fits)
        : count(static_cast<int>(count)), memory(count * sizeof(Part)) {
        std::vector<Part> table(count);
        for (Part& part : table) {
            const size_t start = rows[0], size = rows[1] - rows[0], state = rows[2];
            part = {start, size, state, tiles, rows[3] != 0, fits(start, state)};
            tiles += ceil_div(size, tile);
            rows += 4;
        }
        to_device(memory.as<Part>(), table.data(), count * sizeof(Part));
    }
};

// A tile's part, cut down to the tile.
__device__ __forceinline__ Part find(const Part* parts, int count, size_t tile, size_t tile_size) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (parts[middle].before <= tile)
            low = middle;
        else
            high = middle;
    }
    Part part = parts[low];
    const size_t skipped = (tile - part.before) * tile_size;
    part.start += skipped;
    part.state += skipped;
    part.size = part.size - skipped < tile_size ? part.size - skipped : tile_size;
    return part;
}

// This thread's share of the elements 0 .. size - 1: vector(i) for W of them where vectors can be used, else one(i).
template <int W, class Vector, class One>
__device__ __forceinline__ void share(size_t size, bool vectors, Vector vector, One one) {
    const size_t width = vectors ? W : 1;
    for (size_t i = threadIdx.x * width; i < size; i += BLOCK * width) {
        if (vectors && i + W <= size)
            vector(i);
        else
            for (size_t k = i; k < size && k < i + width; ++k) one(k);
    }
}

// ---- AdamW -----------------------------------------------------------------------------------------------------------

// 32 random bits of the seed and a number: two rounds of multiply and shift on all 64 bits (Steele, Lea & Flood, 2014).
__device__ __forceinline__ uint32_t noise(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z >> 32);
}

// To bfloat16, up with the probability of what is cut off: right on average, where rounding to nearest would lose every
// update smaller than half a unit of the weight's last place. `random` has 16 bits.
__device__ __forceinline__ float round_stochastically(float x, uint32_t random) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;  // infinite or NaN
    return __uint_as_float((bits + random) & 0xffff0000u);
}

// Elements that a thread updates at a time: 16 bytes of m, v and master. With twice as many, neighbouring threads'
// vectors would lie 16 bytes apart in them, and each store would write half sectors.
constexpr int UPDATED = VECTOR<float>;

// The elements i .. i + W - 1 of param and grad, which are s .. s + W - 1 of m, v and master. Which product is fused
// with which sum is said here: left to the compiler, it differs between W = 1 and vectors, and so between parts and the
// whole.
template <class T, int W>
__device__ __forceinline__ void update(T* param, const T* grad, float* m, float* v, float* master, size_t i, size_t s,
                                       const AdamW& o, float decay) {
    const Floats<W> g = load<W, STREAM>(grad + i);
    Floats<W> mean = load<W, STREAM>(m + s), square = load<W, STREAM>(v + s);
    Floats<W> w = master != nullptr ? load<W, STREAM>(master + s) : load<W>(param + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
        const float x = __fmul_rn(g[j], o.grad_scale);
        mean[j] = fmaf(o.one_minus_beta1, x - mean[j], mean[j]);
        // not as a difference: where x^2 overflows, v is infinite and the weight rests, instead of inf - inf
        square[j] = fmaf(o.beta2, square[j], o.one_minus_beta2 * (x * x));
        const float size = fmaf(sqrtf(square[j]), o.root_scale, o.eps);
        w[j] -= fmaf(decay, w[j], o.step_size * mean[j] / size);
    }
    store<STREAM>(m + s, mean);
    store<STREAM>(v + s, square);
    if (master != nullptr) store<STREAM>(master + s, w);
    if constexpr (sizeof(T) == 2) {
        // One draw serves two neighbours. It belongs to the element, not to the thread: any launch gives the same bits.
        uint32_t random = 0;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            if (j == 0 || (i + j) % 2 == 0) random = noise(o.seed, (i + j) / 2);
            w[j] = round_stochastically(w[j], (i + j) % 2 == 0 ? random & 0xffffu : random >> 16);
        }
    }
    store(param + i, w);
}

// A block to a tile.
template <class T>
__global__ void __launch_bounds__(BLOCK)
update_kernel(T* param, const T* grad, float* m, float* v, float* master, const Part* parts, int count, AdamW o) {
    const Part part = find(parts, count, blockIdx.x, UPDATE_TILE);
    const float decay = part.decayed ? o.decay : 0.0f;
    share<UPDATED>(
        part.size, part.vectors,
        [&](size_t i) {
            update<T, UPDATED>(param, grad, m, v, master, part.start + i, part.state + i, o, decay);
        },
        [&](size_t i) { update<T, 1>(param, grad, m, v, master, part.start + i, part.state + i, o, decay); });
}

// ---- the norm --------------------------------------------------------------------------------------------------------

constexpr int NORM_BLOCKS = 1024;  // whatever the GPU, so that the sums are the same

// partial[block] = the sum of x^2 over the block's tiles, in double.
template <class T>
__global__ void __launch_bounds__(BLOCK)
sum_squares(const T* x, const Part* parts, int count, size_t tiles, double* partial) {
    double sum = 0.0;
    for (size_t tile = blockIdx.x; tile < tiles; tile += NORM_BLOCKS) {
        const Part part = find(parts, count, tile, NORM_TILE);
        const T* const here = x + part.start;
        share<VECTOR<T>>(
            part.size, part.vectors,
            [&](size_t i) {
                const Floats<VECTOR<T>> values = load<VECTOR<T>, STREAM>(here + i);
#pragma unroll
                for (int j = 0; j < VECTOR<T>; ++j) sum += static_cast<double>(values[j]) * values[j];
            },
            [&](size_t i) { sum += static_cast<double>(to_float(here[i])) * to_float(here[i]); });
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(BLOCK) root_of_sum(const double* partial, int count, float* out) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += BLOCK) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = static_cast<float>(sqrt(sum));
}

}  // namespace

void adamw_update(DType type, void* param, const void* grad, float* m, float* v, float* master, const int64_t* parts,
                  size_t count, const AdamW& settings) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        T* const to = static_cast<T*>(param);
        const T* const from = static_cast<const T*>(grad);
        const Parts table(parts, count, UPDATE_TILE, [&](size_t start, size_t state) {
            const float* const exact = master == nullptr ? nullptr : master + state;
            return vectors_fit<T>(0, to + start, from + start, m + state, v + state, exact);
        });
        if (table.tiles != 0)
            Launch(table.tiles, BLOCK)(update_kernel<T>, to, from, m, v, master, table.memory.as<Part>(), table.count,
                                       settings);
    });
}

void global_norm(DType type, const void* array, const int64_t* parts, size_t count, float* out) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const T* const x = static_cast<const T*>(array);
        const Parts table(parts, count, NORM_TILE, [&](size_t start, size_t) { return vectors_fit<T>(0, x + start); });
        const size_t blocks = std::min<size_t>(table.tiles, NORM_BLOCKS);
        const Scratch partial(blocks * sizeof(double));
        if (blocks != 0)
            Launch(blocks, BLOCK)(sum_squares<T>, x, table.memory.as<Part>(), table.count, table.tiles,
                                  partial.as<double>());
        Launch(1, BLOCK)(root_of_sum, partial.as<double>(), blocks, out);
    });
}

}  // namespace pyllmc
