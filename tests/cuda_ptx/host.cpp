// What nvcc's host code calls: kernels are registered when the extension is loaded and launched through here; the rest
// of CUDA's runtime is ../cuda_shim/runtime.cpp and streams.cpp.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>

#include "machine.h"

namespace shim {

bool reversed = false;
const char* const device_name = "no GPU: its kernels' PTX on the CPU";

}  // namespace shim

namespace {

struct Module {
    std::string_view text;
    std::map<std::string, ptx::Kernel> kernels;
    bool parsed = false;
};

struct Function {
    Module* module;
    std::string name;
    size_t shared_limit = shim::UNASKED_SHARED;

    ptx::Kernel& kernel() {
        if (!module->parsed) {
            module->kernels = ptx::parse(module->text);
            module->parsed = true;
        }
        return module->kernels.at(name);
    }
};

std::map<const void*, Function>& functions() {
    static auto& all = *new std::map<const void*, Function>;
    return all;
}

// The kernel that the host knows by this address.
cudaError_t find(const void* host, Function** function) {
    const auto found = functions().find(host);
    if (found == functions().end()) return shim::last_error = cudaErrorInvalidDeviceFunction;
    *function = &found->second;
    return cudaSuccess;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local Configuration configuration;

using shim::failed;

std::string site_of(const ptx::Kernel& kernel, const ptx::Instruction& i) {
    return kernel.places[i.flow == ptx::Flow::BARRIER ? i.place : i.caller];
}

cudaError_t launch(Function& function, dim3 grid, dim3 block, size_t shared,
                   const std::vector<unsigned char>& parameters) {
    if (const cudaError_t error = shim::begin_launch(grid, block)) return error;
    const unsigned threads = block.x * block.y * block.z;
    try {
        ptx::Kernel& kernel = function.kernel();
        if (threads > kernel.max_threads)
            return failed(cudaErrorInvalidValue, kernel.name + ": more threads than its __launch_bounds__");
        if (shared > function.shared_limit)
            return failed(cudaErrorInvalidValue, "more dynamic shared memory than the kernel was allowed");
        const bool unasked = function.shared_limit == shim::UNASKED_SHARED;
        if (kernel.dynamic_start + shared > (unasked ? shim::UNASKED_SHARED : shim::MAX_SHARED))
            return failed(cudaErrorInvalidValue, "more shared memory, static and dynamic, than a block may have");
        ptx::Launch launch{&kernel, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                           static_cast<uint32_t>(shared), parameters};
        ++kernel.launches;
        ptx::run(launch);
        kernel.unique_sectors += launch.sectors.size();
    } catch (const ptx::Fault& fault) {
        return failed(cudaErrorLaunchFailure, fault.what());
    }
    return cudaSuccess;
}

}  // namespace

// ---- what nvcc's code calls -----------------------------------------------------------------------------------------

extern "C" {

// The wrapper of fatbinary_section.h; behind it a header of 16 bytes and the entries, of which the first holds PTX,
// kept as text by --no-compress.
void** __cudaRegisterFatBinary(void* wrapper) {
    const unsigned char* data;
    std::memcpy(&data, static_cast<unsigned char*>(wrapper) + 8, sizeof data);
    const unsigned char* const entry = data + 16;
    uint32_t header;
    uint64_t bytes;
    std::memcpy(&header, entry + 4, sizeof header);
    std::memcpy(&bytes, entry + 8, sizeof bytes);
    auto* module = new Module;
    module->text = {reinterpret_cast<const char*>(entry + header), bytes};
    return reinterpret_cast<void**>(module);
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
    functions()[host] = {reinterpret_cast<Module*>(module), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    std::memcpy(stream, &configuration.stream, sizeof configuration.stream);
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    Function* function;
    if (const cudaError_t error = find(host, &function)) return error;
    *kernel = reinterpret_cast<cudaKernel_t>(function);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    auto& function = *reinterpret_cast<Function*>(kernel);
    std::vector<unsigned char> parameters;
    try {
        const ptx::Kernel& parsed = function.kernel();
        parameters.resize(parsed.parameter_bytes);
        for (size_t i = 0; i < parsed.parameters.size(); ++i)
            std::memcpy(&parameters[parsed.parameters[i].offset], arguments[i], parsed.parameters[i].bytes);
    } catch (const std::exception& error) {
        return failed(cudaErrorLaunchFailure, error.what());
    }
    return shim::perform(stream, [=, &function] { return launch(function, grid, block, shared, parameters); });
}

}  // extern "C"

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
    *attributes = {};
    Function* function;
    return find(host, &function);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    Function* function;
    if (const cudaError_t error = find(host, &function)) return error;
    const bool fits = value >= 0 && static_cast<size_t>(value) <= shim::MAX_SHARED;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || !fits)
        return shim::last_error = cudaErrorInvalidValue;
    function->shared_limit = static_cast<size_t>(value);
    return cudaSuccess;
}

