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
    const std::string text = std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line) + ": " + call +
                             ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
    cudaGetLastError();  // or the next launch would report it
    // A kernel is loaded at its first launch, which takes memory too.
    if (error == cudaErrorMemoryAllocation) throw OutOfMemory("out of GPU memory: " + text);
    throw std::runtime_error(text);
}

namespace {

// Pinned memory through which copies to the device go, piece by piece, so that the host need not wait for the stream: the
// slots in turn, each free again when its event says that its last copy was done.
constexpr size_t SLOT_BYTES = 1 << 20;
constexpr int SLOTS = 8;

// The GPU that was chosen; where none was, the one that is the process' current one.
int chosen = -1;
bool in_use = false;

int chosen_or_current() {
    int id = chosen;
    if (id < 0) CHECK(cudaGetDevice(&id));
    return id;
}

struct Device {
    int id = chosen_or_current();
    cudaDeviceProp properties{};
    cudaStream_t stream = nullptr;
    char* pinned = nullptr;
    cudaEvent_t copied[SLOTS]{};
    int next_slot = 0;

    Device() {
        in_use = true;
        CHECK(cudaSetDevice(id));
        CHECK(cudaGetDeviceProperties(&properties, id));
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaMallocHost(reinterpret_cast<void**>(&pinned), SLOTS * SLOT_BYTES));
        for (cudaEvent_t& event : copied) CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
};

// Made at the first op, never destroyed: at the end of the process the driver may be gone before it.
Device& device() {
    static Device& the_one = *new Device;
    thread_local bool bound = false;  // each thread of the host has a current GPU of its own
    if (!bound) {
        CHECK(cudaSetDevice(the_one.id));
        bound = true;
    }
    return the_one;
}

// Blocks that nobody uses, by size, for arrays and for ops' scratch apart: a block of scratch is never lent to an array.
// All work is on one stream, so a block can be given to the next op while the last one that used it is still to run;
// and a graph can write to the scratch that it was recorded with whenever it is replayed.
struct Cache {
    std::mutex mutex;
    std::multimap<size_t, void*> blocks[2];             // by Use
    std::unordered_map<void*, std::pair<size_t, Use>> known;  // of all blocks, in use or not
    size_t bytes = 0;                                   // of those not in use

    void empty(Use use) {
        if (use == Use::SCRATCH) drop_graphs();
        CHECK(cudaStreamSynchronize(device().stream));
        for (const auto& [size, data] : blocks[static_cast<int>(use)]) {
            CHECK(cudaFree(data));
            known.erase(data);
            bytes -= size;
        }
        blocks[static_cast<int>(use)].clear();
    }
};

Cache& cache() {
    static Cache& the_one = *new Cache;
    return the_one;
}

// cudaMalloc while a graph is recorded, too: it is no part of the graph.
cudaError_t allocate_anew(void** data, size_t size) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t error = cudaMalloc(data, size);
    CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    if (error == cudaErrorMemoryAllocation) cudaGetLastError();
    return error;
}

constexpr size_t SMALL = 1 << 20, SMALL_STEP = 512, LARGE_STEP = 2 << 20;

std::string mebibytes(size_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
    return text;
}

}  // namespace

cudaStream_t stream() {
    if (another_thread_records())
        throw std::runtime_error("runtime.cu: another thread is recording a training step; let one thread at a time call "
                                 "the ops of a GPU");
    return device().stream;
}

std::vector<std::string> gpus() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();
        count = 0;
    }
    std::vector<std::string> addresses;
    for (int i = 0; i < count; ++i) {
        char text[32] = "";
        CHECK(cudaDeviceGetPCIBusId(text, sizeof text, i));
        addresses.emplace_back(text);
    }
    return addresses;
}

void set_device(int index) {
    int count = 0;
    CHECK(cudaGetDeviceCount(&count));
    if (index < 0 || index >= count)
        throw std::invalid_argument("there is no GPU " + std::to_string(index) + ": this process sees " +
                                    std::to_string(count));
    if (in_use && index != device().id)
        throw std::invalid_argument("GPU " + std::to_string(device().id) + " is in use already, so it cannot be GPU " +
                                    std::to_string(index));
    chosen = index;
}

