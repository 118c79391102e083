// LM head, softmax and cross-entropy: (rows, Vp) logits exist for a chunk of rows at a time, in the type of the inputs,
// and become their own gradient in place.
//
// What a chunk costs: at GPT-2's vocabulary and C = 768 each one reads and writes a dweight of 154 MB in float, by
// count 70 us on an H200 beside 790 us of products for 2688 rows. Adding in bfloat16 would be half of that, but 25
// chunks and some micro-steps later the sum would outgrow what is added to it: below 1/512 of it nothing is added at
// all. So several chunks are added up in float and rounded once, as llm.c's one product is; one chunk alone goes to
// dweight directly. Fewer rows would leave multiprocessors idle in the product for dinp, which has only
// rows * C / 128^2 tiles.
#include "gelu.cuh"
#include "product.h"

namespace pyllmc {
namespace {

// A row that is not longer stays in shared memory between its two passes: GPT-2's in bfloat16, twice on a
// multiprocessor of Hopper, once where a block may have 99 KiB. Longer ones are read again, from the L2 cache.
constexpr size_t KEPT_BYTES = 100'864;

size_t limit_bytes = size_t{256} << 20;

// A block for each row: its loss; with `backward`, the row becomes its gradient and 0 in the padding (from V to ld).
// The first pass keeps the largest of a thread's logits and the sum of exponentials relative to it.
template <class T, int W, bool backward, bool kept>
__global__ void __launch_bounds__(MOST_THREADS, 2)
loss_kernel(T* logits, const int32_t* targets, float* losses, const float* scale, int V, int ld) {
    DYNAMIC_SHARED(T, tile);
    T* const row = logits + static_cast<size_t>(blockIdx.x) * ld;
    T* const again = kept ? tile : row;
    const int first = threadIdx.x * W, step = blockDim.x * W;
    const int target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (backward)
            for (int j = first; j < ld; j += step) store(row + j, Floats<W>{});
        return;
    }
    // read before anybody overwrites it
    const float of_target = threadIdx.x == 0 ? target < V ? to_float(row[target]) : NAN : 0.0f;
    float top = -FLT_MAX, total = 0.0f;
    for (int j = first; j < V; j += step) {
        const Raw<T> raw = load_raw(row + j);
        if (kept && backward) store<TILE>(tile + j, raw);
        Floats<W> x;
#pragma unroll
        for (int k = 0; k < W; ++k) x[k] = raw[k];
        if (j + W > V) {
#pragma unroll
            for (int k = 0; k < W; ++k)
                if (j + k >= V) x[k] = -INFINITY;
        }
        float largest = x[0];
#pragma unroll
        for (int k = 1; k < W; ++k) largest = fmaxf(largest, x[k]);
        if (largest > top) {
            total *= exp_below(top, largest);
            top = largest;
        }
#pragma unroll
        for (int k = 0; k < W; ++k) total += exp_below(x[k], top);
    }
    const float all = block_reduce(top, Max{});
    total = block_sum(total * exp_below(top, all));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) + (all - of_target);
    if (!backward) return;
    const float factor = *scale / total;
    for (int j = first; j < ld; j += step) {
        Floats<W> x{};
        if (j < V) {
            x = load<W>(again + j);
#pragma unroll
            for (int k = 0; k < W; ++k) x[k] = exp_below(x[k], all) * factor;
            if (j + W > V || static_cast<unsigned>(target - j) < static_cast<unsigned>(W)) {
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    if (j + k == target) x[k] -= *scale;
                    if (j + k >= V) x[k] = 0.0f;
                }
            }
        }
        store(row + j, x);
    }
}

// What each counted row's gradient is multiplied by: loss_scale / their number.
__global__ void __launch_bounds__(MOST_THREADS)
scale_kernel(const int32_t* targets, size_t rows, float loss_scale, float* scale) {
    int counted = 0;
    for (size_t i = threadIdx.x; i < rows; i += blockDim.x) counted += targets[i] >= 0;
    counted = block_sum(counted);
    if (threadIdx.x == 0) *scale = counted > 0 ? loss_scale / static_cast<float>(counted) : 0.0f;
}

// Rows of a chunk: as many as fit, made equal; whole tiles of the products where there are many.
size_t chunk_rows(size_t rows, size_t row_bytes) {
    const size_t most = std::max<size_t>(limit_bytes / row_bytes, 16), chunks = ceil_div(rows, most);
    const size_t step = most >= 1024 ? 128 : 16;
    return chunks == 1 ? rows : ceil_div(ceil_div(rows, chunks), step) * step;
}

