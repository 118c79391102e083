// The scheduler of cuda_runtime.h: a block's threads as fibers of one thread of the host.
#include "cuda_runtime.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

Thread* self = nullptr;
uint64_t block_count = 0;
bool reversed = false;
const char* const device_name = "no GPU: its kernels as plain C++";

namespace {

constexpr size_t STACK_BYTES = 128 << 10;

// ---- switching between fibers ----------------------------------------------------------------------------------------

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; what a function must preserve lies on the stack

extern "C" void shim_switch(void** from, void* to);
asm(R"(
.text
.type shim_switch, @function
.hidden shim_switch
.globl shim_switch
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");

void prepare(Context& context, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
    *--top = nullptr;  // where entry would return to; it never does. The stack is aligned as after a call.
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context = top;
}

void switch_context(Context& from, Context& to) { shim_switch(&from, to); }
#else
using Context = ucontext_t;

void prepare(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// ---- the threads of a block ------------------------------------------------------------------------------------------

// Lanes that exchange values: complete when all lanes of the mask have come. There are two sets of values, because a
// fast lane can be one exchange ahead of a slow one, never two.
struct Group {
    unsigned mask = 0, arrived = 0;
    uint64_t generation = 0;
    uint64_t values[2][32];
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool valid;
};

struct Fiber : Thread {
    Context context{};
    char* stack = nullptr;
    bool done = false;
    int index = 0;
    const uint64_t* counter = nullptr;  // waits until this differs from `seen`
    uint64_t seen = 0;
    std::vector<Copy> copies;           // started and not yet waited for
    void* fake_stack = nullptr;

    bool ready() const { return !done && (counter == nullptr || *counter != seen); }
};

struct Block {
    int threads = 0, arrived = 0, alive = 0;
    uint64_t generation = 0;
    const char* barrier_file = nullptr;
    int barrier_line = 0;
    const char* wait_file = nullptr;
    int wait_line = 0;
    std::vector<std::vector<Group>> groups;  // by warp
    std::vector<char> shared;
    size_t declared = 0;  // bytes of shared memory that the kernel declares itself, as far as it was met
    Body body = nullptr;
    void* arguments = nullptr;
};

std::vector<Fiber> fibers;
Block block;
Fiber* current = nullptr;
Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;
#endif

struct Site {
    std::string file;
    int line;
    bool operator<(const Site& other) const { return std::tie(file, line) < std::tie(other.file, other.line); }
};
std::set<Site> sites;    // the barriers and waits for copies that were met
Site skipped{"", 0};     // the one that is left out

// The next fiber that has something to do: of the same warp, else of the warps that follow; null where none has. So a warp
// runs as far ahead of the others as barriers let it, and what should have been kept from it goes wrong.
Fiber* next_ready() {
    const int n = block.threads, warps = (n + 31) / 32;
    const int start = current ? current->index : reversed ? n - 1 : 0;
    for (int w = 0; w < warps; ++w) {
        const int warp = ((reversed ? -w : w) + start / 32 + warps) % warps;
        for (int i = 0; i < 32; ++i) {
            const int index = warp * 32 + ((reversed ? -i : i) + start + 64) % 32;
            if (index < n && fibers[index].ready()) return &fibers[index];
        }
    }
    return nullptr;
}

// Goes on with a fiber, or with the scheduler, until something comes back to `from`; a `last` switch never does.
// AddressSanitizer has to know which stack is in use.
void go(Fiber* from, Fiber* to, [[maybe_unused]] bool last = false) {
    if (to != nullptr) {
        to->counter = nullptr;
        current = to;
        self = to;
    }
#if defined(__SANITIZE_ADDRESS__)
    void*& fake = from ? from->fake_stack : scheduler_fake_stack;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, to ? to->stack : scheduler_stack,
                                   to ? STACK_BYTES : scheduler_stack_bytes);
#endif
    switch_context(from ? from->context : scheduler, to ? to->context : scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Lets others run until *counter is no longer `seen`; for ever if nobody can change it, and then the launch fails.
void wait(const uint64_t* counter, uint64_t seen) {
    Fiber* const me = current;
    me->counter = counter;
    me->seen = seen;
    Fiber* next = next_ready();
    if (next == me)
        me->counter = nullptr;
    else
        go(me, next);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    block.body(block.arguments);
    Fiber* const me = current;
    me->done = true;
    --block.alive;
    go(me, next_ready(), true);
    std::abort();
}

const char* base_name(const char* file) {
    const char* slash = std::strrchr(file, '/');
    return slash ? slash + 1 : file;
}

std::unordered_map<const void*, int>& shared_limits() {
    static auto& limits = *new std::unordered_map<const void*, int>;
    return limits;
}

}  // namespace

int lane() { return current->index % 32; }

void* dynamic_shared() {
    const uintptr_t start = reinterpret_cast<uintptr_t>(block.shared.data());
    return block.shared.data() + (128 - start % 128) % 128;
}

void declare_shared(size_t bytes) { block.declared += bytes; }

void copy_ahead(void* to, const void* from, size_t bytes, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
        stuck("an asynchronous copy is not aligned");
    poison(to, bytes);
    current->copies.push_back({to, from, bytes, valid});
}

void wait_for_copies(const char* file, int line) {
    const char* name = base_name(file);
    if (block.wait_file != file || block.wait_line != line) {
        block.wait_file = file;
        block.wait_line = line;
        sites.insert({name, line});
    }
    if (skipped.line == line && skipped.file == name) return;
    for (const Copy& each : current->copies)
        if (each.valid)
            std::memcpy(each.to, each.from, each.bytes);
        else
            std::memset(each.to, 0, each.bytes);
    current->copies.clear();
}

void stuck(const char* why) {
    error_text = why;
    static const uint64_t never = 0;
    for (;;) wait(&never, 0);
}

void barrier(const char* file, int line) {
    const char* name = base_name(file);
    if (block.barrier_file != file || block.barrier_line != line) {
        if (block.arrived != 0) {
            error_text = "threads of one block wait at different barriers, one of them " + std::string(name) + ":" +
                         std::to_string(line);
            block.arrived = -(1 << 20);
        }
        block.barrier_file = file;
        block.barrier_line = line;
        sites.insert({name, line});
    }
    if (skipped.line == line && skipped.file == name) return;
    const uint64_t seen = block.generation;
    if (++block.arrived == block.threads) {
        block.arrived = 0;
        ++block.generation;
        return;
    }
    wait(&block.generation, seen);
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
    const int index = current->index, at = index % 32;
    std::vector<Group>& groups = block.groups[index / 32];
    Group* group = nullptr;
    for (Group& each : groups)
        if (each.mask == mask) group = &each;
    if (group == nullptr) {
        groups.emplace_back();
        group = &groups.back();
        group->mask = mask;
        poison(group->values, sizeof group->values);
    }
    if (!(mask >> at & 1)) stuck("a lane takes part in a shuffle whose mask leaves it out");
    const uint64_t generation = group->generation;
    uint64_t* values = group->values[generation % 2];
    values[at] = value;
    group->arrived |= 1u << at;
    if (group->arrived == mask) {
        group->arrived = 0;
        ++group->generation;
        return values;
    }
    wait(&group->generation, generation);
    return values;
}

cudaError_t run(const void* kernel, dim3 grid, dim3 size, size_t shared, Body body, void* arguments) {
    if (const cudaError_t error = begin_launch(grid, size)) return error;
    const unsigned threads = size.x * size.y * size.z;
    const auto asked = shared_limits().find(kernel);
    const bool unasked = asked == shared_limits().end();
    if (shared > (unasked ? UNASKED_SHARED : static_cast<size_t>(asked->second)))
        return failed(cudaErrorInvalidValue, "more dynamic shared memory than the kernel was allowed");
    while (fibers.size() < threads) {
        fibers.emplace_back();
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) std::abort();
        fibers.back().stack = static_cast<char*>(stack);
    }
#if defined(__SANITIZE_ADDRESS__)
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &scheduler_stack_bytes);
    pthread_attr_destroy(&attributes);
    scheduler_stack = stack;
#endif
    block.threads = static_cast<int>(threads);
    block.body = body;
    block.arguments = arguments;
    block.shared.resize(shared + 128);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                ++block_count;
                if (shared) poison(block.shared.data(), block.shared.size());
                block.alive = block.threads;
                block.arrived = 0;
                block.declared = 0;
                block.barrier_file = block.wait_file = nullptr;
                block.groups.assign((threads + 31) / 32, {});
                for (auto& groups : block.groups) groups.reserve(32);
                for (int i = 0; i < block.threads; ++i) {
                    Fiber& fiber = fibers[i];
                    fiber.index = i;
                    fiber.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
                    fiber.block = {x, y, z};
                    fiber.block_size = size;
                    fiber.grid_size = grid;
                    fiber.done = false;
                    fiber.counter = nullptr;
                    fiber.copies.clear();
                    prepare(fiber.context, fiber.stack, fiber_main);
                }
                error_text.clear();
                current = nullptr;
                go(nullptr, next_ready());
                self = nullptr;
                current = nullptr;
                if (block.alive != 0) {
                    std::string text = error_text;
                    if (text.empty())
                        text = block.arrived ? "not every thread of a block comes to a barrier"
                                             : "not every lane of a mask comes to a shuffle";
                    return failed(cudaErrorLaunchFailure, text);
                }
                if (shared + block.declared > (unasked ? UNASKED_SHARED : MAX_SHARED))
                    return failed(cudaErrorInvalidValue, "more shared memory, static and dynamic, than a block may have");
            }
    return cudaSuccess;
}

}  // namespace shim

// ---- the runtime's functions of kernels ------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || static_cast<size_t>(value) > shim::MAX_SHARED) return shim::last_error = cudaErrorInvalidValue;
    shim::shared_limits()[kernel] = value;
    return cudaSuccess;
}

// ---- for the tests, through ctypes -----------------------------------------------------------------------------------

// The barriers and waits for copies met since the last call, "file:line" one a line; then forgets them.
EXPORTED int shim_barriers(char* text, int size) {
    std::string all;
    for (const auto& site : shim::sites) all += site.file + ":" + std::to_string(site.line) + "\n";
    std::snprintf(text, static_cast<size_t>(size), "%s", all.c_str());
    shim::sites.clear();
    return static_cast<int>(all.size());
}

// From now on no thread waits at the barrier, or for the copies, of this line; line 0 brings it back.
EXPORTED void shim_skip_barrier(const char* file, int line) { shim::skipped = {file, line}; }

EXPORTED void shim_reverse(int reversed) { shim::reversed = reversed != 0; }
