// The state of a launch: blocks, warps, shared memory and what is known about each of its bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <unordered_set>

#include "../cuda_shim/shim.h"
#include "program.h"

namespace ptx {

// Two bytes of memory: who wrote and who read them last, and when by the clock of their warp. All clocks are drawn from
// one that never goes back: a barrier gives the block and its warps a new time, __syncwarp the warp.
struct Cell {
    uint64_t written = 0, read = 0;
    uint32_t writer_block = 0, reader_block = 0;
    uint16_t writer = 0, reader = 0;
    enum : uint8_t { NOBODY, ONE, WARP, SEVERAL, BLOCKS } readers = NOBODY;  // BLOCKS: several that nothing orders
    bool atomic = false, pending = false;  // pending: an asynchronous copy that was not waited for writes it
};

// What a block has done that another one may rely on: all before `until`, and what the thread did that said so. The
// other one may since its thread `seer` saw that, its other threads after a barrier that comes later than `since`.
struct Seen {
    uint64_t until;
    uint16_t sayer, seer;
    uint64_t since;
};

struct Copy {
    int lane;
    uint32_t to;
    uint64_t from;
    uint32_t bytes, valid;
};

struct Launch;

struct Block {
    Launch* launch;
    uint32_t index[3], number;
    std::map<uint32_t, Seen> seen;  // of other blocks, by their numbers
    std::vector<unsigned char> shared;
    std::vector<Cell> cells;
    uint64_t start = 0, clock = 0;
    std::vector<Warp> warps;
};

enum class Stop : uint8_t { DONE, BARRIER, PAUSE };

struct Warp {
    Block* block = nullptr;
    std::vector<unsigned char> registers;
    int index = 0;
    uint32_t all = 0, live = 0;          // lanes that there are, and that have not ended
    uint32_t on = 0, waiting = 0;        // lanes that run now, and that wait for others at `together`
    uint32_t at = 0, other = NOWHERE;    // where the lanes are that run now; the lowest place of the others
    uint32_t lane_at[LANES] = {};
    uint64_t clock = 0;
    bool at_barrier = false;
    std::vector<Copy> copies;            // started and not yet waited for

    template <class T>
    T* reg(uint32_t offset) {
        return reinterpret_cast<T*>(registers.data() + offset);
    }

    Stop run();

private:
    void regroup();
    bool are_together(const Instruction& instruction, uint32_t lanes);
};

// touched.cpp: throw where an access is not allowed; `bytes` is what one lane touches.
constexpr uint32_t CELL = 2;  // bytes
Cell* shared_cells(Block& block, uint32_t address, uint32_t bytes);  // checked as addresses only
void read_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes);
void write_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes, bool atomic = false);
void read_global(Warp& warp, int lane, uint64_t address, uint32_t bytes, bool atomic = false);
void write_global(Warp& warp, int lane, uint64_t address, uint32_t bytes, bool atomic = false);
void release(Warp& warp, int lane, uint64_t address);
void acquire(Warp& warp, int lane, uint64_t address);

struct Launch {
    Kernel* kernel;
    uint32_t grid[3], size[3];
    uint32_t shared_bytes;
    std::vector<unsigned char> parameters;
    std::unordered_set<uint64_t> sectors{};  // of global memory, where it is counted
    uint64_t start = 0;
    std::map<uint64_t, std::map<uint32_t, Seen>> released{};  // what stands behind a flag, by its address
};

extern bool counting;
extern uint64_t clock_now;

// Everything that a launch does; throws Fault.
void run(Launch& launch);

std::string hexadecimal(uint64_t value);

inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace ptx
