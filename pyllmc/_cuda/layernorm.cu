// Layer normalisation over the channels of each row, with the sum with the residual stream on either side.
#include "common.cuh"

namespace pyllmc {
namespace {

constexpr int ROWS = BLOCK / WARP;  // of a block, one for each warp

// A row in the registers of one warp, N vectors in each lane: memory is read once. Lanes past the row hold nothing.
template <class T, int N>
__global__ void __launch_bounds__(BLOCK)
forward_in_registers(const T* inp, const T* residual, const T* weight, const T* bias, T* residual_out, T* out,
                     float* mean, float* rstd, size_t rows, int C, float eps) {
    constexpr int W = VECTOR<T>;
    const int lane = threadIdx.x % WARP;
    const size_t row = static_cast<size_t>(blockIdx.x) * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const size_t start = row * C;
    Floats<W> x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = (i * WARP + lane) * W;
        if (c < C) x[i] = load<W, STREAM>(inp + start + c);
    }
    if (residual != nullptr) {
        Floats<W> r[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int c = (i * WARP + lane) * W;
            if (c < C) r[i] = load<W, STREAM>(residual + start + c);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int c = (i * WARP + lane) * W;
            if (c >= C) continue;
            // as it is stored: what backward reads is what is normalised here
            for (int j = 0; j < W; ++j) x[i][j] = to_float(from_float<T>(x[i][j] + r[i][j]));
            store(residual_out + start + c, x[i]);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if ((i * WARP + lane) * W < C)
            for (int j = 0; j < W; ++j) sum += x[i][j];
    const float average = warp_sum(sum) / static_cast<float>(C);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if ((i * WARP + lane) * W < C)
            for (int j = 0; j < W; ++j) squares += (x[i][j] - average) * (x[i][j] - average);
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(C) + eps);
    if (lane == 0) {
        mean[row] = average;
        rstd[row] = scale;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int c = (i * WARP + lane) * W;
        if (c >= C) continue;
        const Floats<W> w = load<W>(weight + c), b = load<W>(bias + c);
        for (int j = 0; j < W; ++j) x[i][j] = (x[i][j] - average) * scale * w[j] + b[j];
        store(out + start + c, x[i]);
    }
}

// Rows of any length, at any address: one warp reads its row three times, twice from the caches.
template <class T>
__global__ void __launch_bounds__(BLOCK)
forward_of_any_row(const T* inp, const T* residual, const T* weight, const T* bias, T* residual_out, T* out,
                   float* mean, float* rstd, size_t rows, size_t C, float eps) {
    const size_t lane = threadIdx.x % WARP;
    const size_t row = static_cast<size_t>(blockIdx.x) * ROWS + threadIdx.x / WARP;
    if (row >= rows) return;
    const T* x = inp + row * C;
    if (residual != nullptr) {
        T* sums = residual_out + row * C;
        for (size_t c = lane; c < C; c += WARP) sums[c] = from_float<T>(to_float(x[c]) + to_float(residual[row * C + c]));
        x = sums;  // each lane reads what it wrote itself
    }
    float sum = 0.0f, squares = 0.0f;
    for (size_t c = lane; c < C; c += WARP) sum += to_float(x[c]);
    const float average = warp_sum(sum) / static_cast<float>(C);
    for (size_t c = lane; c < C; c += WARP) squares += (to_float(x[c]) - average) * (to_float(x[c]) - average);
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(C) + eps);
    if (lane == 0) {
        mean[row] = average;
        rstd[row] = scale;
    }
    for (size_t c = lane; c < C; c += WARP)
        out[row * C + c] = from_float<T>((to_float(x[c]) - average) * scale * to_float(weight[c]) + to_float(bias[c]));
}

// ---- backward --------------------------------------------------------------------------------------------------------
// dinp needs two sums over each row, dweight and dbias a sum over all rows. Chunks of rows, whose number does not depend
// on the GPU, leave partial sums; a second kernel adds them in order.

constexpr int MAX_CHUNKS = 1056;   // 8 for each multiprocessor of an H200, which runs them all at once
constexpr int TOGETHER = 2;        // rows whose sums a block forms at once, so that it waits half as often

__host__ __device__ inline size_t chunk_start(size_t rows, size_t chunk, size_t chunks) { return rows * chunk / chunks; }

// A thread for each vector of the row: it sums its channels over the rows of its chunk in registers.
constexpr int MAX_THREADS = 768, MAX_REGISTERS = 80;  // of a thread: what MAX_THREADS can have, and 8 blocks of 96
template <class T>
__global__ void __maxnreg__(MAX_REGISTERS) backward_in_registers(const T* dout, const T* inp, const T* weight, const float* mean,
                                      const float* rstd, const T* dresidual, T* dinp, float* partial, size_t rows,
                                      int C) {
    constexpr int W = VECTOR<T>;
    SHARED(float, sums, [2][2 * TOGETHER][WARP]);
    const int c = threadIdx.x * W, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const bool inside = c < C;
    const size_t stop = chunk_start(rows, blockIdx.x + 1, gridDim.x);
    Raw<T> w{};
    Floats<W> dw, db;
    for (int j = 0; j < W; ++j) dw[j] = db[j] = 0.0f;
    if (inside) w = load_raw(weight + c);
    int turn = 0;  // the sums have two places, so that one barrier is enough: nobody is more than one turn ahead
    for (size_t row = chunk_start(rows, blockIdx.x, gridDim.x); row < stop; row += TOGETHER, turn ^= 1) {
        Raw<T> dy[TOGETHER], x[TOGETHER], around[TOGETHER];
        float average[TOGETHER], scale[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            if (!inside || row + r >= stop) continue;
            const size_t at = (row + r) * C + c;
            dy[r] = load_raw<STREAM>(dout + at);
            x[r] = load_raw<STREAM>(inp + at);
            if (dresidual != nullptr) around[r] = load_raw<STREAM>(dresidual + at);
            average[r] = mean[row + r];
            scale[r] = rstd[row + r];
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            float sum_d = 0.0f, sum_dn = 0.0f;
            if (inside && row + r < stop)
                for (int j = 0; j < W; ++j) {
                    const float dyj = dy[r][j], n = (x[r][j] - average[r]) * scale[r];
                    const float d = dyj * w[j];
                    sum_d += d;
                    sum_dn += d * n;
                    dw[j] += dyj * n;
                    db[j] += dyj;
                }
            sum_d = warp_sum(sum_d);
            sum_dn = warp_sum(sum_dn);
            if (lane == 0) {
                sums[turn][2 * r][warp] = sum_d;
                sums[turn][2 * r + 1][warp] = sum_dn;
            }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
            if (!inside || row + r >= stop) continue;
            float sum_d = 0.0f, sum_dn = 0.0f;
            for (int i = 0; i < warps; ++i) {
                sum_d += sums[turn][2 * r][i];
                sum_dn += sums[turn][2 * r + 1][i];
            }
            const float mean_d = sum_d / static_cast<float>(C), mean_dn = sum_dn / static_cast<float>(C);
            Floats<W> dx;
            for (int j = 0; j < W; ++j) {
                const float n = (x[r][j] - average[r]) * scale[r];
                dx[j] = scale[r] * (dy[r][j] * w[j] - mean_d - n * mean_dn);
                if (dresidual != nullptr) dx[j] += around[r][j];
            }
            store(dinp + (row + r) * C + c, dx);
        }
    }
    if (inside) {
        store(partial + static_cast<size_t>(blockIdx.x) * 2 * C + c, dw);
        store(partial + (static_cast<size_t>(blockIdx.x) * 2 + 1) * C + c, db);
    }
}

// Rows of any length, at any address: the sums of a row, one warp for each row;
template <class T>
__global__ void __launch_bounds__(BLOCK)
backward_row_sums(const T* dout, const T* inp, const T* weight, const float* mean, const float* rstd, float* sums,
                  size_t rows, size_t C) {
    const size_t row = static_cast<size_t>(blockIdx.x) * ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    float sum_d = 0.0f, sum_dn = 0.0f;
    for (size_t c = lane; c < C; c += WARP) {
        const float d = to_float(dout[row * C + c]) * to_float(weight[c]);
        sum_d += d;
        sum_dn += d * ((to_float(inp[row * C + c]) - mean[row]) * rstd[row]);
    }
    sum_d = warp_sum(sum_d);
    sum_dn = warp_sum(sum_dn);
    if (lane == 0) {
        sums[2 * row] = sum_d / static_cast<float>(C);
        sums[2 * row + 1] = sum_dn / static_cast<float>(C);
    }
}

// then dinp, and the sums of some channels over a chunk of rows.
template <class T>
__global__ void __launch_bounds__(BLOCK)
backward_of_any_row(const T* dout, const T* inp, const T* weight, const float* mean, const float* rstd,
                    const T* dresidual, const float* sums, T* dinp, float* partial, size_t rows, size_t C) {
    const size_t c = static_cast<size_t>(blockIdx.y) * BLOCK + threadIdx.x;
    if (c >= C) return;
    const size_t stop = chunk_start(rows, blockIdx.x + 1, gridDim.x);
    const float w = to_float(weight[c]);
    float dw = 0.0f, db = 0.0f;
    for (size_t row = chunk_start(rows, blockIdx.x, gridDim.x); row < stop; ++row) {
        const size_t at = row * C + c;
        const float dy = to_float(dout[at]), scale = rstd[row], n = (to_float(inp[at]) - mean[row]) * scale;
        float x = scale * (dy * w - sums[2 * row] - n * sums[2 * row + 1]);
        if (dresidual != nullptr) x += to_float(dresidual[at]);
        dinp[at] = from_float<T>(x);
        dw += dy * n;
        db += dy;
    }
    partial[static_cast<size_t>(blockIdx.x) * 2 * C + c] = dw;
    partial[(static_cast<size_t>(blockIdx.x) * 2 + 1) * C + c] = db;
}

}  // namespace

