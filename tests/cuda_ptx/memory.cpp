// What the instructions do that touch memory, or that a warp does together, and what is counted of it. Who touched what
// is followed by touched.cpp.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

// ---- what is counted ------------------------------------------------------------------------------------------------

// The passes in which a warp's addresses are served: 128 bytes each, a bank of 4 bytes one word at a time.
void count_banks(Tally& tally, const uint64_t* at, uint32_t lanes, uint32_t bytes) {
    const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    for (int first = 0; first < LANES; first += together) {
        uint32_t words[32][32];
        int used[32] = {}, most = 0;
        for (int lane = first; lane < first + together; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            const auto start = static_cast<uint32_t>(at[lane]);
            for (uint32_t word = start / 4; word <= (start + bytes - 1) / 4; ++word) {
                uint32_t* mine = words[word % 32];
                int& count = used[word % 32];
                if (std::find(mine, mine + count, word) == mine + count) mine[count++] = word;
                most = std::max(most, count);
            }
        }
        tally.wavefronts += static_cast<uint64_t>(most);
        tally.ideal += most > 0;
    }
}

void count_sectors(Launch& launch, Tally& tally, const uint64_t* at, uint32_t lanes, uint32_t bytes) {
    uint64_t seen[64];
    int count = 0;
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            const uint64_t sector = at[lane] / 32;
            if (std::find(seen, seen + count, sector) == seen + count) seen[count++] = sector;
            tally.bytes += bytes;
        }
    tally.sectors += static_cast<uint64_t>(count);
    launch.sectors.insert(seen, seen + count);
}

Tally& tally_of(Warp& w, const Instruction& i) {
    Kernel& kernel = *w.block->launch->kernel;
    return kernel.tallies[static_cast<size_t>(&i - kernel.code.data())];
}

void count_access(Warp& w, const Instruction& i, const uint64_t* at, uint32_t lanes, uint32_t bytes) {
    if (!counting) return;
    if (i.space == Space::SHARED) count_banks(tally_of(w, i), at, lanes, bytes);
    else count_sectors(*w.block->launch, tally_of(w, i), at, lanes, bytes);
}

// ---- loads and stores -----------------------------------------------------------------------------------------------

void addresses(Warp& w, const Instruction& i, uint64_t* at) {
    if (i.address_width == 4)
        for (int lane = 0; lane < LANES; ++lane)
            at[lane] = static_cast<uint32_t>(w.reg<uint32_t>(i.address)[lane] + static_cast<uint32_t>(i.offset));
    else
        for (int lane = 0; lane < LANES; ++lane)
            at[lane] = w.reg<uint64_t>(i.address)[lane] + static_cast<uint64_t>(i.offset);
}

unsigned char* of_shared(Warp& w, uint64_t address) { return w.block->shared.data() + address; }

unsigned char* host_place(Warp& w, const Instruction& i, uint64_t address) {
    return i.space == Space::SHARED ? of_shared(w, address) : reinterpret_cast<unsigned char*>(address);
}

template <class Register, class Memory>
void fill(Warp& w, const Instruction& i, uint32_t lanes, unsigned char* const* from) {
    for (size_t element = 0; element < i.to.size(); ++element) {
        Register* to = w.reg<Register>(i.to[element]);
        for (int lane = 0; lane < LANES; ++lane)
            if (lanes >> lane & 1) {
                Memory value;
                std::memcpy(&value, from[lane] + element * sizeof value, sizeof value);
                to[lane] = static_cast<Register>(value);
            }
    }
}

void fill_any(Warp& w, const Instruction& i, uint32_t lanes, unsigned char* const* from) {
    const int kind = i.register_width * 100 + i.width * 10 + i.is_signed;
    switch (kind) {
        case 440: case 441: return fill<uint32_t, uint32_t>(w, i, lanes, from);
        case 880: case 881: return fill<uint64_t, uint64_t>(w, i, lanes, from);
        case 220: case 221: return fill<uint16_t, uint16_t>(w, i, lanes, from);
        case 210: return fill<uint16_t, uint8_t>(w, i, lanes, from);
        case 211: return fill<uint16_t, int8_t>(w, i, lanes, from);
        case 410: return fill<uint32_t, uint8_t>(w, i, lanes, from);
        case 411: return fill<uint32_t, int8_t>(w, i, lanes, from);
        case 420: return fill<uint32_t, uint16_t>(w, i, lanes, from);
        case 421: return fill<uint32_t, int16_t>(w, i, lanes, from);
        case 840: return fill<uint64_t, uint32_t>(w, i, lanes, from);
        case 841: return fill<uint64_t, int32_t>(w, i, lanes, from);
        default: throw Fault("a load into a register of another size");
    }
}