// ---- for the tests, through ctypes ----------------------------------------------------------------------------------

// The barriers and waits for copies met since the last call, "file:line" one a line; then forgets them. A wait for
// copies is where the function is called that holds the instruction.
EXPORTED int shim_barriers(char* text, int size) {
    std::set<std::string> met;
    for (auto& [host, function] : functions()) {
        if (!function.module->parsed) continue;
        ptx::Kernel& kernel = function.kernel();
        for (ptx::Instruction& i : kernel.code)
            if (std::exchange(i.met, false)) met.insert(site_of(kernel, i));
    }
    std::string all;
    for (const std::string& site : met) all += site + "\n";
    std::snprintf(text, static_cast<size_t>(size), "%s", all.c_str());
    return static_cast<int>(all.size());
}

// From now on no thread waits at the barrier, or for the copies, of this line; line 0 brings it back.
EXPORTED void shim_skip_barrier(const char* file, int line) {
    const std::string site = file + (":" + std::to_string(line));
    for (auto& [host, function] : functions()) {
        ptx::Kernel& kernel = function.kernel();
        for (ptx::Instruction& i : kernel.code) i.skipped = i.waits && site_of(kernel, i) == site;
    }
}

EXPORTED void shim_reverse(int reversed) { shim::reversed = reversed != 0; }

// Whether launches are counted from now on; what was counted is forgotten.
EXPORTED void ptx_count(int on) {
    ptx::counting = on != 0;
    for (auto& [host, function] : functions())
        if (function.module->parsed) {
            ptx::Kernel& kernel = function.kernel();
            std::fill(kernel.tallies.begin(), kernel.tallies.end(), ptx::Tally{});
            kernel.launches = kernel.unique_sectors = 0;
        }
}

// What was counted, a line for each instruction that ran: kernel, its launches, its unique sectors, instruction, place,
// warps, lanes, wavefronts, ideal, sectors, bytes; with tabs. Returns the length of it all.
EXPORTED size_t ptx_counts(char* text, size_t size) {
    std::string all;
    for (auto& [host, function] : functions()) {
        if (!function.module->parsed) continue;
        const ptx::Kernel& kernel = function.kernel();
        for (size_t k = 0; k < kernel.code.size(); ++k) {
            const ptx::Tally& tally = kernel.tallies[k];
            if (tally.warps == 0) continue;
            const ptx::Instruction& i = kernel.code[k];
            const bool is_cudas = i.place != ptx::NO_PLACE && kernel.places[i.place].find(".hpp:") != std::string::npos;
            const uint32_t place = is_cudas ? i.caller : i.place;
            std::ostringstream line;
            line << kernel.name << '\t' << kernel.launches << '\t' << kernel.unique_sectors << '\t' << i.name << '\t'
                 << (place == ptx::NO_PLACE ? "" : kernel.places[place]) << '\t' << tally.warps << '\t' << tally.lanes
                 << '\t' << tally.wavefronts << '\t' << tally.ideal << '\t' << tally.sectors << '\t' << tally.bytes
                 << '\n';
            all += line.str();
        }
    }
    if (size > 0) {
        const size_t copied = std::min(all.size(), size - 1);
        std::memcpy(text, all.data(), copied);
        text[copied] = 0;
    }
    return all.size();
}
