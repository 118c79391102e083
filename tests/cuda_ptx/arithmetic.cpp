// What the instructions do that a lane does alone in its registers, exactly as the PTX ISA says.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s32 = int32_t;
using s64 = int64_t;

// ---- a function of a lane, for all lanes ----------------------------------------------------------------------------

template <class T>
struct In {
    const T* all;
    T operator[](int lane) const { return all[lane]; }
};
template <>
struct In<bool> {
    uint32_t all;
    bool operator[](int lane) const { return all >> lane & 1; }
};

template <class T>
In<T> in(Warp& w, uint32_t at) {
    if constexpr (std::is_same_v<T, bool>) return {*w.reg<uint32_t>(at)};
    else return {w.reg<T>(at)};
}

template <auto f>
struct Lanes;

template <class R, class... A, R (*f)(A...)>
struct Lanes<f> {
    template <size_t... n>
    static void go(Warp& w, const Instruction& i, uint32_t lanes, std::index_sequence<n...>) {
        const std::tuple<In<A>...> from{in<A>(w, i.from[n])...};
        if constexpr (std::is_same_v<R, bool>) {
            uint32_t bits = 0;
            for (int lane = 0; lane < LANES; ++lane)
                bits |= static_cast<uint32_t>(f(std::get<n>(from)[lane]...)) << lane;
            uint32_t* to = w.reg<uint32_t>(i.to[0]);
            *to = (*to & ~lanes) | (bits & lanes);
        } else {
            R* to = w.reg<R>(i.to[0]);
            if (lanes == ALL) {
#pragma GCC ivdep
                for (int lane = 0; lane < LANES; ++lane) to[lane] = f(std::get<n>(from)[lane]...);
            } else {
                for (int lane = 0; lane < LANES; ++lane)
                    if (lanes >> lane & 1) to[lane] = f(std::get<n>(from)[lane]...);
            }
        }
    }
    static void step(Warp& w, const Instruction& i, uint32_t lanes) {
        go(w, i, lanes, std::index_sequence_for<A...>{});
    }
    static Known known() { return {step, 1, {sizeof(R), sizeof(A)...}}; }
};

template <auto f>
Known lanes() { return Lanes<f>::known(); }

// ---- numbers --------------------------------------------------------------------------------------------------------

template <class T> T move(T a) { return a; }
template <class T> T add(T a, T b) { return a + b; }
template <class T> T sub(T a, T b) { return a - b; }
template <class T> T mul(T a, T b) { return a * b; }
template <class T> T mad(T a, T b, T c) { return a * b + c; }
template <class T> T neg(T a) { return -a; }
template <class T> T absolute(T a) { return std::fabs(a); }
template <class T> T fused(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> T quotient(T a, T b) { return a / b; }
template <class T> T root(T a) { return std::sqrt(a); }
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
template <class T> T bit_not(T a) { return ~a; }
template <class T> T select(T a, T b, bool p) { return p ? a : b; }
template <class T> T smaller(T a, T b) { return b < a ? b : a; }
template <class T> T larger(T a, T b) { return a < b ? b : a; }
template <class T> bool eq(T a, T b) { return a == b; }
template <class T> bool ne(T a, T b) { return a != b; }
template <class T> bool lt(T a, T b) { return a < b; }
template <class T> bool le(T a, T b) { return a <= b; }
template <class T> bool gt(T a, T b) { return a > b; }
template <class T> bool ge(T a, T b) { return a >= b; }
template <class T> bool leu(T a, T b) { return !(a > b); }
template <class T> bool ltu(T a, T b) { return !(a >= b); }
template <class T> bool gtu(T a, T b) { return !(a <= b); }
template <class T> bool geu(T a, T b) { return !(a < b); }
template <class T> bool neu(T a, T b) { return !(a == b); }
template <class T> bool nan(T a, T b) { return a != a || b != b; }
template <class T> bool num(T a, T b) { return a == a && b == b; }
bool negated(bool a) { return !a; }

template <class T> T shift_left(T a, u32 n) { return n < 8 * sizeof(T) ? a << n : 0; }
template <class T> T shift_right(T a, u32 n) {
    return n < 8 * sizeof(T) ? a >> n : static_cast<T>(a < 0 ? -1 : 0);
}
// Of a division by zero the ISA says nothing; all bits set, as GPUs do it.
template <class T> T divide(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>) if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    return a / b;
}
template <class T> T remainder(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) if (b == -1) return 0;
    return a % b;
}
template <class Wide, class T> Wide mul_wide(T a, T b) { return static_cast<Wide>(a) * static_cast<Wide>(b); }
template <class Wide, class T> T mul_high(T a, T b) {
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
}
u32 population(u32 a) { return static_cast<u32>(__builtin_popcount(a)); }
template <class T> T insert(T a, T b, u32 at, u32 count) {  // the low bits of a into b
    at &= 255, count &= 255;
    if (at >= 8 * sizeof(T) || count == 0) return b;
    const T mask = (count >= 8 * sizeof(T) ? ~T{0} : (T{1} << count) - 1) << at;
    return (b & ~mask) | (a << at & mask);
}

