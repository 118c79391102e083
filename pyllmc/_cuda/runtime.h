// What kernels ask of the device on the host's side: errors that throw, the stream, launches, scratch memory.
// Included by common.cuh; implemented by runtime.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace pyllmc {

// Throws "file:line: call: what went wrong", OutOfMemory where memory is what went wrong.
[[noreturn]] void fail(cudaError_t error, const char* call, const char* file, int line);

#define CHECK(call)                                                        \
    do {                                                                   \
        const cudaError_t error_ = (call);                                 \
        if (error_ != cudaSuccess) ::pyllmc::fail(error_, #call, __FILE__, __LINE__); \
    } while (0)

// The one stream that every op and every copy goes through. Makes the device ready at the first call. Throws while another
// thread records a graph, into which what this one enqueues would go.
cudaStream_t stream();

int multiprocessors();

// Whether what is enqueued is recorded as a graph, not run; whether it is another thread of the host that records; gives
// up all graphs, so that no memory belongs to one. graph.cu.
bool is_recording();
bool another_thread_records();
void drop_graphs();

// Device memory for the length of an op. It may go back to the cache while the kernels that use it are still to run:
// whoever gets it next comes later on the same stream. The same holds for a graph that is replayed.
class Scratch {
public:
    explicit Scratch(size_t bytes) : data(allocate(bytes, Use::SCRATCH)) {}
    ~Scratch() { release(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }

private:
    void* data;
};

// Launch(blocks, threads, shared)(kernel<T, W>, arguments...): enqueues a kernel; arguments become the kernel's types.
struct Launch {
    dim3 grid;
    dim3 block;
    size_t shared;
    const char* file;
    int line;

    Launch(dim3 grid, dim3 block, size_t shared = 0, const char* file = __builtin_FILE(), int line = __builtin_LINE())
        : grid(grid), block(block), shared(shared), file(file), line(line) {}

    template <class... P, class... A>
    void operator()(void (*kernel)(P...), A... arguments) const {
        const cudaStream_t on = stream();
        // More than 48 KiB, with what the kernel declares itself, must be asked for: once for each kernel, and asking
        // again costs next to nothing.
        if (shared > 32 * 1024)
            throw_on(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
#ifdef __CUDACC__
        kernel<<<grid, block, shared, on>>>(static_cast<P>(arguments)...);
#else
        shim::launch(kernel, grid, block, shared, on, static_cast<P>(arguments)...);
#endif
        throw_on(cudaPeekAtLastError());
    }

private:
    void throw_on(cudaError_t error) const {
        if (error != cudaSuccess) fail(error, "kernel launch", file, line);
    }
};

// out[j] (+)= sum over the chunks of partial[chunk * stride + j], in a fixed order. A second array may follow: its
// columns come after those of the first in each chunk. elementwise.cu.
void add_partials(DType type, const float* partial, size_t stride, size_t chunks, size_t columns, void* out,
                  bool accumulate, void* second = nullptr);

}  // namespace pyllmc
