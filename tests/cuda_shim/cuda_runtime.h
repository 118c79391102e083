// CUDA for machines without a GPU: as much of the language and of the runtime as pyllmc/_cuda uses, as plain C++.
//
// A block's threads are fibers of one host thread. Each runs until it has to wait: at __syncthreads for the block, at a
// shuffle, vote or __syncwarp for the lanes of its mask; then another of its warp goes on, and a warp runs as far ahead
// of the others as it can. Blocks run one after the other. Before a block starts, shared
// memory holds NaN, and so does new device memory, which is the host's. Kernels and copies are immediate, and only what
// nccl.cpp puts on a stream happens later (streams.cpp); while a graph is captured they are kept as functions, and what a
// capture does not allow fails.
//
// Stricter than a GPU: all threads of a block must come to every barrier, all lanes of a mask to every shuffle; a
// thread that waits for one that has ended, or for ever, makes the launch fail; vectors must be aligned (under
// UndefinedBehaviorSanitizer). Implemented by shim.cpp and runtime.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __maxnreg__(n)
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

// ---- errors, devices, memory -----------------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901
};

enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum { cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2 };

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, l2CacheSize;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};

struct cudaFuncAttributes {
    int numRegs;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMalloc(void** data, size_t bytes);
cudaError_t cudaFree(void* data);
cudaError_t cudaMallocHost(void** data, size_t bytes);
cudaError_t cudaFreeHost(void* data);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

#include "shim.h"

// ---- threads ---------------------------------------------------------------------------------------------------------

namespace shim {

struct Thread {
    uint3 thread{}, block{};
    dim3 block_size, grid_size;
};

extern Thread* self;            // the thread that runs now
extern uint64_t block_count;    // of all blocks so far: a new one finds its shared memory poisoned

void barrier(const char* file, int line);                     // __syncthreads
const uint64_t* exchange(unsigned mask, uint64_t value);      // every lane's value; NaN for lanes outside the mask
void* dynamic_shared();
void declare_shared(size_t bytes);                            // so much of the block's is static
void copy_ahead(void* to, const void* from, size_t bytes, bool valid);  // NaN there from now on, until it is waited for
void wait_for_copies(const char* file, int line);             // of this thread
[[noreturn]] void stuck(const char* why);                     // this thread never goes on: the launch fails
int lane();

using Body = void (*)(void*);
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared, Body body, void* arguments);

template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, P... arguments) {
    return perform(stream, [=] {
        auto body = [&] { kernel(arguments...); };
        return run(reinterpret_cast<const void*>(kernel), grid, block, shared,
                   [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
    });
}

// A __shared__ variable: one object for each place in the source, which is what the type of `place` stands for.
template <class Array, class Place>
Array& shared_array(Place) {
    alignas(128) static unsigned char storage[sizeof(Array)];
    static uint64_t poisoned = 0;
    if (poisoned != block_count) {
        poison(storage, sizeof storage);
        declare_shared(sizeof storage);
        poisoned = block_count;
    }
    return reinterpret_cast<Array&>(storage);
}

template <class T>
uint64_t pack(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T unpack(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// What a warp does at once: when all lanes have come, one of them calls f(arguments of each lane) for all.
template <class Arguments, class F>
void together(Arguments& mine, F f) {
    struct Lane {
        Arguments* arguments;
        bool done;
    } lane{&mine, false};
    Lane* pointer = &lane;
    const uint64_t* lanes = exchange(0xffffffffu, pack(pointer));
    if (lane.done) return;
    Arguments* all[32];
    for (int i = 0; i < 32; ++i) {
        Lane* const each = unpack<Lane*>(lanes[i]);
        all[i] = each->arguments;
        each->done = true;
    }
    f(all);
}

}  // namespace shim

#define threadIdx (::shim::self->thread)
#define blockIdx (::shim::self->block)
#define blockDim (::shim::self->block_size)
#define gridDim (::shim::self->grid_size)
#define warpSize 32

#define __syncthreads() ::shim::barrier(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const uint64_t* values = shim::exchange(mask, shim::pack(value));
    return shim::unpack<T>(values[(shim::lane() & ~(width - 1)) + (source & (width - 1))]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const uint64_t* values = shim::exchange(mask, shim::pack(value));
    const int source = shim::lane() ^ bits;
    return (source & ~(width - 1)) > (shim::lane() & ~(width - 1)) ? value : shim::unpack<T>(values[source]);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const uint64_t* values = shim::exchange(mask, shim::pack(value));
    const unsigned within = static_cast<unsigned>(shim::lane()) % width;
    return within + delta >= static_cast<unsigned>(width) ? value : shim::unpack<T>(values[shim::lane() + delta]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const uint64_t* values = shim::exchange(mask, shim::pack(value));
    const unsigned within = static_cast<unsigned>(shim::lane()) % width;
    return within < delta ? value : shim::unpack<T>(values[shim::lane() - delta]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* values = shim::exchange(mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1 && values[i] == 1) votes |= 1u << i;
    return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t mine = shim::pack(value), *values = shim::exchange(mask, mine);
    unsigned same = 0;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1 && values[i] == mine) same |= 1u << i;
    return same;
}

// ---- functions of the device -----------------------------------------------------------------------------------------

// Blocks take turns and a fiber is never interrupted, so plain arithmetic is atomic.
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at = before + value;
    return before;
}

template <class T>
T atomicMax(T* at, T value) {
    const T before = *at;
    if (value > before) *at = value;
    return before;
}

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, const T& value) { *p = value; }
template <class T>
void __stwb(T* p, const T& value) { *p = value; }
template <class T>
void __stcg(T* p, const T& value) { *p = value; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __int_as_float(int x) { return shim::unpack<float>(shim::pack(x)); }
inline float __uint_as_float(unsigned x) { return shim::unpack<float>(shim::pack(x)); }
inline unsigned __float_as_uint(float x) { return shim::unpack<unsigned>(shim::pack(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T>
constexpr T max(T a, T b) { return a < b ? b : a; }