// ---- floating point -------------------------------------------------------------------------------------------------

u32 float_as_bits(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Of a NaN and a number the number; +0 is larger than -0.
float min_f32(float a, float b) { return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b; }
float max_f32(float a, float b) { return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b; }
float saturated(float x) { return !(x > 0.0f) ? 0.0f : x > 1.0f ? 1.0f : x; }
float reciprocal(float x) { return 1.0f / x; }
float power_of_two(float x) { return std::exp2(x); }
float power_of_two_flushed(float x) { return flushed(std::exp2(flushed(x))); }
float divide_roughly(float a, float b) {  // by a very large number it gives 0, or NaN of an infinity
    const float size = std::fabs(b);
    if (size > 0x1p126f && size < INFINITY) return std::isinf(a) || std::isnan(a) ? NAN : 0.0f;
    return a / b;
}

u16 to_bf16(float x) {  // to nearest, ties to even; one NaN for all
    const u32 bits = float_as_bits(x);
    return x != x ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
u32 to_bf16x2(float high, float low) { return static_cast<u32>(to_bf16(high)) << 16 | to_bf16(low); }

template <class To, class From> To convert(From x) { return static_cast<To>(x); }

// Towards minus infinity. Not to be moved across the changes of the rounding.
__attribute__((noinline)) void fused_downward(Warp& w, const Instruction& i, uint32_t lanes) {
    const float *a = w.reg<float>(i.from[0]), *b = w.reg<float>(i.from[1]), *c = w.reg<float>(i.from[2]);
    float* to = w.reg<float>(i.to[0]);
    const int before = std::fegetround();
    std::fesetround(FE_DOWNWARD);
    for (int lane = 0; lane < LANES; ++lane)
        if (lanes >> lane & 1) {
            volatile float x = a[lane];
            volatile float result = std::fma(static_cast<float>(x), b[lane], c[lane]);
            to[lane] = result;
        }
    std::fesetround(before);
}

u64 from_shared(u64 a) { return a + SHARED_WINDOW; }
u64 to_shared(u64 a) { return a - SHARED_WINDOW; }

// ---- the table: what is done by the name of the instruction ---------------------------------------------------------

using Table = std::map<std::string_view, Known>;

// Instructions whose names end with the type.
void add_typed(Table& all, const std::string& type, std::initializer_list<std::pair<const char*, Known>> named) {
    static std::vector<std::unique_ptr<std::string>> names;
    for (const auto& [name, known] : named) {
        names.push_back(std::make_unique<std::string>(name + type));
        all.emplace(*names.back(), known);
    }
}

// Where the type makes no difference but for its size.
template <class T>
void integers(Table& all, const std::vector<std::string>& types) {
    for (const std::string& type : types)
        add_typed(all, type, {
            {"add.", lanes<add<T>>()}, {"sub.", lanes<sub<T>>()}, {"mul.lo.", lanes<mul<T>>()},
            {"mad.lo.", lanes<mad<T>>()}, {"mov.", lanes<move<T>>()}, {"selp.", lanes<select<T>>()},
            {"and.", lanes<bit_and<T>>()}, {"or.", lanes<bit_or<T>>()}, {"xor.", lanes<bit_xor<T>>()},
            {"not.", lanes<bit_not<T>>()}, {"setp.eq.", lanes<eq<T>>()}, {"setp.ne.", lanes<ne<T>>()},
            {"shl.", lanes<shift_left<T>>()}, {"neg.", lanes<neg<T>>()}});
}

template <class T>
void ordered(Table& all, const std::string& type) {
    add_typed(all, type, {
        {"setp.lt.", lanes<lt<T>>()}, {"setp.le.", lanes<le<T>>()}, {"setp.gt.", lanes<gt<T>>()},
        {"setp.ge.", lanes<ge<T>>()}, {"min.", lanes<smaller<T>>()}, {"max.", lanes<larger<T>>()},
        {"div.", lanes<divide<T>>()}, {"rem.", lanes<remainder<T>>()}, {"shr.", lanes<shift_right<T>>()}});
}

template <class T>
void floats(Table& all, const std::string& type) {
    add_typed(all, type, {
        {"add.", lanes<add<T>>()}, {"sub.", lanes<sub<T>>()}, {"mul.", lanes<mul<T>>()}, {"neg.", lanes<neg<T>>()},
        {"abs.", lanes<absolute<T>>()},
        {"add.rn.", lanes<add<T>>()}, {"sub.rn.", lanes<sub<T>>()}, {"mul.rn.", lanes<mul<T>>()},
        {"fma.rn.", lanes<fused<T>>()}, {"div.rn.", lanes<quotient<T>>()}, {"sqrt.rn.", lanes<root<T>>()},
        {"mov.", lanes<move<T>>()}, {"selp.", lanes<select<T>>()},
        {"setp.eq.", lanes<eq<T>>()}, {"setp.ne.", lanes<ne<T>>()}, {"setp.lt.", lanes<lt<T>>()},
        {"setp.le.", lanes<le<T>>()}, {"setp.gt.", lanes<gt<T>>()}, {"setp.ge.", lanes<ge<T>>()},
        {"setp.leu.", lanes<leu<T>>()}, {"setp.ltu.", lanes<ltu<T>>()}, {"setp.gtu.", lanes<gtu<T>>()},
        {"setp.geu.", lanes<geu<T>>()}, {"setp.neu.", lanes<neu<T>>()}, {"setp.nan.", lanes<nan<T>>()},
        {"setp.num.", lanes<num<T>>()}});
}

Table table() {
    Table all = {
        {"fma.rm.f32", {fused_downward, 1, {4, 4, 4, 4}}},
        {"min.f32", lanes<min_f32>()},
        {"max.f32", lanes<max_f32>()},
        {"rcp.rn.f32", lanes<reciprocal>()},
        {"div.approx.f32", lanes<divide_roughly>()},
        {"ex2.approx.f32", lanes<power_of_two>()},
        {"ex2.approx.ftz.f32", lanes<power_of_two_flushed>()},
        {"cvt.sat.f32.f32", lanes<saturated>()},
        {"cvt.f32.bf16", lanes<from_bf16>()},
        {"cvt.rn.bf16.f32", lanes<to_bf16>()},
        {"cvt.rn.bf16x2.f32", lanes<to_bf16x2>()},
        {"cvt.rn.f32.s32", lanes<convert<float, s32>>()},
        {"cvt.rn.f32.u32", lanes<convert<float, u32>>()},
        {"cvt.rn.f32.u64", lanes<convert<float, u64>>()},
        {"cvt.rn.f32.f64", lanes<convert<float, double>>()},
        {"cvt.f64.f32", lanes<convert<double, float>>()},
        {"cvt.u64.u32", lanes<convert<u64, u32>>()},
        {"cvt.s64.s32", lanes<convert<s64, s32>>()},
        {"cvt.u32.u64", lanes<convert<u32, u64>>()},
        {"cvt.u32.u16", lanes<convert<u32, u16>>()},
        {"cvt.u16.u32", lanes<convert<u16, u32>>()},
        {"cvta.to.global.u64", lanes<move<u64>>()},
        {"cvta.global.u64", lanes<move<u64>>()},
        {"cvta.shared.u64", lanes<from_shared>()},
        {"cvta.to.shared.u64", lanes<to_shared>()},
        {"mul.wide.u32", lanes<mul_wide<u64, u32>>()},
        {"mul.wide.s32", lanes<mul_wide<s64, s32>>()},
        {"mul.hi.u32", lanes<mul_high<u64, u32>>()},
        {"mul.hi.s32", lanes<mul_high<s64, s32>>()},
        {"popc.b32", lanes<population>()},
        {"bfi.b32", lanes<insert<u32>>()},
        {"bfi.b64", lanes<insert<u64>>()},
        {"and.pred", lanes<bit_and<bool>>()},
        {"or.pred", lanes<bit_or<bool>>()},
        {"xor.pred", lanes<bit_xor<bool>>()},
        {"not.pred", lanes<negated>()},
        {"mov.pred", lanes<move<bool>>()},
    };
    floats<float>(all, "f32");
    floats<double>(all, "f64");
    integers<u16>(all, {"b16", "u16", "s16"});
    integers<u32>(all, {"b32", "u32", "s32"});
    integers<u64>(all, {"b64", "u64", "s64"});
    ordered<s32>(all, "s32");
    ordered<u32>(all, "u32");
    ordered<s64>(all, "s64");
    ordered<u64>(all, "u64");
    return all;
}

}  // namespace

// mov.b64 {%r1, %r2}, %rd1 and back: parts of i.width bytes, the first one lowest.
void move_parts(Warp& w, const Instruction& i, uint32_t lanes) {
    const size_t parts = std::max(i.to.size(), i.from.size()), bytes = i.width, whole = parts * bytes;
    for (size_t lane = 0; lane < LANES; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        unsigned char value[8];
        for (size_t k = 0; k < i.from.size(); ++k) {
            const size_t size = whole / i.from.size();
            std::memcpy(value + k * size, w.reg<unsigned char>(i.from[k]) + lane * size, size);
        }
        for (size_t k = 0; k < i.to.size(); ++k) {
            const size_t size = whole / i.to.size();
            std::memcpy(w.reg<unsigned char>(i.to[k]) + lane * size, value + k * size, size);
        }
    }
}

const Table& arithmetic() {
    static const Table known = table();
    return known;
}

}  // namespace ptx
