// CUDA's runtime on the host's memory: devices, memory, copies and graphs.
#include <cuda_runtime.h>

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "shim.h"

// ---- graphs ----------------------------------------------------------------------------------------------------------

struct CUgraph_st {
    std::vector<std::function<cudaError_t()>> work;
};

struct CUgraphExec_st : CUgraph_st {};

namespace shim {

std::string error_text;
cudaError_t last_error = cudaSuccess;
uint64_t allocations_changed = 0;

namespace {

cudaError_t error_of_text = cudaSuccess;   // what error_text is told of
cudaError_t of_next_launch = cudaSuccess;  // what a test lets it fail with

}  // namespace

void poison(void* data, size_t bytes) { std::memset(data, 0xff, bytes); }  // NaN as float, bfloat16 and double

cudaError_t failed(cudaError_t error, const std::string& text) {
    error_text = text;
    return last_error = error_of_text = error;
}

cudaError_t begin_launch(dim3 grid, dim3 block) {
    if (of_next_launch != cudaSuccess) return failed(std::exchange(of_next_launch, cudaSuccess), "as was asked for");
    const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < (1u << 31) && grid.y < 65536 && grid.z < 65536;
    if (fits && threads > 0 && threads <= 1024 && block.z <= 64) return cudaSuccess;
    return failed(cudaErrorInvalidConfiguration, "invalid configuration argument");
}

}  // namespace shim

namespace {

CUgraph_st* captured = nullptr;  // what is captured now
bool invalidated = false;        // by what a capture does not allow
bool no_graphs = false;          // whether the driver has none
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

}  // namespace

cudaError_t shim::not_captured(cudaStreamCaptureMode most) {
    if (captured == nullptr || (most == cudaStreamCaptureModeThreadLocal && capture_mode == cudaStreamCaptureModeRelaxed))
        return cudaSuccess;
    invalidated = true;
    return shim::last_error = cudaErrorStreamCaptureUnsupported;
}

cudaError_t shim::perform(cudaStream_t stream, std::function<cudaError_t()> work) {
    if (captured != nullptr) {
        captured->work.push_back(std::move(work));
        return cudaSuccess;
    }
    arrive(stream);
    return work();
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    if (no_graphs) return shim::last_error = cudaErrorNotSupported;
    if (captured != nullptr) return shim::last_error = cudaErrorStreamCaptureUnsupported;
    captured = new CUgraph_st;
    invalidated = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = invalidated ? nullptr : captured;
    if (invalidated) delete captured;
    captured = nullptr;
    return invalidated ? shim::last_error = cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = new CUgraphExec_st{*graph};
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    shim::arrive(stream);
    for (const auto& work : executable->work)
        if (const cudaError_t error = work(); error != cudaSuccess) return error;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}

// ---- the runtime -----------------------------------------------------------------------------------------------------

namespace {

constexpr int RUNTIME = 13000;
size_t total = size_t{8} << 30, used = 0;
int driver = RUNTIME, gpus = 1, compute_major = 9;
thread_local int current_gpu = 0;
constexpr size_t GAP = 4096;  // behind each allocation, which nobody may touch
std::map<uint64_t, size_t>& allocations() {
    static auto& known = *new std::map<uint64_t, size_t>;
    return known;
}

const std::map<cudaError_t, std::pair<const char*, const char*>> ERRORS = {
    {cudaSuccess, {"cudaSuccess", "no error"}},
    {cudaErrorInvalidValue, {"cudaErrorInvalidValue", "invalid argument"}},
    {cudaErrorMemoryAllocation, {"cudaErrorMemoryAllocation", "out of memory"}},
    {cudaErrorInvalidConfiguration, {"cudaErrorInvalidConfiguration", "invalid configuration argument"}},
    {cudaErrorLaunchFailure, {"cudaErrorLaunchFailure", "unspecified launch failure"}},
    {cudaErrorStreamCaptureUnsupported,
     {"cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"}},
};

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
    if (error == shim::error_of_text && !shim::error_text.empty()) return shim::error_text.c_str();
    const auto found = ERRORS.find(error);
    return found == ERRORS.end() ? "unknown error" : found->second.second;
}

const char* cudaGetErrorName(cudaError_t error) {
    const auto found = ERRORS.find(error);
    return found == ERRORS.end() ? "cudaErrorUnknown" : found->second.first;
}

cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return shim::last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = RUNTIME;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = gpus;
    return driver < RUNTIME ? cudaErrorInsufficientDriver : gpus == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_gpu;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= gpus) return cudaErrorInvalidValue;
    current_gpu = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    if (device < 0 || device >= gpus) return cudaErrorInvalidValue;
    std::snprintf(text, static_cast<size_t>(size), "0000:%02X:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "%s", shim::device_name);
    properties->major = compute_major;
    properties->multiProcessorCount = 4;
    properties->l2CacheSize = 1 << 20;
    properties->totalGlobalMem = total;
    properties->sharedMemPerBlockOptin = shim::MAX_SHARED;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t bytes) {
    if (const cudaError_t error = shim::not_captured(cudaStreamCaptureModeThreadLocal); error != cudaSuccess) return error;
    if (used > total || bytes > total - used) return shim::last_error = cudaErrorMemoryAllocation;
    *data = mmap(nullptr, bytes + GAP, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*data == MAP_FAILED) return shim::last_error = cudaErrorMemoryAllocation;
    shim::poison(*data, bytes);
    allocations()[reinterpret_cast<uint64_t>(*data)] = bytes;
    ++shim::allocations_changed;
    used += bytes;
    return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
    if (const cudaError_t error = shim::not_captured(); error != cudaSuccess) return error;
    const auto found = allocations().find(reinterpret_cast<uint64_t>(data));
    if (found == allocations().end()) return cudaErrorInvalidValue;
    munmap(data, found->second + GAP);
    used -= found->second;
    allocations().erase(found);
    ++shim::allocations_changed;
    return cudaSuccess;
}

std::pair<uint64_t, uint64_t> shim::allocation_at(uint64_t address) {
    auto found = allocations().upper_bound(address);
    if (found == allocations().begin() || address >= (--found)->first + found->second) return {0, 0};
    return {found->first, found->first + found->second};
}

cudaError_t cudaMallocHost(void** data, size_t bytes) {
    if (const cudaError_t error = shim::not_captured(); error != cudaSuccess) return error;
    *data = std::malloc(bytes);
    return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* data) {
    std::free(data);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    *free_bytes = used > total ? 0 : total - used;
    *total_bytes = total;
    return cudaSuccess;
}

// A graph that copies from the host or to it is none that is used.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind != cudaMemcpyDeviceToDevice)
        if (const cudaError_t error = shim::not_captured(); error != cudaSuccess) return error;
    return shim::perform(stream, [=] {
        std::memmove(to, from, bytes);
        return cudaSuccess;
    });
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
    return shim::perform(stream, [=] {
        std::memset(data, value, bytes);
        return cudaSuccess;
    });
}

// ---- for the tests, through ctypes -----------------------------------------------------------------------------------

// The GPU that programs find: the driver's CUDA version, 0 for none, how many GPUs it sees, and their major compute
// capability.
EXPORTED void shim_gpu(int driver_version, int count, int capability) {
    driver = driver_version, gpus = count, compute_major = capability;
}

// So much memory is free from now on.
EXPORTED void shim_free_memory(size_t bytes) { total = used + bytes; }

// Whether the driver can capture graphs.
EXPORTED void shim_graphs(int there) { no_graphs = there == 0; }

// The next launch fails with this error.
EXPORTED void shim_fail(int error) { shim::of_next_launch = static_cast<cudaError_t>(error); }