void layernorm_forward(DType type, const void* inp, const void* residual, const void* weight, const void* bias,
                       void* residual_out, void* out, float* mean, float* rstd, size_t rows, size_t C, float eps) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const Launch launch(ceil_div<size_t>(rows, ROWS), BLOCK);
        auto run = [&](auto kernel) {
            launch(kernel, static_cast<const T*>(inp), static_cast<const T*>(residual), static_cast<const T*>(weight),
                   static_cast<const T*>(bias), static_cast<T*>(residual_out), static_cast<T*>(out), mean, rstd, rows,
                   C, eps);
        };
        const size_t vectors = ceil_div<size_t>(C, VECTOR<T> * WARP);
        if (!vectors_fit<T>(C, inp, residual, weight, bias, residual_out, out) || vectors > 8)
            run(forward_of_any_row<T>);
        else if (vectors <= 1)
            run(forward_in_registers<T, 1>);
        else if (vectors <= 2)
            run(forward_in_registers<T, 2>);
        else if (vectors <= 3)
            run(forward_in_registers<T, 3>);
        else if (vectors <= 4)
            run(forward_in_registers<T, 4>);
        else if (vectors <= 6)
            run(forward_in_registers<T, 6>);
        else
            run(forward_in_registers<T, 8>);
    });
}

