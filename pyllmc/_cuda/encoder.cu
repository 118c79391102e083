// Token and position embedding. The gradient of the token table is a sum over the rows of each token in the order of
// the batch: the rows are sorted by token, so that every element is added up by one thread, always in one order.
#include "common.cuh"

namespace pyllmc {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
forward_kernel(const int32_t* tokens, const T* wte, const T* wpe, T* out, size_t rows, size_t positions, size_t C,
               size_t V) {
    const size_t vectors = C / W, i = static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= rows * vectors) return;
    const size_t row = i / vectors, c = i % vectors * W;
    const size_t token = static_cast<uint32_t>(tokens[row]);
    const Floats<W> position = load<W>(wpe + row % positions * C + c);
    Floats<W> x;
    if (token < V)
        x = load<W>(wte + token * C + c);
    else  // outside the table
        for (int j = 0; j < W; ++j) x[j] = NAN;
    for (int j = 0; j < W; ++j) x[j] += position[j];
    store(out + row * C + c, x);
}

// ---- sorting the rows by token ---------------------------------------------------------------------------------------
// A radix sort by RADIX_BITS of the token at a time, from the lowest; every pass keeps the order of equal digits. Per
// pass: how often each digit occurs in each tile of rows; where each digit of each tile starts; the move.

constexpr int RADIX_BITS = 8, DIGITS = 1 << RADIX_BITS;
constexpr int TILE_WARPS = BLOCK / WARP, TILE_STEPS = 8;  // a warp takes TILE_STEPS times 32 neighbouring rows
constexpr int TILE = BLOCK * TILE_STEPS;
static_assert(DIGITS == BLOCK, "a thread for each digit");

__device__ __forceinline__ int digit_of(int32_t token, int shift) {
    return static_cast<int>(static_cast<uint32_t>(token) >> shift) & (DIGITS - 1);
}

