// CUDA's streams and events. Kernels and copies are done when they are called, so a stream has nothing of
// theirs to keep; what is put there by `enqueue` runs on a thread, and then events are as on a GPU: one that was
// recorded behind it is not ready yet, a stream that waits for that event gets no further. Whoever forgets to wait
// computes with what was there before.
#include <cuda_runtime.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "shim.h"

struct CUstream_st {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> tasks;
    uint64_t enqueued = 0, done = 0;
    bool has_thread = false;
    std::vector<std::pair<CUstream_st*, uint64_t>> waits;  // what has to be done before this stream goes on

    void run() {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [&] { return !tasks.empty(); });
            const std::function<void()> task = std::move(tasks.front());
            tasks.pop_front();
            lock.unlock();
            task();
            lock.lock();
            ++done;
            changed.notify_all();
        }
    }

    void wait_for(uint64_t count) {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return done >= count; });
    }
};

struct CUevent_st {
    std::chrono::steady_clock::time_point recorded;
    CUstream_st* stream = nullptr;
    uint64_t count = 0;  // of the stream's tasks that come before it
};

namespace {

int waits = 0;  // of the host for all that was put on a stream

}  // namespace

namespace shim {

void arrive(cudaStream_t stream) {
    if (stream == nullptr) return;
    for (const auto& [other, count] : stream->waits) other->wait_for(count);
    stream->waits.clear();
}

void enqueue(cudaStream_t stream, std::function<void()> task) {
    arrive(stream);
    const std::lock_guard<std::mutex> lock(stream->mutex);
    if (!stream->has_thread) std::thread(&CUstream_st::run, stream).detach();
    stream->has_thread = true;
    stream->tasks.push_back(std::move(task));
    ++stream->enqueued;
    stream->changed.notify_all();
}

}  // namespace shim

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ++waits;
    if (const cudaError_t error = shim::not_captured(); error != cudaSuccess) return error;
    shim::arrive(stream);
    if (stream != nullptr) stream->wait_for(stream->enqueued);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (stream != nullptr && event->stream != nullptr) stream->waits.emplace_back(event->stream, event->count);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return shim::not_captured(); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->recorded = std::chrono::steady_clock::now();
    event->stream = stream;
    event->count = stream == nullptr ? 0 : stream->enqueued;
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
    *milliseconds = std::chrono::duration<float, std::milli>(stop->recorded - start->recorded).count();
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (event->stream == nullptr) return cudaSuccess;
    const std::lock_guard<std::mutex> lock(event->stream->mutex);
    return event->stream->done >= event->count ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (const cudaError_t error = shim::not_captured(); error != cudaSuccess) return error;
    if (event->stream != nullptr) event->stream->wait_for(event->count);
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

// For the tests, through ctypes: how often the host waited for a stream since the last call.
EXPORTED int shim_waits() { return std::exchange(waits, 0); }
