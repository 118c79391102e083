// Who touched which memory, and when: what is read that nobody wrote, and what nothing orders, is an error. What orders
// is told by clocks (machine.h). Called by memory.cpp.
#include <sys/mman.h>

#include "machine.h"

namespace ptx {
namespace {

const std::string NOTHING_ORDERS = " with nothing that orders them: ";

[[noreturn]] void race(const std::string& what, const std::string& where, int thread, uint32_t block, uint16_t other,
                       uint32_t other_block) {
    const std::string of = other_block == block ? "" : " of block " + std::to_string(other_block);
    throw Fault(what + NOTHING_ORDERS + where + ", thread " + std::to_string(other) + of +
                " and thread " + std::to_string(thread));
}

// Whether what a thread did at that time of its warp comes before what this one does now.
bool ordered(const Warp& warp, int thread, uint32_t other_block, uint16_t other, uint64_t then) {
    const Block& block = *warp.block;
    if (other_block != block.number) {
        const auto found = block.seen.find(other_block);
        if (found == block.seen.end()) return false;
        const Seen& seen = found->second;
        return (then < seen.until || other == seen.sayer) && (thread == seen.seer || block.clock > seen.since);
    }
    if (other / LANES != thread / LANES) return block.clock > then;
    return other == thread || warp.clock > then;
}

// A read or a write of cells, of which nothing counts that is older than `start`.
template <class Where>
void note_read(Warp& warp, int thread, Cell* cell, uint32_t count, uint64_t start, bool atomic, Where where) {
    const Block& block = *warp.block;
    for (Cell* const end = cell + count; cell < end; ++cell) {
        if (cell->written >= start && !(atomic && cell->atomic) &&
            !ordered(warp, thread, cell->writer_block, cell->writer, cell->written))
            race("a write and a read", where(), thread, block.number, cell->writer, cell->writer_block);
        if (atomic) continue;  // two of these never meet by accident
        if (cell->readers == Cell::NOBODY || cell->read < start)
            cell->readers = Cell::ONE;
        else if (cell->readers == Cell::BLOCKS)
            ;  // until it is written
        else if (cell->reader_block != block.number)
            cell->readers =
                ordered(warp, thread, cell->reader_block, cell->reader, cell->read) ? Cell::ONE : Cell::BLOCKS;
        else if (cell->read < block.clock)
            cell->readers = Cell::ONE;
        else if (cell->reader / LANES != thread / LANES)
            cell->readers = Cell::SEVERAL;
        else if (cell->reader != thread && cell->readers == Cell::ONE && cell->read >= warp.clock)
            cell->readers = Cell::WARP;
        else if (cell->readers == Cell::WARP && cell->read < warp.clock)
            cell->readers = Cell::ONE;
        cell->reader = static_cast<uint16_t>(thread);
        cell->reader_block = block.number;
        cell->read = warp.clock;
    }
}

template <class Where>
void note_write(Warp& warp, int thread, Cell* cell, uint32_t count, uint64_t start, bool atomic, Where where) {
    const Block& block = *warp.block;
    for (Cell* const end = cell + count; cell < end; ++cell) {
        if (cell->written >= start && !(atomic && cell->atomic) &&
            !ordered(warp, thread, cell->writer_block, cell->writer, cell->written))
            race("two writes", where(), thread, block.number, cell->writer, cell->writer_block);
        if (cell->readers != Cell::NOBODY && cell->read >= start && !(atomic && cell->atomic)) {
            if (cell->readers == Cell::BLOCKS)
                throw Fault("reads of several blocks and a write" + NOTHING_ORDERS + where());
            const bool same_warp = cell->reader_block == block.number && cell->reader / LANES == thread / LANES;
            bool before = ordered(warp, thread, cell->reader_block, cell->reader, cell->read);
            if (same_warp && cell->readers == Cell::WARP) before = warp.clock > cell->read;
            if (same_warp && cell->readers == Cell::SEVERAL) before = block.clock > cell->read;
            if (!before) race("a read and a write", where(), thread, block.number, cell->reader, cell->reader_block);
        }
        cell->writer = static_cast<uint16_t>(thread);
        cell->writer_block = block.number;
        cell->written = warp.clock;
        cell->atomic = atomic;
        cell->readers = Cell::NOBODY;
    }
}

// ---- global memory: cells for each allocation -----------------------------------------------------------------------

// The cells of an allocation, made when it is first touched.
struct Shadow {
    uint64_t start = 0, end = 0;
    Cell* cells = nullptr;
    size_t bytes() const { return (end - start + CELL) / CELL * sizeof(Cell); }
    ~Shadow() {
        if (cells) munmap(cells, bytes());
    }
};

Shadow& shadow_of(uint64_t address) {
    static std::map<uint64_t, Shadow> shadows;  // by the start of the allocation
    static Shadow* last = nullptr;
    static uint64_t known_changes = 0;
    if (known_changes != shim::allocations_changed) {
        for (auto each = shadows.begin(); each != shadows.end();) {
            const auto [start, end] = shim::allocation_at(each->first);
            const bool stays = start == each->second.start && end == each->second.end;
            each = stays ? std::next(each) : shadows.erase(each);
        }
        last = nullptr;
        known_changes = shim::allocations_changed;
    }
    if (last && address >= last->start && address < last->end) return *last;
    const auto [start, end] = shim::allocation_at(address);
    last = &shadows[start];
    if (last->cells == nullptr && end != 0) {
        last->start = start, last->end = end;
        void* cells = mmap(nullptr, last->bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
        if (cells == MAP_FAILED) throw Fault("no memory left to follow that of the device");
        last->cells = static_cast<Cell*>(cells);
    }
    return *last;
}

std::string place_in_global(uint64_t address) { return "address " + hexadecimal(address); }
std::string place_in_shared(uint32_t address) { return "shared address " + std::to_string(address); }

// A single byte is followed as the cell that it lies in.
uint32_t cells_of(uint32_t bytes) { return (bytes + CELL - 1) / CELL; }

Cell* global_cells(uint64_t address, uint32_t bytes) {
    if (address % bytes) throw Fault(place_in_global(address) + " is no multiple of " + std::to_string(bytes));
    const Shadow& shadow = shadow_of(address);
    if (shadow.cells == nullptr || address + bytes > shadow.end)
        throw Fault(place_in_global(address) + " is outside of all memory of the device");
    return shadow.cells + (address - shadow.start) / CELL;
}

}  // namespace

Cell* shared_cells(Block& block, uint32_t address, uint32_t bytes) {
    if (address % bytes) throw Fault(place_in_shared(address) + " is no multiple of " + std::to_string(bytes));
    const size_t there = block.shared.size();
    if (address + uint64_t{bytes} > there)
        throw Fault(place_in_shared(address) + " is outside the block's " + std::to_string(there) + " bytes");
    if (bytes < CELL) throw Fault("single bytes of shared memory are not followed");
    Cell* const cells = &block.cells[address / CELL];
    for (uint32_t i = 0; i < bytes / CELL; ++i)
        if (cells[i].pending)
            throw Fault("an asynchronous copy to " + place_in_shared(address) + " was not waited for");
    return cells;
}

void read_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes) {
    Cell* const cells = shared_cells(*warp.block, address, bytes);
    for (uint32_t i = 0; i < bytes / CELL; ++i)
        if (cells[i].written < warp.block->start)
            throw Fault("nobody wrote what is read at " + place_in_shared(address));
    note_read(warp, warp.index * LANES + lane, cells, bytes / CELL, warp.block->start, false,
              [&] { return place_in_shared(address); });
}

void write_shared(Warp& warp, int lane, uint32_t address, uint32_t bytes, bool atomic) {
    note_write(warp, warp.index * LANES + lane, shared_cells(*warp.block, address, bytes), bytes / CELL,
               warp.block->start, atomic, [&] { return place_in_shared(address); });
}

void read_global(Warp& warp, int lane, uint64_t address, uint32_t bytes, bool atomic) {
    note_read(warp, warp.index * LANES + lane, global_cells(address, bytes), cells_of(bytes),
              warp.block->launch->start, atomic, [&] { return place_in_global(address); });
}

void write_global(Warp& warp, int lane, uint64_t address, uint32_t bytes, bool atomic) {
    note_write(warp, warp.index * LANES + lane, global_cells(address, bytes), cells_of(bytes),
               warp.block->launch->start, atomic, [&] { return place_in_global(address); });
}

// st.release: whoever sees this flag may rely on what the block did before its last barrier, and on what it relies on
// itself.
void release(Warp& warp, int lane, uint64_t address) {
    const Block& block = *warp.block;
    const auto thread = static_cast<uint16_t>(warp.index * LANES + lane);
    auto& said = block.launch->released[address];
    said.clear();
    for (const auto& [other, seen] : block.seen)
        if (thread == seen.seer || block.clock > seen.since) said[other] = seen;
    said[block.number] = {block.clock, thread, 0, 0};
}

void acquire(Warp& warp, int lane, uint64_t address) {
    const auto found = warp.block->launch->released.find(address);
    if (found == warp.block->launch->released.end()) return;
    const auto thread = static_cast<uint16_t>(warp.index * LANES + lane);
    for (const auto& [other, said] : found->second) {
        const auto [known, is_new] = warp.block->seen.try_emplace(other);
        if (is_new || known->second.until < said.until) known->second = {said.until, said.sayer, thread, warp.clock};
    }
}

}  // namespace ptx
