// Causal attention in bfloat16 on tensor cores, in tiles (Dao 2023, arXiv 2307.08691): no T x T matrix is in memory.
//
// A block has 64 or 128 queries of one head and goes over its keys in tiles of 64:
//     S = Q K^T,   P = 2^(c S - c max),  c = scale log2(e),   O = O shrink + P V
// with the running maximum and sum of online softmax. Queries and sums stay in registers, P goes from one product to
// the next in them, and while a tile is worked on the next one is copied to shared memory.
#include "attention.cuh"

namespace pyllmc {
namespace {

constexpr int KEYS = 64;
constexpr float LOWEST = -INFINITY;

template <int D>
constexpr int QUERIES = 64 * M_TILES<D>;

// Two stages, each with keys and values; the queries pass through the second one, outputs through the one that is free.
template <int D>
constexpr int STAGE = 2 * KEYS * PITCH<D>;

template <int D>
__global__ void __launch_bounds__(FLASH_THREADS, 2) forward(const Heads<bf16> h) {
    constexpr int M = M_TILES<D>, N = KEYS / 8, C = D / 8;
    static_assert(QUERIES<D> * PITCH<D> <= STAGE<D>);
    DYNAMIC_SHARED(bf16, stages);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int blocks = ceil_div(h.T, QUERIES<D>), head = blockIdx.x / blocks;
    const int q0 = (blocks - 1 - static_cast<int>(blockIdx.x) % blocks) * QUERIES<D>;  // those with most keys first
    const bf16* const k = h.k + h.kv(head);
    const bf16* const v = h.v + h.kv(head);
    const int keys = min(h.S, h.S - h.T + q0 + QUERIES<D>);  // that any query of the block sees
    const int tiles = ceil_div(keys, KEYS);

    const auto fetch = [&](int tile) {
        bf16* const stage = stages + tile % 2 * STAGE<D>;
        const int first = tile * KEYS, rows = h.S - first;
        fetch_tile<KEYS, D>(stage, k + first * h.kv_row, h.kv_row, rows, h.HS);
        fetch_tile<KEYS, D>(stage + KEYS * PITCH<D>, v + first * h.kv_row, h.kv_row, rows, h.HS);
    };

    fetch_tile<QUERIES<D>, D>(stages + STAGE<D>, h.queries(head) + q0 * h.q_row, h.q_row, h.T - q0, h.HS);
    fetch(0);
    wait_for_copies();
    __syncthreads();
    const int own = warp * 16 * M;  // the warp's first row in the block
    Left q[M][D / 16];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
            q[m][c] = load_matrices<Left>(stages + STAGE<D> + (own + 16 * m) * PITCH<D> + 16 * c + lane_down<D>());

    Sum16x8 out[M][C] = {};
    float top[M][2], total[M][2];  // of rows lane / 4 and lane / 4 + 8; the total is this lane's columns'
#pragma unroll
    for (int m = 0; m < M; ++m)
        for (int half = 0; half < 2; ++half) top[m][half] = LOWEST, total[m][half] = 0.0f;
    const int visible = h.S - h.T + q0 + own;  // the last key that the warp's first row sees

    for (int tile = 0; tile < tiles; ++tile) {
        wait_for_copies();
        __syncthreads();  // this tile is there for all, and nobody needs the other stage any more
        if (tile + 1 < tiles) fetch(tile + 1);
        const int k0 = tile * KEYS;
        if (k0 >= visible + 16 * M) continue;  // no row of this warp sees any of it
        const bf16* const k_tile = stages + tile % 2 * STAGE<D> + lane_across<D>();
        const bf16* const v_tile = stages + tile % 2 * STAGE<D> + KEYS * PITCH<D> + lane_down<D>();

        Sum16x8 s[M][N] = {};
#pragma unroll
        for (int c = 0; c < D / 16; ++c)
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                const RightPair b = load_matrices<RightPair>(k_tile + 8 * n * PITCH<D> + 16 * c);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(s[m][n], q[m][c], b.x[0], b.x[1]);
                    multiply(s[m][n + 1], q[m][c], b.x[2], b.x[3]);
                }
            }
        if (k0 + KEYS - 1 > visible) {  // the diagonal passes through
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (k0 + 8 * n + lane % 4 * 2 + i % 2 > visible + 16 * m + lane / 4 + i / 2 * 8)
                            s[m][n].x[i] = LOWEST;
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float peak = top[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n) peak = fmaxf(peak, fmaxf(s[m][n].x[2 * half], s[m][n].x[2 * half + 1]));
                peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 1));
                peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 2));
                const float shrink = exp2_fast((top[m][half] - peak) * h.scale2), bias = peak * h.scale2;
                float sum = total[m][half] * shrink;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        s[m][n].x[i] = exp2_fast(fmaf(s[m][n].x[i], h.scale2, -bias));
                        sum += s[m][n].x[i];
                    }
                top[m][half] = peak;
                total[m][half] = sum;
#pragma unroll
                for (int n = 0; n < C; ++n)
                    for (int i = 2 * half; i < 2 * half + 2; ++i) out[m][n].x[i] *= shrink;
            }
#pragma unroll
        for (int key = 0; key < KEYS / 16; ++key) {
            Left p[M];
#pragma unroll
            for (int m = 0; m < M; ++m) p[m] = as_left(s[m][2 * key], s[m][2 * key + 1]);
#pragma unroll
            for (int n = 0; n < C; n += 2) {
                const RightPair b = load_transposed<RightPair>(v_tile + 16 * key * PITCH<D> + 8 * n);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(out[m][n], p[m], b.x[0], b.x[1]);
                    multiply(out[m][n + 1], p[m], b.x[2], b.x[3]);
                }
            }
        }
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            factor[m][half] = 1.0f / sum;
            const int t = q0 + own + 16 * m + 8 * half + lane / 4;
            if (h.lse != nullptr && lane % 4 == 0 && t < h.T)
                h.lse[static_cast<size_t>(head) * h.T + t] = top[m][half] * h.scale + logf(sum);
        }
    store_rows<M, D>(out, factor, stages + tiles % 2 * STAGE<D> + own * PITCH<D>, h.out + h.row(head, q0 + own),
                     static_cast<size_t>(h.NH) * h.HS, h.T - q0 - own, h.HS);
}

}  // namespace

void flash_forward(const Heads<bf16>& h) {
    by_head_size(h.HS, [&](auto size) {
        constexpr int D = decltype(size)::value;
        const Launch launch(static_cast<unsigned>(ceil_div(h.T, QUERIES<D>)) * h.B * h.NH, FLASH_THREADS,
                            2 * STAGE<D> * sizeof(bf16));
        launch(forward<D>, h);
    });
}

}  // namespace pyllmc
