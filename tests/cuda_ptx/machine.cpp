// Runs the blocks of a launch: a warp's lanes that are at the lowest place in the program go on together, a warp runs
// until it has to wait, a few blocks are there at once.
#include "machine.h"

#include <algorithm>
#include <cstdio>

namespace ptx {

bool counting = false;
uint64_t clock_now = 0;

std::string hexadecimal(uint64_t value) {
    char text[24];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

// ---- a warp ---------------------------------------------------------------------------------------------------------

void Warp::regroup() {
    for (int lane = 0; lane < LANES; ++lane)
        if (on >> lane & 1) lane_at[lane] = at;
    at = other = NOWHERE;
    for (int lane = 0; lane < LANES; ++lane)
        if ((live & ~waiting) >> lane & 1) at = std::min(at, lane_at[lane]);
    if (at == NOWHERE) {
        for (int lane = 0; lane < LANES; ++lane)
            if (live >> lane & 1) at = lane_at[lane];
        throw Fault("not every lane of a warp comes here");
    }
    on = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        if (!(live >> lane & 1)) continue;
        if (lane_at[lane] == at) on |= 1u << lane;
        else other = std::min(other, lane_at[lane]);
    }
    waiting &= ~on;
}

// Whether all lanes have come that an instruction needs; if not, those that have wait.
bool Warp::are_together(const Instruction& i, uint32_t lanes) {
    if (lanes != on) throw Fault("a condition that not all lanes share");
    uint32_t needed = ALL;
    if (i.has_mask) {
        const uint32_t* masks = reg<uint32_t>(i.from.back());
        needed = masks[__builtin_ctz(lanes)];
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1 && masks[lane] != needed) throw Fault("lanes name different masks");
        if (lanes & ~needed) throw Fault("a lane takes part whose mask leaves it out");
    }
    if ((needed & ~lanes) == 0) return true;
    if (needed & ~live) throw Fault("lanes have ended that should come here: " + hexadecimal(needed & ~live));
    waiting |= lanes;
    regroup();
    return false;
}

namespace {

// "mma.cuh:75, called from flash_forward.cu:88: "
std::string place_of(const Kernel& kernel, const Instruction& i) {
    if (i.place == NO_PLACE) return "";
    const std::string inlined = i.caller == i.place ? "" : ", called from " + kernel.places[i.caller];
    return kernel.places[i.place] + inlined + ": ";
}

}  // namespace