void load(Warp& w, const Instruction& i, uint32_t lanes) {
    const uint32_t bytes = static_cast<uint32_t>(i.width) * i.count;
    unsigned char* from[LANES] = {};
    uint64_t at[LANES];
    addresses(w, i, at);
    if (i.space == Space::PARAM) {
        const std::vector<unsigned char>& all = w.block->launch->parameters;
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(lanes >> lane & 1)) continue;
            if (at[lane] + bytes > all.size()) throw Fault("outside of the kernel's parameters");
            from[lane] = const_cast<unsigned char*>(all.data() + at[lane]);
        }
        return fill_any(w, i, lanes, from);
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            if (i.space == Space::SHARED) read_shared(w, lane, static_cast<uint32_t>(at[lane]), bytes);
            else read_global(w, lane, at[lane], bytes, i.orders);
            if (i.orders) acquire(w, lane, at[lane]);
            from[lane] = host_place(w, i, at[lane]);
        }
    count_access(w, i, at, lanes, bytes);
    fill_any(w, i, lanes, from);
}

void store(Warp& w, const Instruction& i, uint32_t lanes) {
    const uint32_t bytes = static_cast<uint32_t>(i.width) * i.count;
    uint64_t at[LANES];
    addresses(w, i, at);
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            if (i.space == Space::SHARED) write_shared(w, lane, static_cast<uint32_t>(at[lane]), bytes);
            else write_global(w, lane, at[lane], bytes, i.orders);
            if (i.orders) release(w, lane, at[lane]);
            unsigned char* const to = host_place(w, i, at[lane]);
            for (size_t k = 0; k < i.from.size(); ++k)
                std::memcpy(to + k * i.width, w.reg<unsigned char>(i.from[k]) + lane * i.register_width, i.width);
        }
    count_access(w, i, at, lanes, bytes);
}

void atomic_add(Warp& w, const Instruction& i, uint32_t lanes) {
    uint64_t at[LANES];
    addresses(w, i, at);
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            if (i.space == Space::SHARED) {
                if (shared_cells(*w.block, static_cast<uint32_t>(at[lane]), 4)->written < w.block->start)
                    throw Fault("nobody wrote what is added to at shared address " + std::to_string(at[lane]));
                write_shared(w, lane, static_cast<uint32_t>(at[lane]), 4, true);
            } else {
                write_global(w, lane, at[lane], 4, true);
            }
            unsigned char* const place = host_place(w, i, at[lane]);
            uint32_t before;
            std::memcpy(&before, place, 4);
            const uint32_t after = before + w.reg<uint32_t>(i.from[0])[lane];
            std::memcpy(place, &after, 4);
            w.reg<uint32_t>(i.to[0])[lane] = before;
        }
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

void copy_ahead(Warp& w, const Instruction& i, uint32_t lanes) {
    uint64_t at[LANES], from[LANES];
    addresses(w, i, at);
    uint32_t reading = 0;
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            const uint32_t valid = w.reg<uint32_t>(i.from[2])[lane];
            from[lane] = w.reg<uint64_t>(i.from[0])[lane] + w.reg<uint64_t>(i.from[1])[lane];
            if (valid > 16) throw Fault("an asynchronous copy of more than 16 bytes");
            if (from[lane] % 16) throw Fault("address " + hexadecimal(from[lane]) + " is no multiple of 16");
            if (valid) read_global(w, lane, from[lane], 16), reading |= 1u << lane;
            const uint32_t to = static_cast<uint32_t>(at[lane]);
            write_shared(w, lane, to, 16);
            for (uint32_t k = 0; k < 16 / CELL; ++k) w.block->cells[to / CELL + k].pending = true;
            w.copies.push_back({lane, to, from[lane], 16, valid});
        }
    if (counting) {
        count_banks(tally_of(w, i), at, lanes, 16);
        count_sectors(*w.block->launch, tally_of(w, i), from, reading, 16);
    }
}

