// PTX text -> kernels (program.h): as much of the language as nvcc writes for pyllmc/_cuda.
#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "program.h"

namespace ptx {
namespace {

struct Token {
    std::string_view text;
    uint32_t line;
};

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::strchr("_$%.", c); }

std::vector<Token> tokens_of(std::string_view text) {
    std::vector<Token> tokens;
    uint32_t line = 1;
    for (size_t i = 0; i < text.size();) {
        const char c = text[i];
        if (c == '\n') ++line, ++i;
        else if (std::isspace(static_cast<unsigned char>(c)) || c == 0) ++i;
        else if (c == '/' && text[i + 1] == '/') i = std::min(text.find('\n', i), text.size());
        else {
            size_t end = i + 1;
            if (c == '"') end = text.find('"', i + 1) + 1;
            else if (is_word(c)) while (end < text.size() && is_word(text[end])) ++end;
            tokens.push_back({text.substr(i, end - i), line});
            i = end;
        }
    }
    return tokens;
}

struct Register {
    uint32_t offset;
    uint8_t width;  // bytes of a lane; 1 is a predicate
};

uint8_t width_of_type(std::string_view type) {
    if (type == ".pred") return 1;
    const size_t digits = type.find_first_of("0123456789");
    return static_cast<uint8_t>(std::atoi(std::string(type.substr(digits)).c_str()) / 8);
}

// A parameter, or a variable in shared memory.
struct Variable {
    std::string_view name;
    uint32_t bytes, alignment;
    bool dynamic = false;  // its bytes are those of the launch
};

uint32_t rounded_up(uint32_t offset, uint32_t alignment) { return (offset + alignment - 1) / alignment * alignment; }

const std::map<std::string_view, Special> SPECIAL_NAMES = {
    {"%tid.x", TID_X}, {"%tid.y", TID_Y}, {"%tid.z", TID_Z}, {"%ctaid.x", CTAID_X}, {"%ctaid.y", CTAID_Y},
    {"%ctaid.z", CTAID_Z}, {"%ntid.x", NTID_X}, {"%ntid.y", NTID_Y}, {"%ntid.z", NTID_Z}, {"%nctaid.x", NCTAID_X},
    {"%nctaid.y", NCTAID_Y}, {"%nctaid.z", NCTAID_Z}, {"%laneid", LANEID},
};

class Parser {
public:
    explicit Parser(std::string_view text) : tokens(tokens_of(text)) {}

    std::map<std::string, Kernel> module() {
        std::map<std::string, Kernel> kernels;
        // Files are named behind the kernels that refer to them.
        for (size_t i = 0; i + 2 < tokens.size(); ++i)
            if (tokens[i].text == ".file") {
                std::string_view name = tokens[i + 2].text.substr(1, tokens[i + 2].text.size() - 2);
                files[tokens[i + 1].text] = name.substr(name.rfind('/') + 1);
            }
        while (now < tokens.size()) {
            const std::string_view word = tokens[now].text;
            if (word == ".entry") {
                ++now;
                const std::string name(tokens[now].text);
                entry(kernels[name]);
                kernels[name].name = demangled(name);
            } else if (word == ".shared") {
                shared_variable(false);
            } else if (word == ".extern") {
                ++now;
                shared_variable(true);
            } else if (word == ".section") {
                while (tokens[now].text != "}") ++now;
                ++now;
            } else if (word == ".visible" || word == ".weak") {
                ++now;
            } else if (word == ".version" || word == ".target" || word == ".address_size" || word == ".file") {
                skip_line();
            } else {
                fail("unknown directive " + std::string(word));
            }
        }
        return kernels;
    }

private:
    std::vector<Token> tokens;
    size_t now = 0;
    std::map<std::string_view, std::string_view> files;
    std::map<std::string_view, Variable> shared;
    std::vector<std::unique_ptr<std::string>> names;  // of registers that are declared by their number
    bool is_conversion = false;                       // what the instruction is that is read

    // of the kernel that is read
    Kernel* kernel = nullptr;
    std::map<std::string_view, Register> registers;
    std::map<std::string_view, uint32_t> parameters, labels, shared_at;
    std::map<std::pair<uint64_t, uint8_t>, uint32_t> constants;
    std::vector<std::pair<uint32_t, std::string_view>> jumps;
    std::vector<Register> dynamic;  // constants that are the address of the dynamic shared memory
    uint32_t place = NO_PLACE, caller = NO_PLACE, alignment_of_dynamic = 1;
    std::map<std::string, uint32_t> places;

    [[noreturn]] void fail(const std::string& what) {
        throw Fault("PTX line " + std::to_string(tokens[std::min(now, tokens.size() - 1)].line) + ": " + what);
    }