Stop Warp::run() {
    Kernel& kernel = *block->launch->kernel;
    Instruction* const code = kernel.code.data();
    try {
        for (;;) {
            if (at >= other) regroup();
            Instruction& i = code[at];
            if (i.waits) {
                i.met = true;
                if (i.skipped) {
                    ++at;
                    continue;
                }
            }
            uint32_t lanes = on;
            if (i.guarded) {
                const uint32_t guard = *reg<uint32_t>(i.guard);
                lanes &= i.guard_negated ? ~guard : guard;
            }
            if (counting && lanes) {
                Tally& tally = kernel.tallies[at];
                ++tally.warps;
                tally.lanes += static_cast<uint64_t>(__builtin_popcount(lanes));
            }
            switch (i.flow) {
                case Flow::NEXT:
                    if (lanes) {
                        if (i.together && !are_together(i, lanes)) continue;
                        i.step(*this, i, lanes);
                    }
                    ++at;
                    break;
                case Flow::BRANCH:
                    if (lanes == on) {
                        at = i.target;
                    } else if (lanes == 0) {
                        ++at;
                    } else {
                        on &= ~lanes;
                        ++at;
                        for (int lane = 0; lane < LANES; ++lane)
                            if (lanes >> lane & 1) lane_at[lane] = i.target;
                        regroup();
                    }
                    break;
                case Flow::RETURN:
                    if (lanes && !copies.empty()) throw Fault("a thread ends with copies that it did not wait for");
                    live &= ~lanes;
                    on &= ~lanes;
                    if (live == 0) return Stop::DONE;
                    ++at;
                    if (on == 0) regroup();
                    break;
                case Flow::BARRIER:
                    if (lanes == 0) {
                        ++at;
                        break;
                    }
                    if (lanes != on) throw Fault("a condition that not all lanes share");
                    if (lanes != live) {
                        waiting |= lanes;
                        regroup();
                        break;
                    }
                    if (lanes != all) throw Fault("some threads of the block have ended before this barrier");
                    ++at;
                    at_barrier = true;
                    return Stop::BARRIER;
                case Flow::PAUSE:
                    ++at;
                    return Stop::PAUSE;
            }
        }
    } catch (const Fault& fault) {
        const Instruction& i = code[std::min<size_t>(at, kernel.code.size() - 1)];
        throw Fault(place_of(kernel, i) + kernel.name + ": " + fault.what() +
                    "; block " + std::to_string(block->index[0]) + " " + std::to_string(block->index[1]) + ", warp " +
                    std::to_string(index) + ", PTX line " + std::to_string(i.line) + ": " + std::string(i.name));
    }
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t RESIDENT = 3;  // blocks that are there at once
constexpr int PATIENCE = 1000;  // rounds in which nobody does anything but to look again

void start(Block& block, Launch& launch, uint64_t number) {
    const Kernel& kernel = *launch.kernel;
    block.launch = &launch;
    block.number = static_cast<uint32_t>(number);
    block.seen.clear();
    block.index[0] = static_cast<uint32_t>(number % launch.grid[0]);
    block.index[1] = static_cast<uint32_t>(number / launch.grid[0] % launch.grid[1]);
    block.index[2] = static_cast<uint32_t>(number / launch.grid[0] / launch.grid[1]);
    block.shared.assign(launch.shared_bytes ? kernel.dynamic_start + launch.shared_bytes : kernel.static_shared, 0xff);
    block.cells.resize(block.shared.size() / CELL + 1);
    block.start = block.clock = ++clock_now;
    const uint32_t threads = launch.size[0] * launch.size[1] * launch.size[2];
    block.warps.resize((threads + LANES - 1) / LANES);
    for (size_t k = 0; k < block.warps.size(); ++k) {
        Warp& warp = block.warps[k];
        const uint32_t first = static_cast<uint32_t>(k) * LANES, count = std::min<uint32_t>(LANES, threads - first);
        warp.block = &block;
        warp.registers = kernel.image;
        warp.index = static_cast<int>(k);
        warp.all = warp.live = warp.on = count == LANES ? ALL : (1u << count) - 1;
        warp.waiting = warp.at = 0;
        warp.other = NOWHERE;
        warp.clock = block.clock;
        warp.at_barrier = false;
        warp.copies.clear();
        for (int special = 0; special < SPECIALS; ++special) {
            if (kernel.special[special] == 0) continue;
            for (uint32_t lane = 0; lane < LANES; ++lane) {
                const uint32_t thread = first + lane, *size = launch.size;
                const uint32_t values[SPECIALS] = {
                    thread % size[0], thread / size[0] % size[1], thread / (size[0] * size[1]),
                    block.index[0], block.index[1], block.index[2], size[0], size[1], size[2],
                    launch.grid[0], launch.grid[1], launch.grid[2], lane};
                warp.reg<uint32_t>(kernel.special[special])[lane] = values[special];
            }
        }
    }
}

// One turn of each warp of a block; whether one did more than to look whether it may go on.
bool turn(Block& block) {
    bool moved = false;
    const size_t count = block.warps.size();
    for (size_t k = 0; k < count; ++k) {
        Warp& warp = block.warps[shim::reversed ? count - 1 - k : k];
        if (warp.live == 0 || warp.at_barrier) continue;
        if (warp.run() != Stop::PAUSE) moved = true;
        const auto waits = [](const Warp& each) { return each.at_barrier; };
        if (std::all_of(block.warps.begin(), block.warps.end(), waits)) {
            block.clock = ++clock_now;
            for (Warp& each : block.warps) each.at_barrier = false, each.clock = block.clock;
        }
    }
    return moved;
}

bool is_done(const Block& block) {
    return std::all_of(block.warps.begin(), block.warps.end(), [](const Warp& warp) { return warp.live == 0; });
}

}  // namespace

void run(Launch& launch) {
    const uint64_t blocks = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
    std::vector<std::unique_ptr<Block>> resident, spare;
    launch.start = ++clock_now;
    uint64_t next = 0;
    for (int idle = 0; next < blocks || !resident.empty();) {
        while (resident.size() < RESIDENT && next < blocks) {
            if (spare.empty()) spare.push_back(std::make_unique<Block>());
            start(*spare.back(), launch, next++);
            resident.push_back(std::move(spare.back()));
            spare.pop_back();
        }
        bool moved = false;
        for (size_t k = 0; k < resident.size(); ++k)
            moved |= turn(*resident[shim::reversed ? resident.size() - 1 - k : k]);
        for (size_t k = resident.size(); k-- > 0;)
            if (is_done(*resident[k])) {
                spare.push_back(std::move(resident[k]));
                resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(k));
            }
        idle = moved ? 0 : idle + 1;
        if (idle == PATIENCE) {
            const auto& warps = resident.front()->warps;
            const bool barrier = std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.at_barrier; });
            const char* const why = barrier ? "not every thread of a block comes to a barrier" : "waits for ever";
            throw Fault(launch.kernel->name + ": " + why);
        }
    }
}

}  // namespace ptx