void wait_for_copies(Warp& w, const Instruction&, uint32_t lanes) {
    auto kept = w.copies.begin();
    for (const Copy& copy : w.copies) {
        if (!(lanes >> copy.lane & 1)) {
            *kept++ = copy;
            continue;
        }
        std::memset(of_shared(w, copy.to), 0, copy.bytes);
        std::memcpy(of_shared(w, copy.to), reinterpret_cast<const void*>(copy.from), copy.valid);
        for (uint32_t k = 0; k < copy.bytes / CELL; ++k) w.block->cells[copy.to / CELL + k].pending = false;
        write_shared(w, copy.lane, copy.to, copy.bytes);
    }
    w.copies.erase(kept, w.copies.end());
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// ldmatrix: lane 8 k + r names row r of matrix k; register k of lane l holds of it row l / 4, elements 2 (l % 4) and
// the next one, of the transposed matrix where that is asked for.
template <bool transposed>
void load_matrices(Warp& w, const Instruction& i, uint32_t lanes) {
    uint64_t at[LANES];
    addresses(w, i, at);
    for (int lane = 0; lane < LANES; ++lane) shared_cells(*w.block, static_cast<uint32_t>(at[lane]), 16);
    count_access(w, i, at, lanes, 16);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t* to = w.reg<uint32_t>(i.to[static_cast<size_t>(matrix)]);
        uint32_t loaded[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            uint32_t both = 0;
            for (int half = 0; half < 2; ++half) {
                const int down = lane >> 2, across = (lane & 3) << 1 | half;
                const uint64_t element = transposed ? at[matrix * 8 + across] + 2 * static_cast<uint64_t>(down)
                                                    : at[matrix * 8 + down] + 2 * static_cast<uint64_t>(across);
                read_shared(w, lane, static_cast<uint32_t>(element), 2);
                uint16_t bits;
                std::memcpy(&bits, of_shared(w, element), 2);
                both |= static_cast<uint32_t>(bits) << 16 * half;
            }
            loaded[lane] = both;
        }
        std::copy(loaded, loaded + LANES, to);
    }
}

float bf16_at(uint32_t pair, int half) { return from_bf16(static_cast<uint16_t>(half ? pair >> 16 : pair)); }

// mma.m16n8k16: the tables of the ISA for the elements i of a lane's a (8), b (4) and c (4), with group = lane / 4 and
// member = lane % 4. Products are exact, sums rounded once; the order is the GPU's own.
void multiply(Warp& w, const Instruction& i, uint32_t) {
    float a[16][16], b[16][8], c[16][8];
    const auto pair = [&](int k, int lane) { return w.reg<uint32_t>(i.from[static_cast<size_t>(k)])[lane]; };
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane >> 2, member = lane & 3;
        for (int e = 0; e < 8; ++e) {
            const int row = e % 4 < 2 ? group : group + 8;
            const int column = member * 2 + (e & 1) + (e < 4 ? 0 : 8);
            a[row][column] = bf16_at(pair(e / 2, lane), e & 1);
        }
        for (int e = 0; e < 4; ++e) {
            b[member * 2 + (e & 1) + (e < 2 ? 0 : 8)][group] = bf16_at(pair(4 + e / 2, lane), e & 1);
            const float* const sums = w.reg<float>(i.from[static_cast<size_t>(6 + e)]);
            c[e < 2 ? group : group + 8][member * 2 + (e & 1)] = sums[lane];
        }
    }
    for (int row = 0; row < 16; ++row) {
        double sums[8];
        for (int column = 0; column < 8; ++column) sums[column] = c[row][column];
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sums[column] += static_cast<double>(a[row][k]) * b[k][column];
        for (int column = 0; column < 8; ++column) c[row][column] = static_cast<float>(sums[column]);
    }
    for (int lane = 0; lane < LANES; ++lane)
        for (int e = 0; e < 4; ++e) {
            float* const to = w.reg<float>(i.to[static_cast<size_t>(e)]);
            to[lane] = c[(lane >> 2) + (e < 2 ? 0 : 8)][(lane & 3) * 2 + (e & 1)];
        }
}

// ---- what lanes tell each other -------------------------------------------------------------------------------------

enum : uint8_t { BUTTERFLY, UP, DOWN, INDEX };

void shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
    const uint32_t *a = w.reg<uint32_t>(i.from[0]), *b = w.reg<uint32_t>(i.from[1]), *c = w.reg<uint32_t>(i.from[2]);
    uint32_t result[LANES], in_range = 0;
    for (uint32_t lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const uint32_t by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
        const uint32_t highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        uint32_t source;
        bool valid;
        switch (i.mode) {
            case BUTTERFLY: source = lane ^ by, valid = source <= highest; break;
            case UP: source = lane - by, valid = lane >= by && source >= highest; break;
            case DOWN: source = lane + by, valid = source <= highest; break;
            default: source = lowest | (by & ~segment), valid = source <= highest; break;
        }
        if (!valid) source = lane;
        if (!(lanes >> source & 1))
            throw Fault("a shuffle from lane " + std::to_string(source) + ", which takes no part in it");
        result[lane] = a[source];
        in_range |= static_cast<uint32_t>(valid) << lane;
    }
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) w.reg<uint32_t>(i.to[0])[lane] = result[lane];
    if (i.to.size() > 1) {
        uint32_t* valid = w.reg<uint32_t>(i.to[1]);
        *valid = (*valid & ~lanes) | in_range;
    }
}