    static std::string demangled(const std::string& name) {
        int status = 0;
        char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
        std::string found = status == 0 ? text : name;
        std::free(text);
        // "void pyllmc::(anonymous namespace)::name<types>(arguments)" -> "name<types>"
        for (const std::string word : {"(anonymous namespace)::", "pyllmc::", "void "})
            for (size_t i; (i = found.find(word)) != std::string::npos;) found.erase(i, word.size());
        int depth = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            depth += found[i] == '<' ? 1 : found[i] == '>' ? -1 : 0;
            if (found[i] == '(' && depth == 0) return found.substr(0, i);
        }
        return found;
    }

    void expect(std::string_view word) {
        const std::string found(tokens[now].text);
        if (found != word) fail("expected " + std::string(word) + ", found " + found);
        ++now;
    }

    bool take(std::string_view word) {
        if (tokens[now].text != word) return false;
        ++now;
        return true;
    }

    std::string_view next() { return tokens[now++].text; }

    void skip_line() {
        const uint32_t line = tokens[now].line;
        while (now < tokens.size() && tokens[now].line == line) ++now;
    }

    int64_t number() {
        const bool negative = take("-");
        const std::string text(next());
        const int64_t value = static_cast<int64_t>(std::strtoull(text.c_str(), nullptr, 0));
        return negative ? -value : value;
    }

    // .align 16 .b8 name[128]
    Variable variable() {
        uint32_t alignment = 1;
        if (take(".align")) alignment = static_cast<uint32_t>(number());
        const uint8_t width = width_of_type(next());
        const std::string_view name = next();
        uint32_t bytes = width;
        if (take("[")) {
            bytes = tokens[now].text == "]" ? 0 : width * static_cast<uint32_t>(number());
            expect("]");
        }
        return {name, bytes, std::max<uint32_t>(alignment, width)};
    }

    void shared_variable(bool is_extern) {
        expect(".shared");
        Variable found = variable();
        expect(";");
        found.dynamic = is_extern;
        shared[found.name] = found;
    }

    uint32_t add_register(uint8_t width) {
        const size_t offset = kernel->image.size();
        kernel->image.resize(offset + (width == 1 ? 64 : std::max(64, LANES * width)), 0xff);
        return static_cast<uint32_t>(offset);
    }

    uint32_t constant(uint64_t value, uint8_t width) {
        if (width == 1) value = value ? ALL : 0;
        else if (width < 8) value &= (uint64_t{1} << 8 * width) - 1;
        const auto [found, is_new] = constants.try_emplace({value, width}, 0);
        if (is_new) {
            found->second = add_register(width);
            fill(found->second, value, width);
        }
        return found->second;
    }

    void fill(uint32_t at, uint64_t value, uint8_t width) {
        if (width == 1) std::memcpy(&kernel->image[at], &value, 4);
        else for (int lane = 0; lane < LANES; ++lane) std::memcpy(&kernel->image[at + lane * width], &value, width);
    }

    // Variables lie in the order in which the kernel first names them.
    uint32_t shared_address(std::string_view name, uint8_t width) {
        const Variable& named = shared.at(name);
        if (named.dynamic) {
            alignment_of_dynamic = std::max(alignment_of_dynamic, named.alignment);
            dynamic.push_back({add_register(width), width});
            return dynamic.back().offset;
        }
        const auto [found, is_new] = shared_at.try_emplace(name, 0);
        if (is_new) {
            found->second = rounded_up(kernel->static_shared, named.alignment);
            kernel->static_shared = found->second + named.bytes;
        }
        return constant(found->second, width);
    }

    void entry(Kernel& of) {
        kernel = &of;
        registers.clear(), parameters.clear(), labels.clear(), shared_at.clear(), constants.clear(), jumps.clear();
        dynamic.clear(), places.clear();
        place = caller = NO_PLACE, alignment_of_dynamic = 1;
        of.image.assign(64, 0);  // so that 0 is no register
        ++now;
        parameter_list();
        limits();
        for (int depth = 1; depth > 0;) depth += statement();
        finish();
    }

    // (.param .u64 name_0, .param .align 8 .b8 name_1[32])
    void parameter_list() {
        expect("(");
        while (!take(")")) {
            take(",");
            if (tokens[now].text == ")") continue;
            expect(".param");
            const Variable found = variable();
            const uint32_t offset = rounded_up(kernel->parameter_bytes, found.alignment);
            kernel->parameters.push_back({offset, found.bytes});
            parameters[found.name] = offset;
            kernel->parameter_bytes = offset + found.bytes;
        }
    }