// counts[digit][tile]
__global__ void __launch_bounds__(BLOCK)
count_digits(const int32_t* tokens, size_t n, int shift, int32_t* counts) {
    SHARED(int32_t, count, [DIGITS]);
    count[threadIdx.x] = 0;
    __syncthreads();
    const size_t start = static_cast<size_t>(blockIdx.x) * TILE;
    for (size_t i = start + threadIdx.x; i < n && i < start + TILE; i += BLOCK)
        atomicAdd(&count[digit_of(tokens[i], shift)], 1);
    __syncthreads();
    counts[static_cast<size_t>(threadIdx.x) * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Each count becomes the sum of those before it; one block, a run of neighbouring counts to a thread.
constexpr int SCAN = 1024;
__global__ void __launch_bounds__(SCAN) add_up(int32_t* counts, size_t n) {
    SHARED(int32_t, sums, [SCAN]);
    const size_t each = ceil_div<size_t>(n, SCAN), first = threadIdx.x * each;
    const size_t stop = first + each < n ? first + each : n;
    int32_t sum = 0;
    for (size_t i = first; i < stop; ++i) sum += counts[i];
    sums[threadIdx.x] = sum;
    for (unsigned offset = 1; offset < SCAN; offset *= 2) {
        __syncthreads();
        const int32_t before = threadIdx.x >= offset ? sums[threadIdx.x - offset] : 0;
        __syncthreads();
        sums[threadIdx.x] += before;
    }
    int32_t before = sums[threadIdx.x] - sum;
    for (size_t i = first; i < stop; ++i) {
        const int32_t count = counts[i];
        counts[i] = before;
        before += count;
    }
}

// Moves each row to its place; without `rows` they are still in the order of the batch.
__global__ void __launch_bounds__(BLOCK)
move_rows(const int32_t* tokens, const int32_t* rows, size_t n, int shift, const int32_t* starts,
          int32_t* tokens_out, int32_t* rows_out) {
    SHARED(int32_t, place, [TILE_WARPS][DIGITS]);  // of the next row with this digit, for each warp
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const size_t first = static_cast<size_t>(blockIdx.x) * TILE + static_cast<size_t>(warp) * TILE_STEPS * WARP + lane;
    for (int d = lane; d < DIGITS; d += WARP) place[warp][d] = 0;
    __syncwarp();
    for (int step = 0; step < TILE_STEPS; ++step) {
        const size_t i = first + step * WARP;
        if (i < n) atomicAdd(&place[warp][digit_of(tokens[i], shift)], 1);
    }
    __syncthreads();
    int32_t start = starts[static_cast<size_t>(threadIdx.x) * gridDim.x + blockIdx.x];
    for (int w = 0; w < TILE_WARPS; ++w) {
        const int32_t count = place[w][threadIdx.x];
        place[w][threadIdx.x] = start;
        start += count;
    }
    __syncthreads();
    for (int step = 0; step < TILE_STEPS; ++step) {
        const size_t i = first + step * WARP;
        const bool inside = i < n;
        const int32_t token = inside ? tokens[i] : 0;
        const int digit = inside ? digit_of(token, shift) : DIGITS;  // past the end: a digit of its own
        const unsigned same = __match_any_sync(ALL_LANES, digit), before = same & ((1u << lane) - 1);
        const int32_t at = inside ? place[warp][digit] + __popc(before) : 0;
        __syncwarp();
        if (inside && before == 0) place[warp][digit] += __popc(same);
        __syncwarp();
        if (inside) {
            tokens_out[at] = token;
            rows_out[at] = rows == nullptr ? static_cast<int32_t>(i) : rows[i];
        }
    }
}

// ---- the gradients ---------------------------------------------------------------------------------------------------
// The sorted rows are cut into pieces of PIECE rows, whatever tokens are in them. A token whose rows lie within one piece
// is added to dwte at once. Of a token that crosses pieces, each piece leaves its sum: at edges[piece][0] if the token
// began before the piece, at edges[piece][1] if it begins in it. The piece where it begins then adds them up in order.

constexpr int PIECE = 32;

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
add_rows(const T* dout, const int32_t* tokens, const int32_t* rows, size_t n, size_t C, size_t V, T* dwte,
         float* edges) {
    const size_t vectors = C / W, column = static_cast<size_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (column >= vectors) return;
    const size_t c = column * W, first = static_cast<size_t>(blockIdx.x) * PIECE;
    const size_t stop = first + PIECE < n ? first + PIECE : n;
    Floats<W> sum;
    bool began_before = first > 0 && tokens[first - 1] == tokens[first];
    for (size_t i = first; i < stop; ++i) {
        const int32_t token = tokens[i];
        const Floats<W> x = load<W>(dout + static_cast<size_t>(rows[i]) * C + c);
        if (i > first && tokens[i - 1] == token)
            for (int j = 0; j < W; ++j) sum[j] += x[j];
        else
            sum = x;
        const bool last = i + 1 == stop, goes_on = i + 1 < n && tokens[i + 1] == token;
        if (goes_on && !last) continue;
        if (began_before || goes_on) {
            store(edges + (static_cast<size_t>(blockIdx.x) * 2 + (began_before ? 0 : 1)) * C + c, sum);
        } else if (static_cast<uint32_t>(token) < V) {
            T* to = dwte + static_cast<size_t>(token) * C + c;
            const Floats<W> there = load<W>(to);
            for (int j = 0; j < W; ++j) sum[j] += there[j];
            store(to, sum);
        }
        began_before = false;
    }
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
add_edges(const int32_t* tokens, size_t n, size_t C, size_t V, const float* edges, T* dwte) {
    const size_t vectors = C / W, column = static_cast<size_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    const size_t first = static_cast<size_t>(blockIdx.x) * PIECE, stop = first + PIECE;
    if (column >= vectors || stop >= n) return;
    const int32_t token = tokens[stop - 1];
    const bool begins_here = tokens[first] != token || first == 0 || tokens[first - 1] != token;
    if (tokens[stop] != token || !begins_here || static_cast<uint32_t>(token) >= V) return;
    const size_t c = column * W;
    Floats<W> sum = load<W>(edges + (static_cast<size_t>(blockIdx.x) * 2 + 1) * C + c);
    for (size_t piece = blockIdx.x + 1; piece * PIECE < n && tokens[piece * PIECE] == token; ++piece) {
        const Floats<W> x = load<W>(edges + piece * 2 * C + c);
        for (int j = 0; j < W; ++j) sum[j] += x[j];
    }
    T* to = dwte + static_cast<size_t>(token) * C + c;
    const Floats<W> there = load<W>(to);
    for (int j = 0; j < W; ++j) sum[j] += there[j];
    store(to, sum);
}

template <class T, int W>
__global__ void __launch_bounds__(BLOCK)
add_positions(const T* dout, T* dwpe, size_t B, size_t positions, size_t C, size_t maxT, bool add) {
    const size_t i = (static_cast<size_t>(blockIdx.x) * BLOCK + threadIdx.x) * W;
    if (i >= maxT * C) return;
    const size_t size = positions * C;
    Floats<W> sum;
    for (int j = 0; j < W; ++j) sum[j] = 0.0f;
    if (i < size) {
#pragma unroll 4
        for (size_t b = 0; b < B; ++b) {
            const Floats<W> x = load<W>(dout + b * size + i);
            for (int j = 0; j < W; ++j) sum[j] += x[j];
        }
    } else if (add) {
        return;
    }
    if (add) {
        const Floats<W> there = load<W>(dwpe + i);
        for (int j = 0; j < W; ++j) sum[j] += there[j];
    }
    store(dwpe + i, sum);
}

// The rows by token, and their tokens, in `sorted` and `rows`; both of n int32, scratch of four times that and counts.
void sort_by_token(const int32_t* tokens, size_t n, size_t V, int32_t* sorted, int32_t* rows) {
    const size_t tiles = ceil_div<size_t>(n, TILE);
    const Scratch other(2 * n * sizeof(int32_t)), counts(DIGITS * tiles * sizeof(int32_t));
    int passes = 1;
    while (passes * RADIX_BITS < 32 && (V - 1) >> (passes * RADIX_BITS) != 0) ++passes;
    const int32_t *from = tokens, *from_rows = nullptr;
    for (int pass = 0; pass < passes; ++pass) {
        const bool here = (passes - pass) % 2 == 1;  // so that the last pass ends in `sorted`
        int32_t* to = here ? sorted : other.as<int32_t>();
        int32_t* to_rows = here ? rows : other.as<int32_t>() + n;
        const Launch over_tiles(tiles, BLOCK);
        over_tiles(count_digits, from, n, pass * RADIX_BITS, counts.as<int32_t>());
        Launch(1, SCAN)(add_up, counts.as<int32_t>(), DIGITS * tiles);
        over_tiles(move_rows, from, from_rows, n, pass * RADIX_BITS, counts.as<int32_t>(), to, to_rows);
        from = to;
        from_rows = to_rows;
    }
}

}  // namespace

void encoder_forward(DType type, const int32_t* tokens, const void* wte, const void* wpe, void* out, size_t B, size_t T,
                     size_t C, size_t V) {
    by_type(type, [&](auto zero) {
        using E = decltype(zero);
        const auto run = [&](auto kernel, size_t width) {
            Launch(ceil_div<size_t>(B * T * (C / width), BLOCK), BLOCK)(
                kernel, tokens, static_cast<const E*>(wte), static_cast<const E*>(wpe), static_cast<E*>(out), B * T, T,
                C, V);
        };
        if (vectors_fit<E>(C, wte, wpe, out))
            run(forward_kernel<E, VECTOR<E>>, VECTOR<E>);
        else
            run(forward_kernel<E, 1>, 1);
    });
}

void encoder_backward(DType type, const void* dout, const int32_t* tokens, void* dwte, void* dwpe, size_t B, size_t T,
                      size_t C, size_t V, size_t maxT, bool add_wte, bool add_wpe) {
    const size_t n = B * T, pieces = ceil_div<size_t>(n, PIECE);
    const Scratch order(2 * n * sizeof(int32_t)), edges(2 * pieces * C * sizeof(float));
    int32_t *sorted = order.as<int32_t>(), *rows = sorted + n;
    sort_by_token(tokens, n, V, sorted, rows);
    by_type(type, [&](auto zero) {
        using E = decltype(zero);
        if (!add_wte) clear(dwte, V * C * sizeof(E));
        const auto run = [&](auto add_rows_kernel, auto add_edges_kernel, auto add_positions_kernel, size_t width) {
            const size_t vectors = C / width, threads = std::min<size_t>(ceil_div<size_t>(vectors, WARP) * WARP, BLOCK);
            const Launch over_pieces(dim3(pieces, ceil_div(vectors, threads)), threads);
            const E* dy = static_cast<const E*>(dout);
            over_pieces(add_rows_kernel, dy, sorted, rows, n, C, V, static_cast<E*>(dwte), edges.as<float>());
            over_pieces(add_edges_kernel, sorted, n, C, V, edges.as<float>(), static_cast<E*>(dwte));
            Launch(ceil_div<size_t>(maxT * C / width, BLOCK), BLOCK)(add_positions_kernel, dy, static_cast<E*>(dwpe), B, T,
                                                                     C, maxT, add_wpe);
        };
        if (vectors_fit<E>(C, dout, dwte, dwpe))
            run(add_rows<E, VECTOR<E>>, add_edges<E, VECTOR<E>>, add_positions<E, VECTOR<E>>, VECTOR<E>);
        else
            run(add_rows<E, 1>, add_edges<E, 1>, add_positions<E, 1>, 1);
    });
}

}  // namespace pyllmc