void match_any(Warp& w, const Instruction& i, uint32_t lanes) {
    const uint32_t* a = w.reg<uint32_t>(i.from[0]);
    uint32_t result[LANES] = {};
    for (int lane = 0; lane < LANES; ++lane)
        for (int other = 0; other < LANES; ++other)
            if (lanes >> other & 1 && a[lane] == a[other]) result[lane] |= 1u << other;
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) w.reg<uint32_t>(i.to[0])[lane] = result[lane];
}

// bar.warp.sync orders what the lanes did to memory before it.
void warp_barrier(Warp& w, const Instruction&, uint32_t lanes) {
    if (lanes != w.all) throw Fault("a barrier of some of the warp's lanes");
    w.clock = ++clock_now;
}

std::vector<std::string_view> words_of(std::string_view name) {
    std::vector<std::string_view> words;
    for (size_t start = 0; start <= name.size();) {
        const size_t end = std::min(name.find('.', start), name.size());
        words.push_back(name.substr(start, end - start));
        start = end + 1;
    }
    return words;
}

}  // namespace

void find_memory_step(Instruction& i) {
    static const std::map<std::string_view, std::pair<Step, uint8_t>> WHOLE = {
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", {multiply, 0}},
        {"ldmatrix.sync.aligned.m8n8.x4.shared.b16", {load_matrices<false>, 0}},
        {"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", {load_matrices<true>, 0}},
        {"shfl.sync.bfly.b32", {shuffle, BUTTERFLY}},
        {"shfl.sync.up.b32", {shuffle, UP}},
        {"shfl.sync.down.b32", {shuffle, DOWN}},
        {"shfl.sync.idx.b32", {shuffle, INDEX}},
        {"match.any.sync.b32", {match_any, 0}},
        {"bar.warp.sync", {warp_barrier, 0}},
    };
    if (const auto found = WHOLE.find(i.name); found != WHOLE.end()) {
        i.step = found->second.first, i.mode = found->second.second, i.together = true;
        const std::string_view kind = i.name.substr(0, i.name.find('.'));
        i.has_mask = kind != "mma" && kind != "ldmatrix";
        if (kind == "ldmatrix") i.space = Space::SHARED;
        return;
    }
    if (i.name == "cp.async.cg.shared.global") {
        i.step = copy_ahead;
        return;
    }
    if (i.name == "cp.async.wait_all") {
        i.step = wait_for_copies;
        return;
    }
    if (i.name == "atom.shared.add.u32" || i.name == "atom.global.add.u32") {
        i.step = atomic_add;
        i.space = i.name[5] == 's' ? Space::SHARED : Space::GLOBAL;
        return;
    }
    // ld.global.cs.v4.u32
    const auto words = words_of(i.name);
    if (words[0] != "ld" && words[0] != "st") throw Fault("unknown instruction " + std::string(i.name));
    for (size_t k = 1; k < words.size(); ++k) {
        const std::string_view word = words[k];
        if (word == "global") i.space = Space::GLOBAL;
        else if (word == "shared") i.space = Space::SHARED;
        else if (word == "param" && words[0] == "ld") i.space = Space::PARAM;
        else if (word == "v2") i.count = 2;
        else if (word == "v4") i.count = 4;
        else if (word == "cs" || word == "wb" || word == "cg" || word == "gpu") continue;
        else if (word == "release" || word == "acquire") i.orders = true;
        else if (k + 1 == words.size() && std::strchr("usbf", word[0]) && word.size() > 1) {
            i.width = static_cast<uint8_t>(std::atoi(std::string(word.substr(1)).c_str()) / 8);
            i.is_signed = word[0] == 's';
        } else throw Fault("unknown modifier " + std::string(word) + " of " + std::string(i.name));
    }
    if (i.space == Space::NONE || i.width == 0) throw Fault("unknown instruction " + std::string(i.name));
    i.step = words[0] == "ld" ? load : store;
}

}  // namespace ptx