    // .maxntid 256, 1, 1 and the like, up to the body
    void limits() {
        while (!take("{")) {
            if (take(".maxntid")) {
                kernel->max_threads = static_cast<uint32_t>(number());
                while (take(",")) kernel->max_threads *= static_cast<uint32_t>(number());
            } else if (take(".minnctapersm") || take(".maxnreg")) {
                number();
            } else {
                fail("unknown directive " + std::string(tokens[now].text));
            }
        }
    }

    // What is known only when all of the body was read.
    void finish() {
        for (const auto& [index, label] : jumps) {
            if (!labels.count(label)) fail("no label " + std::string(label));
            kernel->code[index].target = labels[label];
        }
        kernel->dynamic_start = rounded_up(kernel->static_shared, alignment_of_dynamic);
        for (const Register& each : dynamic) fill(each.offset, kernel->dynamic_start, each.width);
        kernel->places.resize(places.size());
        for (const auto& [name, index] : places) kernel->places[index] = name;
        kernel->tallies.resize(kernel->code.size());
    }

    // "gelu.cu:34" of the file and the line at this token.
    uint32_t place_of(size_t token) {
        const std::string name = std::string(files[tokens[token].text]) + ":" + std::string(tokens[token + 1].text);
        return places.try_emplace(name, static_cast<uint32_t>(places.size())).first->second;
    }

    // Reads one statement; 1 where it opens a scope, -1 where it closes one.
    int statement() {
        if (take("{")) return 1;
        if (take("}")) return -1;
        const std::string_view word = tokens[now].text;
        if (word == ".reg") {
            ++now;
            declare();
        } else if (word == ".shared") {
            shared_variable(false);
        } else if (word == ".pragma") {
            while (!take(";")) ++now;
        } else if (word == ".loc") {
            place = place_of(now + 1);
            caller = place;
            for (const uint32_t line = tokens[now].line; now < tokens.size() && tokens[now].line == line; ++now)
                if (tokens[now].text == "inlined_at") caller = place_of(now + 1);
        } else if (tokens[now + 1].text == ":") {
            labels[word] = static_cast<uint32_t>(kernel->code.size());
            now += 2;
        } else {
            instruction();
        }
        return 0;
    }

    // .reg .f32 %f<106>;  .reg .b64 %tmp;
    void declare() {
        const uint8_t width = width_of_type(next());
        const std::string_view name = next();
        if (take("<")) {
            const int64_t count = number();
            expect(">");
            for (int64_t i = 0; i < count; ++i) {
                names.push_back(std::make_unique<std::string>(std::string(name) + std::to_string(i)));
                registers[*names.back()] = {add_register(width), width};
            }
        } else {
            registers[name] = {add_register(width), width};
        }
        expect(";");
    }

    // A register, an immediate or an address that stands as a value, `width` bytes wide; 0: as wide as it is.
    uint32_t operand(uint8_t width, uint8_t* found_width = nullptr) {
        const std::string_view word = tokens[now].text;
        if (const auto found = registers.find(word); found != registers.end()) {
            ++now;
            if (width == 4 && found->second.width == 8 && is_conversion) return lower_half(found->second.offset);
            if (width != 0 && found->second.width != width) fail("the width of " + std::string(word) + " is another");
            if (found_width) *found_width = found->second.width;
            return found->second.offset;
        }
        if (const auto found = SPECIAL_NAMES.find(word); found != SPECIAL_NAMES.end()) {
            ++now;
            uint32_t& at = kernel->special[found->second];
            if (at == 0) at = add_register(4);
            return at;
        }
        if (shared.count(word)) {
            ++now;
            return shared_address(word, width);
        }
        if (const auto found = parameters.find(word); found != parameters.end()) {  // where it is among the others
            ++now;
            return constant(found->second, width);
        }
        if (word[0] == '0' && word.size() > 2 && (word[1] == 'f' || word[1] == 'd')) {
            ++now;
            return constant(std::strtoull(std::string(word.substr(2)).c_str(), nullptr, 16), width);
        }
        if (word == "-" || std::isdigit(static_cast<unsigned char>(word[0])))
            return constant(static_cast<uint64_t>(number()), width);
        fail("unknown operand " + std::string(word));
    }

    // What a conversion from 32 bits takes of a register of 64.
    uint32_t lower_half(uint32_t at) {
        Instruction i;
        i.name = "cvt.u32.u64";
        i.step = arithmetic().at(i.name).step;
        i.line = tokens[now].line, i.place = place;
        i.from = {at};
        i.to = {add_register(4)};
        kernel->code.push_back(i);
        return i.to[0];
    }

