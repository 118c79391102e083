// What the runtime without a GPU (runtime.cpp, streams.cpp) and the stand-ins for libraries offer to each other and to
// what runs the kernels: shim.cpp, with cuda_runtime.h of this folder, or ../cuda_ptx, with CUDA's own, which comes
// before this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

// What tests call through ctypes, and what a library offers by its name.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace shim {

constexpr size_t MAX_SHARED = 227 << 10;     // of a block on sm_90
constexpr size_t UNASKED_SHARED = 48 << 10;  // where cudaFuncSetAttribute was not asked for more

extern cudaError_t last_error;
extern std::string error_text;  // why a launch failed
cudaError_t failed(cudaError_t error, const std::string& text);
void poison(void* data, size_t bytes);

// Fails where no GPU takes as many blocks or threads, or a test has asked for it.
cudaError_t begin_launch(dim3 grid, dim3 block);

// Now, or each time that the graph is launched which is captured now.
cudaError_t perform(cudaStream_t stream, std::function<cudaError_t()> work);

// Fails where a graph is captured, and spoils it: for what a capture that is not stricter than `most` does not allow.
cudaError_t not_captured(cudaStreamCaptureMode most = cudaStreamCaptureModeRelaxed);

// Runs on a thread of the stream's, after those before it; and, before anything is done at once on a stream: what it
// waits for comes first.
void enqueue(cudaStream_t stream, std::function<void()> task);
void arrive(cudaStream_t stream);

// The start and the end of the device memory that an address is in, {0, 0} where it is in none; and how often what
// there is has changed.
std::pair<uint64_t, uint64_t> allocation_at(uint64_t address);
extern uint64_t allocations_changed;

// Of what runs the kernels:
extern const char* const device_name;
extern bool reversed;  // whether the threads of a block take their turns from the last to the first

}  // namespace shim
