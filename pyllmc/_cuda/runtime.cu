// The device, its one stream, and memory that is kept between allocations. Everything here throws with file, line and
// the call that failed.
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "common.cuh"

namespace pyllmc {

void fail(cudaError_t error, const char* call, const char* file, int line) {
    const char* name = std::strrchr(file, '/');
    throw std::runtime_error(std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line) + ": " + call +
                             ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

namespace {

// Pinned memory through which small copies go, so that the host need not wait for the stream: the slots in turn, each
// free again when its event says that its last copy was done.
constexpr size_t SLOT_BYTES = 1 << 20;
constexpr int SLOTS = 8;

struct Device {
    int id = 0;
    cudaDeviceProp properties{};
    cudaStream_t stream = nullptr;
    char* pinned = nullptr;
    cudaEvent_t copied[SLOTS]{};
    int next_slot = 0;

    Device() {
        CHECK(cudaGetDevice(&id));
        CHECK(cudaGetDeviceProperties(&properties, id));
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaMallocHost(reinterpret_cast<void**>(&pinned), SLOTS * SLOT_BYTES));
        for (cudaEvent_t& event : copied) CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
};

// Made at the first op, never destroyed: at the end of the process the driver may be gone before it.
Device& device() {
    static Device& the_one = *new Device;
    return the_one;
}

// Blocks that Python let go of, by size. All work is on one stream, so a block can be given to the next op while the
// last one that used it is still to run.
struct Cache {
    std::mutex mutex;
    std::multimap<size_t, void*> blocks;
    std::unordered_map<void*, size_t> sizes;  // of all blocks, in use or not
    size_t bytes = 0;                         // of those not in use

    void empty() {
        CHECK(cudaStreamSynchronize(device().stream));
        for (const auto& [size, data] : blocks) {
            CHECK(cudaFree(data));
            sizes.erase(data);
        }
        blocks.clear();
        bytes = 0;
    }
};

Cache& cache() {
    static Cache& the_one = *new Cache;
    return the_one;
}

constexpr size_t SMALL = 1 << 20, SMALL_STEP = 512, LARGE_STEP = 2 << 20;

std::string mebibytes(size_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
    return text;
}

}  // namespace

cudaStream_t stream() { return device().stream; }

int multiprocessors() { return device().properties.multiProcessorCount; }

std::string device_name() { return device().properties.name; }

int compute_capability() { return 10 * device().properties.major + device().properties.minor; }

bool is_shim() {
#ifdef __CUDACC__
    return false;
#else
    return true;
#endif
}

__global__ void nothing() {}

std::string unavailable() {
    int count = 0, driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (driver == 0) return "no NVIDIA driver was found";
    const auto version = [](int n) { return std::to_string(n / 1000) + "." + std::to_string(n % 1000 / 10); };
    if (error == cudaErrorInsufficientDriver)
        return "the NVIDIA driver is too old: it serves CUDA " + version(driver) + ", this build needs " +
               version(runtime);
    if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "the NVIDIA driver sees no GPU";
    if (error != cudaSuccess) return std::string("the NVIDIA driver fails: ") + cudaGetErrorString(error);
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return "the GPU does not answer";
    const std::string name = std::string(properties.name) + " (compute capability " +
                             std::to_string(properties.major) + "." + std::to_string(properties.minor) + ")";
    if (properties.major < 8) return name + " has no bfloat16: compute capability 8.0 or newer is needed";
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(nothing)) != cudaSuccess) {
        cudaGetLastError();  // or the next launch would report it
        return "this build has no kernels for " + name + "; build again with PYLLMC_CUDA_ARCHS=" +
               std::to_string(10 * properties.major + properties.minor);
    }
    return "";
}

void memory_info(size_t* free_bytes, size_t* total_bytes) {
    device();
    CHECK(cudaMemGetInfo(free_bytes, total_bytes));
}

size_t cached_bytes() {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    return cache().bytes;
}

void release_cache() {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    cache().empty();
}

void* allocate(size_t bytes) {
    const size_t step = bytes <= SMALL ? SMALL_STEP : LARGE_STEP;
    if (bytes > SIZE_MAX / 2) throw OutOfMemory("out of GPU memory: no size is that large");
    const size_t size = std::max<size_t>(ceil_div(bytes, step), 1) * step;
    Cache& c = cache();
    const std::lock_guard<std::mutex> lock(c.mutex);
    const auto found = c.blocks.lower_bound(size);
    if (found != c.blocks.end() && found->first <= size + size / 8) {
        void* data = found->second;
        c.bytes -= found->first;
        c.blocks.erase(found);
        return data;
    }
    device();
    void* data = nullptr;
    cudaError_t error = cudaMalloc(&data, size);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        c.empty();
        error = cudaMalloc(&data, size);
    }
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        size_t free_bytes = 0, total_bytes = 0;
        CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
        throw OutOfMemory("out of GPU memory: " + mebibytes(size) + " were asked for, " + mebibytes(free_bytes) + " of " +
                          mebibytes(total_bytes) + " are free");
    }
    CHECK(error);
    c.sizes[data] = size;
    return data;
}

void release(void* data) noexcept {
    if (data == nullptr) return;
    Cache& c = cache();
    const std::lock_guard<std::mutex> lock(c.mutex);
    const size_t size = c.sizes[data];
    c.blocks.emplace(size, data);
    c.bytes += size;
}

void to_device(void* data, const void* host, size_t bytes) {
    if (bytes == 0) return;
    Device& d = device();
    if (bytes > SLOT_BYTES) {  // from memory that is not pinned, this returns when it has been read
        CHECK(cudaMemcpyAsync(data, host, bytes, cudaMemcpyHostToDevice, d.stream));
        CHECK(cudaStreamSynchronize(d.stream));
        return;
    }
    const int slot = d.next_slot;
    d.next_slot = (slot + 1) % SLOTS;
    CHECK(cudaEventSynchronize(d.copied[slot]));
    std::memcpy(d.pinned + slot * SLOT_BYTES, host, bytes);
    CHECK(cudaMemcpyAsync(data, d.pinned + slot * SLOT_BYTES, bytes, cudaMemcpyHostToDevice, d.stream));
    CHECK(cudaEventRecord(d.copied[slot], d.stream));
}

void to_host(void* host, const void* data, size_t bytes) {
    if (bytes != 0) CHECK(cudaMemcpyAsync(host, data, bytes, cudaMemcpyDeviceToHost, stream()));
    synchronize();
}

void copy(void* to, const void* from, size_t bytes) {
    if (bytes != 0 && to != from) CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()));
}

void clear(void* data, size_t bytes) {
    if (bytes != 0) CHECK(cudaMemsetAsync(data, 0, bytes, stream()));
}

void synchronize() { CHECK(cudaStreamSynchronize(stream())); }

uintptr_t stream_handle() { return reinterpret_cast<uintptr_t>(stream()); }

void follow(uintptr_t other_stream) {
    cudaEvent_t event = nullptr;
    CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CHECK(cudaEventRecord(event, stream()));
    CHECK(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(other_stream), event, 0));
    CHECK(cudaEventDestroy(event));
}

}  // namespace pyllmc
