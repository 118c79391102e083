// For tests/test_cuda_ptx.py: kernels of which each but `flag<true, true>` does one thing wrong, as it may happen to
// those of pyllmc/_cuda, and faults_run, which says what comes of it.
#include <cstdio>
#include <cstring>

#include "mma.cuh"

namespace pyllmc {
namespace {

constexpr int N = 64;  // threads of a block; floats in an array, behind which there is a flag

__global__ void outside(float* a) { a[threadIdx.x + 2] = 1.0f; }

__global__ void misaligned(float* a) { *reinterpret_cast<float4*>(a + 1 + 4 * (threadIdx.x % 2)) = {}; }

__global__ void outside_shared(float* a) {
    DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x + 1] = 1.0f;
    a[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void unwritten(float* a) {
    SHARED(float, tile, [N]);
    if (threadIdx.x > 0) tile[threadIdx.x] = 1.0f;
    __syncthreads();
    a[threadIdx.x] = tile[threadIdx.x];
}

__global__ void between_warps(float* a) {
    SHARED(float, tile, [N]);
    tile[threadIdx.x] = a[threadIdx.x];
    a[threadIdx.x] = tile[N - 1 - threadIdx.x];
}

__global__ void within_a_warp(float* a) {
    SHARED(float, tile, [N]);
    tile[threadIdx.x] = a[threadIdx.x];
    a[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void overwritten(float* a) {
    SHARED(float, tile, [N]);
    tile[threadIdx.x] = a[threadIdx.x];
    __syncthreads();
    const float x = tile[N - 1 - threadIdx.x];
    tile[threadIdx.x] = 2.0f;
    a[threadIdx.x] = x + tile[threadIdx.x];
}

__global__ void same_memory(float* a) {
    a[threadIdx.x] = 1.0f;
    a[N - 1 - threadIdx.x] += 1.0f;
}

__global__ void between_blocks(float* a) { a[threadIdx.x] += 1.0f; }

// Both blocks read it all before the second one writes.
__global__ void read_by_another_block(float* a) {
    const float x = a[N - 1 - threadIdx.x];
    __syncthreads();
    if (blockIdx.x == 1) a[threadIdx.x] = x;
}

// The second block waits for the flag of the first. It is right only with a barrier before the flag is set, and one
// behind the wait for it.
template <bool barrier_before, bool barrier_behind>
__global__ void flag(float* a) {
    int* const flag = reinterpret_cast<int*>(a + N);
    if (blockIdx.x == 0) {
        a[threadIdx.x] = 1.0f;
        if (barrier_before) __syncthreads();
        if (threadIdx.x == 0) publish(flag, 1);
    } else {
        if (threadIdx.x == 0) wait_for(flag, 1);
        if (barrier_behind) __syncthreads();
        a[threadIdx.x] += 1.0f;
    }
}

__global__ void copy_not_waited_for(float* a) {
    SHARED(float4, tile, [N]);
    copy_ahead(&tile[threadIdx.x], a, true);
    a[threadIdx.x] = tile[threadIdx.x].x;
    wait_for_copies();
}

__global__ void copy_of_another_thread(float* a) {
    SHARED(float4, tile, [N]);
    copy_ahead(&tile[threadIdx.x], a, true);
    wait_for_copies();
    a[threadIdx.x] = tile[threadIdx.x ^ 1].x;
}

__global__ void copy_left_behind(float* a) {
    SHARED(float4, tile, [N]);
    copy_ahead(&tile[threadIdx.x], a, true);
}

__global__ void odd_rows(float* a) {
    SHARED(bf16, tile, [N * 16]);
    for (int i = threadIdx.x; i < N * 16; i += N) tile[i] = from_float<bf16>(1.0f);
    __syncthreads();
    a[threadIdx.x] = __uint_as_float(load_matrices<Left>(tile + threadIdx.x % WARP * 9).x[0]);
}

__global__ void lanes_missing(float* a) {
    if (threadIdx.x % WARP < 16) a[threadIdx.x] = __shfl_xor_sync(ALL_LANES, a[threadIdx.x], 1);
}

// In PTX: of an if, the compiler makes a branch.
__global__ void condition_of_a_barrier(float* a) {
    asm volatile("{\n.reg .pred p;\nsetp.lt.u32 p, %0, 16;\n@p bar.sync 0;\n}" : : "r"(threadIdx.x % WARP) : "memory");
    a[threadIdx.x] = 1.0f;
}

__global__ void threads_missing(float* a) {
    if (threadIdx.x >= WARP) return;
    __syncthreads();
    a[threadIdx.x] = 1.0f;
}

__global__ void for_ever(float* a) { wait_for(reinterpret_cast<int*>(a + N), 2); }

__global__ void __launch_bounds__(32) few_threads(float* a) { a[threadIdx.x] = 1.0f; }

struct Fault {
    const char* name;
    void (*kernel)(float*);
    int blocks = 1;
    int shared = 0;
    int threads = N;
};

const Fault FAULTS[] = {
    {"outside", outside, 2},
    {"misaligned", misaligned},
    {"outside_shared", outside_shared, 1, N * 4},
    {"unwritten", unwritten},
    {"between_warps", between_warps},
    {"within_a_warp", within_a_warp, 1, 0, WARP},
    {"overwritten", overwritten},
    {"same_memory", same_memory},
    {"between_blocks", between_blocks, 2},
    {"read_by_another_block", read_by_another_block, 2},
    {"flag", flag<true, true>, 2},
    {"flag_before_the_barrier", flag<false, true>, 2},
    {"flag_without_a_barrier", flag<true, false>, 2},
    {"copy_not_waited_for", copy_not_waited_for},
    {"copy_of_another_thread", copy_of_another_thread},
    {"copy_left_behind", copy_left_behind},
    {"odd_rows", odd_rows},
    {"lanes_missing", lanes_missing},
    {"condition_of_a_barrier", condition_of_a_barrier},
    {"threads_missing", threads_missing},
    {"for_ever", for_ever},
    {"few_threads", few_threads},
    {"too_many_threads", outside, 1, 0, 1056},
    {"too_much_shared", outside_shared, 1, 48 * 1024 + 16},
};

}  // namespace

// Runs the kernel of this name; the text is what the launch says of it, or empty.
extern "C" __attribute__((visibility("default"))) int faults_run(const char* name, char* text, int size) {
    for (const Fault& fault : FAULTS) {
        if (std::strcmp(fault.name, name) != 0) continue;
        float* a = nullptr;
        if (cudaMalloc(reinterpret_cast<void**>(&a), (N + 1) * sizeof *a) != cudaSuccess) return -1;
        cudaMemsetAsync(a, 0, (N + 1) * sizeof *a, nullptr);
        fault.kernel<<<fault.blocks, fault.threads, fault.shared>>>(a);
        const cudaError_t error = cudaGetLastError();
        std::snprintf(text, static_cast<size_t>(size), "%s", error == cudaSuccess ? "" : cudaGetErrorString(error));
        cudaFree(a);
        return 0;
    }
    return -1;
}

}  // namespace pyllmc