void layernorm_backward(DType type, const void* dout, const void* inp, const void* weight, const float* mean,
                        const float* rstd, const void* dresidual, void* dinp, void* dweight, void* dbias, size_t rows,
                        size_t C, bool accumulate) {
    by_type(type, [&](auto zero) {
        using T = decltype(zero);
        const T *dy = static_cast<const T*>(dout), *x = static_cast<const T*>(inp), *w = static_cast<const T*>(weight);
        const T* around = static_cast<const T*>(dresidual);
        T *dx = static_cast<T*>(dinp), *dw = static_cast<T*>(dweight), *db = static_cast<T*>(dbias);
        const bool in_registers = vectors_fit<T>(C, dy, x, w, around, dx) && C / VECTOR<T> <= MAX_THREADS;
        const size_t chunks = std::min<size_t>(ceil_div<size_t>(rows, TOGETHER), MAX_CHUNKS);
        const Scratch partial(2 * C * chunks * sizeof(float));
        if (in_registers) {
            const size_t threads = ceil_div<size_t>(C / VECTOR<T>, WARP) * WARP;
            Launch(chunks, threads)(backward_in_registers<T>, dy, x, w, mean, rstd, around, dx, partial.as<float>(),
                                    rows, C);
        } else {
            const Scratch sums(2 * rows * sizeof(float));
            Launch(ceil_div<size_t>(rows, ROWS), BLOCK)(backward_row_sums<T>, dy, x, w, mean, rstd, sums.as<float>(),
                                                        rows, C);
            Launch(dim3(chunks, ceil_div<size_t>(C, BLOCK)), BLOCK)(backward_of_any_row<T>, dy, x, w, mean, rstd,
                                                                    around, sums.as<float>(), dx, partial.as<float>(),
                                                                    rows, C);
        }
        add_partials(type, partial.as<float>(), 2 * C, chunks, C, dw, accumulate, db);
    });
}

}  // namespace pyllmc
