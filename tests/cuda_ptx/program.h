// A kernel's PTX as the machine runs it: instructions with their operands found. Made by parser.cpp, run by
// machine.cpp; what one instruction does is a Step of arithmetic.cpp or memory.cpp.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffffu;
constexpr uint32_t NO_PLACE = 0xffffffffu;                // in the source
constexpr uint32_t NOWHERE = 0xffffffffu;                 // in the program: behind every instruction
constexpr uint64_t SHARED_WINDOW = uint64_t{0x7f} << 48;  // where shared memory lies among generic addresses

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Step = void (*)(Warp&, const Instruction&, uint32_t lanes);

enum class Flow : uint8_t { NEXT, BRANCH, RETURN, BARRIER, PAUSE };
enum class Space : uint8_t { NONE, GLOBAL, SHARED, PARAM };

// Registers are numbers of bytes into a warp's registers, where 32 lanes lie side by side; a predicate is one word.
// Immediates are registers that nobody writes.
struct Instruction {
    Step step = nullptr;
    Flow flow = Flow::NEXT;
    Space space = Space::NONE;
    bool guarded = false, guard_negated = false;
    bool together = false;        // needs the lanes of a mask, or all, at once
    bool has_mask = false;        // the mask is the last of `from`
    bool is_signed = false;       // a load extends the sign
    bool orders = false;          // a store that releases, a load that acquires
    uint8_t width = 0, count = 1;  // of memory: bytes of an element, elements
    uint8_t register_width = 0;   // bytes of each register that is loaded or stored
    uint8_t address_width = 0;
    uint8_t mode = 0;             // of shfl
    uint32_t guard = 0;
    std::vector<uint32_t> to, from;
    uint32_t address = 0;         // register
    int64_t offset = 0;           // added to it
    uint32_t target = 0;          // index of the instruction that is gone to
    uint32_t line = 0;            // in the PTX
    uint32_t place = NO_PLACE;    // in Kernel::places
    uint32_t caller = NO_PLACE;   // where what is at `place` was inlined
    bool waits = false;           // a barrier, or a wait for copies: may be left out by tests
    bool met = false, skipped = false;
    std::string_view name;
};

struct Parameter {
    uint32_t offset, bytes;
};

// What one instruction did in all launches since the counts were last asked for.
struct Tally {
    uint64_t warps = 0, lanes = 0, wavefronts = 0, ideal = 0, sectors = 0, bytes = 0;
};

enum Special {
    TID_X, TID_Y, TID_Z, CTAID_X, CTAID_Y, CTAID_Z, NTID_X, NTID_Y, NTID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, LANEID,
    SPECIALS  // how many there are
};

struct Kernel {
    std::string name;                         // as it is in the source
    std::vector<Instruction> code;
    std::vector<std::string> places;          // "gelu.cu:34"
    std::vector<Parameter> parameters;
    uint32_t parameter_bytes = 0;
    std::vector<unsigned char> image;         // a warp's registers before it starts
    uint32_t special[SPECIALS] = {};          // registers, 0 where not used
    uint32_t static_shared = 0, dynamic_start = 0;
    uint32_t max_threads = 1024;
    std::vector<Tally> tallies;               // by instruction
    uint64_t launches = 0, unique_sectors = 0;
};

// What is known of the instructions of arithmetic.cpp, by their names.
struct Known {
    Step step;
    int results;                  // the first operands that are written
    std::vector<uint8_t> widths;  // bytes of each operand; 1 is a predicate
};
const std::map<std::string_view, Known>& arithmetic();
void move_parts(Warp& warp, const Instruction& instruction, uint32_t lanes);  // of mov with {}

// Gives any other instruction its step and its flags by its name; throws where the machine does not know it.
void find_memory_step(Instruction& instruction);

// The kernels of a module, by the names that the host knows them by.
std::map<std::string, Kernel> parse(std::string_view text);

}  // namespace ptx