int device_index() { return device().id; }

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
    const int id = chosen_or_current();
    if (cudaSetDevice(id) != cudaSuccess || cudaGetDeviceProperties(&properties, id) != cudaSuccess) return "the GPU does not answer";
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
    for (Use use : {Use::ARRAY, Use::SCRATCH}) cache().empty(use);
}

void* allocate(size_t bytes, Use use) {
    const size_t step = bytes <= SMALL ? SMALL_STEP : LARGE_STEP;
    if (bytes > SIZE_MAX / 2) throw OutOfMemory("out of GPU memory: no size is that large");
    const size_t size = std::max<size_t>(ceil_div(bytes, step), 1) * step;
    Cache& c = cache();
    const std::lock_guard<std::mutex> lock(c.mutex);
    auto& blocks = c.blocks[static_cast<int>(use)];
    const auto found = blocks.lower_bound(size);
    if (found != blocks.end() && found->first <= size + size / 8) {
        void* data = found->second;
        c.bytes -= found->first;
        blocks.erase(found);
        return data;
    }
    device();
    void* data = nullptr;
    cudaError_t error = allocate_anew(&data, size);
    for (Use kept : {Use::ARRAY, Use::SCRATCH}) {  // that of scratch last: the graphs go with it
        if (error != cudaErrorMemoryAllocation || is_recording()) break;
        c.empty(kept);
        error = allocate_anew(&data, size);
    }
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, total_bytes = 0;
        CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
        throw OutOfMemory("out of GPU memory: " + mebibytes(size) + " were asked for, " + mebibytes(free_bytes) + " of " +
                          mebibytes(total_bytes) + " are free");
    }
    CHECK(error);
    c.known[data] = {size, use};
    return data;
}

void release(void* data) noexcept {
    if (data == nullptr) return;
    Cache& c = cache();
    const std::lock_guard<std::mutex> lock(c.mutex);
    const auto [size, use] = c.known[data];
    c.blocks[static_cast<int>(use)].emplace(size, data);
    c.bytes += size;
}

// Not a block of scratch, which may be a graph's.
void give_back(void* array) noexcept {
    {
        Cache& c = cache();
        const std::lock_guard<std::mutex> lock(c.mutex);
        if (cudaFree(array) == cudaSuccess) {
            c.known.erase(array);
            return;
        }
    }
    cudaGetLastError();  // a graph is recorded
    release(array);
}

void to_device(void* data, const void* host, size_t bytes) {
    const cudaStream_t on = stream();
    if (is_recording()) throw std::runtime_error("runtime.cu: a graph that is recorded cannot copy from the host");
    Device& d = device();
    for (size_t done = 0; done < bytes;) {
        const size_t now = std::min(bytes - done, SLOT_BYTES);
        const int slot = d.next_slot;
        d.next_slot = (slot + 1) % SLOTS;
        CHECK(cudaEventSynchronize(d.copied[slot]));
        char* const staged = d.pinned + slot * SLOT_BYTES;
        std::memcpy(staged, static_cast<const char*>(host) + done, now);
        CHECK(cudaMemcpyAsync(static_cast<char*>(data) + done, staged, now, cudaMemcpyHostToDevice, on));
        CHECK(cudaEventRecord(d.copied[slot], on));
        done += now;
    }
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

// What is recorded has to use arrays that outlive it, and a wait would end the recording.
void settle() noexcept {
    if (is_recording()) return;
    cudaStreamSynchronize(device().stream);
    cudaGetLastError();
}

uintptr_t stream_handle() { return reinterpret_cast<uintptr_t>(stream()); }

void follow(uintptr_t other_stream) {
    cudaEvent_t event = nullptr;
    CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    CHECK(cudaEventRecord(event, stream()));
    CHECK(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(other_stream), event, 0));
    CHECK(cudaEventDestroy(event));
}

}  // namespace pyllmc
