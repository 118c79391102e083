// The state of a launch: blocks, warps, shared memory and what is known about each of its bytes.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <unordered_set>

#include "../cuda_shim/shim.h"
#include "program.h"

namespace ptx {

// Two bytes of shared memory: who wrote and who read them last. Clocks are the block's, which its barriers advance, and
// the warp's, which __syncwarp advances too; they never go back, so what a block before this one did is older than it.
struct Cell {
    uint64_t written = 0, written_in_warp = 0, read = 0, read_in_warp = 0;
    uint16_t writer = 0, reader = 0;
    enum : uint8_t { NOBODY, ONE, WARP, SEVERAL } readers = NOBODY;
    bool atomic = false, pending = false;  // pending: an asynchronous copy that was not waited for writes it
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
    uint32_t index[3];
    std::vector<unsigned char> shared;
    std::vector<Cell> cells;
    uint64_t start = 0, clock = 0;
    std::vector<Warp> warps;
};

enum class Stop : uint8_t { DONE, BARRIER, PAUSE };

struct Warp {
    Block* block = nullptr;
    const Kernel* kernel = nullptr;
    std::vector<unsigned char> registers;
    int index = 0;
    uint32_t all = 0, live = 0;          // lanes that there are, and that have not ended
    uint32_t on = 0, waiting = 0;        // lanes that run now, and that wait for others at `together`
    uint32_t at = 0, other = 0;          // where the lanes are that run now; the lowest place of the others
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

struct Launch {
    Kernel* kernel;
    uint32_t grid[3], size[3];
    uint32_t shared_bytes;
    std::vector<unsigned char> parameters;
    std::unordered_set<uint64_t> sectors;  // of global memory, where it is counted
};

extern bool counting;
extern uint64_t clock_now;

// Everything that a launch does; throws Fault.
void run(Launch& launch);

std::string hexadecimal(uint64_t value);

}  // namespace ptx