    // {%r1, %r2} or one of them
    std::vector<uint32_t> operands(uint8_t width, uint8_t* found_width = nullptr) {
        std::vector<uint32_t> all;
        if (!take("{")) return {operand(width, found_width)};
        do all.push_back(operand(width, found_width));
        while (take(","));
        expect("}");
        return all;
    }

    // [%rd1+8]
    void address(Instruction& i) {
        expect("[");
        const std::string_view word = tokens[now].text;
        i.address_width = 8;
        if (i.space == Space::PARAM) {
            i.address = operand(8, &i.address_width);
        } else if (shared.count(word)) {
            i.address = shared_address(word, i.address_width = 4);
            ++now;
        } else {
            i.address = operand(0, &i.address_width);
        }
        if (take("+")) i.offset += number();
        expect("]");
    }

    void instruction() {
        Instruction i;
        i.line = tokens[now].line;
        i.place = place;
        i.caller = caller;
        if (take("@")) {
            i.guarded = true;
            i.guard_negated = take("!");
            i.guard = operand(1);
        }
        const std::string_view name = i.name = next();
        is_conversion = name.substr(0, 4) == "cvt.";
        if (name == "bra" || name == "bra.uni") {
            i.flow = Flow::BRANCH;
            jumps.emplace_back(kernel->code.size(), next());
        } else if (name == "ret") {
            i.flow = Flow::RETURN;
        } else if (name == "bar.sync") {
            if (number() != 0) fail("a barrier with a number");
            i.flow = Flow::BARRIER;
        } else if (name == "nanosleep.u32") {
            operand(4);
            i.flow = Flow::PAUSE;
        } else if (const auto found = arithmetic().find(name); found != arithmetic().end()) {
            i.step = found->second.step;
            for (size_t k = 0; k < found->second.widths.size(); ++k) {
                if (k > 0) expect(",");
                auto& list = static_cast<int>(k) < found->second.results ? i.to : i.from;
                if (tokens[now].text == "{" && name.substr(0, 5) == "mov.b") {
                    list = operands(0, &i.width);
                    i.step = move_parts;
                    if (list.size() * i.width != found->second.widths[k]) fail("parts of another size");
                } else {
                    list.push_back(operand(found->second.widths[k]));
                }
            }
        } else {
            memory(i);
        }
        expect(";");
        i.waits = i.flow == Flow::BARRIER || name == "bar.warp.sync" || name == "cp.async.wait_all";
        kernel->code.push_back(std::move(i));
    }

    void memory(Instruction& i) {
        try {
            find_memory_step(i);
        } catch (const Fault& fault) {
            --now;
            fail(fault.what());
        }
        const std::string_view kind = i.name.substr(0, i.name.find('.'));
        if (kind == "ld" || kind == "ldmatrix") {
            i.to = operands(0, &i.register_width);
            expect(",");
            address(i);
        } else if (kind == "st") {
            address(i);
            expect(",");
            i.from = i.width == 2 || i.width == 1 ? operands(2, &i.register_width) : operands(i.width);
            if (i.register_width == 0) i.register_width = i.width;
        } else if (kind == "atom") {
            i.to = operands(4);
            expect(",");
            address(i);
            expect(",");
            i.from = operands(4);
        } else if (i.name.substr(0, 13) == "cp.async.wait") {
            return;
        } else if (kind == "cp") {
            address(i);
            expect(",");
            Instruction source;
            address(source);
            expect(",");
            i.from = {source.address, constant(static_cast<uint64_t>(source.offset), 8)};
            if (number() != 16) fail("an asynchronous copy of another size than 16 bytes");
            i.from.push_back(take(",") ? operand(4) : constant(16, 4));
        } else if (kind == "mma") {
            i.to = operands(4);
            for (int k = 0; k < 3; ++k) {
                expect(",");
                const auto all = operands(4);
                i.from.insert(i.from.end(), all.begin(), all.end());
            }
        } else if (kind == "shfl") {  // d|p, a, b, c, mask
            i.to = operands(4);
            if (take("|")) i.to.push_back(operand(1));
            for (int k = 0; k < 4; ++k) {
                expect(",");
                i.from.push_back(operand(4));
            }
        } else if (kind == "match") {
            i.to = operands(4);
            for (int k = 0; k < 2; ++k) {
                expect(",");
                i.from.push_back(operand(4));
            }
        } else if (kind == "bar") {  // bar.warp.sync mask
            i.from = operands(4);
        }
        if (i.count != 1 && (kind == "ld" || kind == "st") && (kind == "ld" ? i.to : i.from).size() != i.count)
            fail("another number of registers than the vector has elements");
    }
};

}  // namespace

std::map<std::string, Kernel> parse(std::string_view text) { return Parser(text).module(); }

}  // namespace ptx