// logits (rows, Vp) with leading dimension ld = inp weight^T
Product logits_of(DType type, const void* inp, const void* weight, void* logits, size_t rows, size_t C, size_t Vp,
                  size_t ld) {
    Product p;
    p.type = p.out_type = type;
    p.rows = rows, p.columns = Vp, p.k = C;
    p.a = inp, p.lda = C;
    p.b = weight, p.ldb = C, p.b_transposed = true;
    p.out = logits, p.ldo = ld;
    return p;
}

template <class T, bool backward>
void loss_rows(T* logits, const int32_t* targets, float* losses, const float* scale, size_t rows, size_t V, size_t ld) {
    constexpr int W = VECTOR<T>;
    const int threads = row_threads(V, W);
    const size_t row_bytes = ld * sizeof(T);
    if (backward && row_bytes <= KEPT_BYTES)
        Launch(rows, threads, row_bytes)(loss_kernel<T, W, backward, true>, logits, targets, losses, scale, V, ld);
    else
        Launch(rows, threads)(loss_kernel<T, W, backward, false>, logits, targets, losses, scale, V, ld);
}

}  // namespace

void set_logits_bytes(size_t bytes) { limit_bytes = bytes; }

size_t logits_bytes() { return limit_bytes; }

void classifier_forward(DType type, const void* inp, const void* weight, const int32_t* targets, float* losses,
                        size_t rows, size_t C, size_t V, size_t Vp) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const size_t ld = ceil_div<size_t>(Vp, VECTOR<T>) * VECTOR<T>, chunk = chunk_rows(rows, ld * sizeof(T));
        const Scratch logits(chunk * ld * sizeof(T));
        for (size_t first = 0; first < rows; first += chunk) {
            const size_t count = std::min(chunk, rows - first);
            const T* x = static_cast<const T*>(inp) + first * C;
            product(logits_of(type, x, weight, logits.as<T>(), count, C, Vp, ld));
            loss_rows<T, false>(logits.as<T>(), targets + first, losses + first, nullptr, count, V, ld);
        }
    });
}

void classifier_forward_backward(DType type, const void* inp, const void* weight, const int32_t* targets,
                                 float loss_scale, float* losses, void* dinp, void* dweight, size_t rows, size_t C,
                                 size_t V, size_t Vp, bool accumulate) {
    const Scratch scale(sizeof(float));
    Launch(1, MOST_THREADS)(scale_kernel, targets, rows, loss_scale, scale.as<float>());
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const size_t ld = ceil_div<size_t>(Vp, VECTOR<T>) * VECTOR<T>, chunk = chunk_rows(rows, ld * sizeof(T));
        const bool in_float = type != FLOAT32 && chunk < rows;
        const Scratch logits(chunk * ld * sizeof(T)), sums(in_float ? Vp * C * sizeof(float) : 0);
        for (size_t first = 0; first < rows; first += chunk) {
            const size_t count = std::min(chunk, rows - first);
            const T* x = static_cast<const T*>(inp) + first * C;
            product(logits_of(type, x, weight, logits.as<T>(), count, C, Vp, ld));
            loss_rows<T, true>(logits.as<T>(), targets + first, losses + first, scale.as<float>(), count, V, ld);

            Product w;
            w.type = type;
            w.out_type = in_float ? FLOAT32 : type;
            w.rows = Vp, w.columns = C, w.k = count;
            w.a = logits.as<T>(), w.lda = ld, w.a_transposed = true;
            w.b = x, w.ldb = C;
            w.out = in_float ? sums.as<void>() : dweight, w.ldo = C;
            w.add = first > 0 || (accumulate && !in_float) ? w.out : nullptr;
            product(w);

            Product p;  // last: dinp may lie where inp does
            p.type = p.out_type = type;
            p.rows = count, p.columns = C, p.k = Vp;
            p.a = logits.as<T>(), p.lda = ld;
            p.b = weight, p.ldb = C;
            p.out = static_cast<T*>(dinp) + first * C, p.ldo = C;
            product(p);
        }
        if (in_float) round_sums(type, sums.as<float>(), accumulate ? dweight : nullptr, dweight, Vp * C);
    });
}

}  // namespace pyllmc
