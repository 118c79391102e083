// What the attention kernels share: the operands of a call, and the tiles of the kernels that use tensor cores.
// Included by attention.cu, which chooses, and by flash_forward.cu and flash_backward.cu.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace pyllmc {

constexpr float LN_2 = 0.6931471805599453f;

// T queries and S keys of each head: query t sees the first S - T + t + 1 of them. Strides are in elements.
template <class E>
struct Heads {
    int B, NH, HS, T, S;
    float scale, scale2;                   // 1 / sqrt(HS); the same for powers of two, times log2(e)
    const E *q, *k, *v;                    // head n of sequence b, row t: q[b * q_batch + n * HS + t * q_row]
    size_t q_batch, q_row;
    size_t kv_batch, kv_head, kv_row;      // k[b * kv_batch + n * kv_head + t * kv_row], and v likewise
    E* out;                                // (B, T, NH * HS)
    float* lse;                            // (B, NH, T), or null

    __device__ __forceinline__ const E* queries(int head) const { return q + head / NH * q_batch + head % NH * HS; }
    __device__ __forceinline__ size_t kv(int head) const { return head / NH * kv_batch + head % NH * kv_head; }
    // what belongs to row t of a head in an array (B, T, NH * HS)
    __device__ __forceinline__ size_t row(int head, int t) const {
        return (static_cast<size_t>(head / NH) * T + t) * NH * HS + head % NH * HS;
    }
};

// The backward pass; q, k and v of `heads` lie in qkv, whose layout dqkv has.
template <class E>
struct Gradients {
    Heads<E> heads;
    const E* dout;      // (B, T, NH * HS)
    E* dqkv;            // (B, T, 3 * NH * HS)
    int queries, Tp;    // in a block of queries; T rounded up to whole blocks
    // (B * NH, Tp / queries, 2, queries): lse in powers of two, infinity from T on, which makes probabilities 0; and
    // the dots rowsum(dout out)
    const float* statistics;
};

// ---- tiles in shared memory for tensor cores: flash_forward.cu, flash_backward.cu -----------------------------------

constexpr int FLASH_THREADS = 128;

// D: channels of a head rounded up to 32, 64, 96 or 128. A warp works on M tiles of 16 rows, so that it uses what it
// loads from shared memory M times; with D > 64 its registers hold the sums of one.
template <int D>
constexpr int M_TILES = D <= 64 ? 2 : 1;

// Rows of a tile are an odd number of 16 bytes apart: eight rows that ldmatrix reads lie in different banks. It costs
// an eighth of the memory, and every address is one register and a constant, which a swizzle's is not.
template <int COLUMNS>
constexpr int PITCH = COLUMNS + 8;

// Where lane l's row starts in load_matrices and load_transposed, from the corner of a tile of 16 x 16: the four
// matrices one below the other, then beside (DOWN); or beside, then below (ACROSS).
template <int COLUMNS>
__device__ __forceinline__ int lane_down() {
    const int lane = threadIdx.x % WARP;
    return lane % 16 * PITCH<COLUMNS> + lane / 16 * 8;
}
template <int COLUMNS>
__device__ __forceinline__ int lane_across() {
    const int lane = threadIdx.x % WARP;
    return (lane / 16 * 8 + lane % 8) * PITCH<COLUMNS> + lane / 8 % 2 * 8;
}

// Starts the copies of ROWS rows to a tile; what lies beyond the first `rows` of them or the first HS channels is zero.
template <int ROWS, int D>
__device__ __forceinline__ void fetch_tile(bf16* tile, const bf16* from, size_t stride, int rows, int HS) {
    constexpr int CHUNKS = D <= 32 ? 4 : D <= 64 ? 8 : 16;  // of 16 bytes in a row, as a power of two
    constexpr int AT_ONCE = FLASH_THREADS / CHUNKS;
    const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * 8;
    if (column >= D) return;
    const bf16* const own = from + row * stride + column;
#pragma unroll
    for (int i = 0; i < ROWS; i += AT_ONCE)
        copy_ahead(tile + (i + row) * PITCH<D> + column, own + i * stride, i + row < rows && column < HS);
}

// A warp's sums of M x 16 rows and D columns, times factor[m][row half], through its own rows of a tile to memory: row
// i to `to + i * stride`, for i < rows.
template <int M, int D>
__device__ __forceinline__ void store_rows(const Sum16x8 (&sums)[M][D / 8], const float (&factor)[M][2], bf16* tile,
                                           bf16* to, size_t stride, int rows, int HS) {
    const int lane = threadIdx.x % WARP;
    bf16* const corner = tile + lane / 4 * PITCH<D> + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* x = sums[m][n].x + 2 * half;
                const uint32_t both = pack(x[0] * factor[m][half], x[1] * factor[m][half]);
                *reinterpret_cast<uint32_t*>(corner + (16 * m + 8 * half) * PITCH<D> + 8 * n) = both;
            }
    __syncwarp();
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < M * 16 * CHUNKS / WARP; ++i) {
        const int at = i * WARP + lane, row = at / CHUNKS, column = at % CHUNKS * 8;
        if (row < rows && column < HS)
            *reinterpret_cast<int4*>(to + row * stride + column) =
                *reinterpret_cast<const int4*>(tile + row * PITCH<D> + column);
    }
}

// Calls f with D as a constant.
template <class F>
void by_head_size(int HS, F f) {
    if (HS <= 32)
        f(std::integral_constant<int, 32>{});
    else if (HS <= 64)
        f(std::integral_constant<int, 64>{});
    else if (HS <= 96)
        f(std::integral_constant<int, 96>{});
    else
        f(std::integral_constant<int, 128>{});
}

void flash_forward(const Heads<bf16>& heads);
void flash_backward(const Gradients<bf16>& gradients, int* turns, float* dq);

// Rows of queries in one block of flash_backward, and what it needs: dq holds B * NH * Tp * D floats, turns a zero for
// each block of each head, and one more.
constexpr int flash_queries(int HS) { return HS <= 64 ? 64 : 32; }
constexpr int flash_columns(int HS) { return (HS + 31) / 32 * 32; }

}  // namespace pyllmc
