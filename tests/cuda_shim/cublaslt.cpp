// A stand-in for cuBLASLt: products on the processor, with the epilogues, types and layouts that pyllmc/_cuda uses and
// no others. It is opened as the library is, from the file that it is part of.
//
// Stricter than the library: what is not used is an error, and so are addresses that are less aligned than was said, an
// algorithm that was made for another product, arrays that overlap, a workspace that is too small. Every algorithm adds
// up in another order, so that a wrong choice shows in the bits; every second one splits k.
#include "cublaslt.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <cuda_bf16.h>

#include "shim.h"

using namespace pyllmc::lt;

namespace pyllmc::lt {

struct HandleOpaque {};
struct LayoutOpaque {
    DataType type;
    uint64_t rows, columns;
    int64_t ld;

    uint64_t item() const { return type == R_16BF ? 2 : 4; }
    uint64_t bytes() const { return ((columns - 1) * static_cast<uint64_t>(ld) + rows) * item(); }
};
struct DescOpaque {
    ComputeType compute;
    Operation a = N, b = N;
    Epilogue epilogue = DEFAULT;
    void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_ld = 0;
};
struct PreferenceOpaque {
    uint64_t workspace = 0;
    uint32_t reduction = 7, alignment[4] = {256, 256, 256, 256};
};

}  // namespace pyllmc::lt

namespace {

constexpr uint64_t MAGIC = 0x636d6c6c7970;
constexpr int ALGORITHMS = 4;
constexpr size_t WORKSPACE = 1 << 20;  // what every second algorithm wants, for a k that it splits

// For the tests: algorithms that take longer, epilogues that there are not, the version.
unsigned slow = 0, refused = 0;
constexpr unsigned AS_INVALID = 1u << 31, AT_THE_CALL = 1u << 30;
constexpr auto INTERNAL_ERROR = static_cast<Status>(14);
size_t version = 130101;
std::string reason;

Status invalid(const char* why) {
    reason = std::string("CUBLAS_STATUS_INVALID_VALUE: ") + why;
    return INVALID_VALUE;
}

Status unsupported(const char* why) {
    reason = std::string("CUBLAS_STATUS_NOT_SUPPORTED: ") + why;
    return NOT_SUPPORTED;
}

bool aligned(const void* data, uint64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

// While a graph is captured the real one of CUDA 13.3 cannot find out what it runs on, so it names no algorithms.
bool capturing() {
    reason = "CUBLAS_STATUS_INTERNAL_ERROR: a graph is captured";
    return shim::not_captured() != cudaSuccess;
}

// Whether this is a product at all, and one that is used.
Status check(const DescOpaque& desc, const LayoutOpaque& a, const LayoutOpaque& b, const LayoutOpaque& c,
             const LayoutOpaque& d) {
    for (const LayoutOpaque* each : {&a, &b, &c, &d}) {
        if (each->rows == 0 || each->columns == 0) return invalid("an empty matrix");
        if (each->ld < static_cast<int64_t>(each->rows)) return invalid("columns overlap");
    }
    const uint64_t m = desc.a == T ? a.columns : a.rows, k = desc.a == T ? a.rows : a.columns;
    if ((desc.b == T ? b.columns : b.rows) != k || d.rows != m || d.columns != (desc.b == T ? b.rows : b.columns))
        return invalid("the shapes do not fit");
    if (c.type != d.type || c.rows != d.rows || c.columns != d.columns || c.ld != d.ld) return invalid("C is not as D");
    if (a.type != b.type) return unsupported("A and B of different types");
    if (d.type != a.type && (d.type != R_32F || desc.epilogue != DEFAULT)) return unsupported("this type of D");
    if (desc.compute == COMPUTE_32F_FAST_TF32 && a.type != R_32F) return unsupported("TF32 of another type");
    if (desc.epilogue == DEFAULT) return SUCCESS;
    if (refused & desc.epilogue && !(refused & AT_THE_CALL))
        return refused & AS_INVALID ? invalid("refused") : unsupported("refused");
    for (const LayoutOpaque* each : {&a, &b, &d})
        if (static_cast<uint64_t>(each->ld) * each->item() % 16) return unsupported("an epilogue with such columns");
    const bool forward = desc.a == T && desc.b == N;
    switch (desc.epilogue) {
        case BIAS:
            if (!forward) return unsupported("bias in another product than forward's");
            break;
        case DGELU:
            if (desc.a != N || desc.b != N) return unsupported("DGELU in another product than dinp's");
            break;
        case BGRADB:
            if (desc.a != N || desc.b != T) return unsupported("BGRADB in another product than dweight's");
            break;
        default: return invalid("an unknown epilogue");
    }
    if (desc.epilogue != BIAS && a.type == R_32F && desc.compute == COMPUTE_32F)
        return unsupported("this epilogue in strict float32");
    const bool with_aux = desc.epilogue & 128;
    if (with_aux && (desc.aux_ld % 8 || desc.aux_ld < static_cast<int64_t>(d.rows))) return invalid("aux's columns");
    if (with_aux && (!desc.aux || !aligned(desc.aux, 16))) return invalid("aux's address");
    const bool with_bias = desc.epilogue & (BIAS | BGRADB);
    if (with_bias && (!desc.bias || !aligned(desc.bias, 16))) return invalid("bias's address");
    return SUCCESS;
}

uint64_t fingerprint(const DescOpaque& desc, const LayoutOpaque& a, const LayoutOpaque& b, const LayoutOpaque& d) {
    uint64_t hash = 1469598103934665603u;
    for (uint64_t part : {uint64_t(desc.compute), uint64_t(desc.a), uint64_t(desc.b), uint64_t(desc.epilogue), a.rows,
                          a.columns, uint64_t(a.ld), uint64_t(a.type), b.rows, b.columns, uint64_t(b.ld), d.rows,
                          d.columns, uint64_t(d.ld), uint64_t(d.type)})
        hash = (hash ^ part) * 1099511628211u;
    return hash;
}

Status check_algorithm(const Algorithm& algorithm, const DescOpaque& desc, const LayoutOpaque& a, const LayoutOpaque& b,
                       const LayoutOpaque& d) {
    if (algorithm.data[0] != MAGIC || algorithm.data[2] >= ALGORITHMS) return invalid("not an algorithm");
    if (algorithm.data[1] != fingerprint(desc, a, b, d)) return invalid("an algorithm of another product");
    return SUCCESS;
}

float as_float(DataType type, const void* data, uint64_t i) {
    if (type == R_16BF) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
}

void put(DataType type, void* data, uint64_t i, float x) {
    if (type == R_16BF)
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
    else
        static_cast<float*>(data)[i] = x;
}

float tf32(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
    std::memcpy(&x, &bits, sizeof bits);
    return x;
}

float gelu_slope(float x) {
    const float t = std::tanh(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
}

// As rows of floats: (columns, rows) of the matrix, or transposed.
std::vector<float> floats(const LayoutOpaque& layout, const void* data, bool transposed, bool as_tf32) {
    std::vector<float> all(layout.rows * layout.columns);
    for (uint64_t j = 0; j < layout.columns; ++j)
        for (uint64_t i = 0; i < layout.rows; ++i) {
            const float x = as_float(layout.type, data, j * static_cast<uint64_t>(layout.ld) + i);
            all[transposed ? i * layout.columns + j : j * layout.rows + i] = as_tf32 ? tf32(x) : x;
        }
    return all;
}

#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("O3")))
#endif
void add_scaled(float* sums, const float* x, float factor, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) sums[i] += factor * x[i];
}

bool overlap(const void* x, uint64_t x_bytes, const void* y, uint64_t y_bytes) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(x), b = reinterpret_cast<uintptr_t>(y);
    return x && y && a < b + y_bytes && b < a + x_bytes;
}

template <class T>
bool take(T& to, const void* data, size_t size) {
    if (size != sizeof to || data == nullptr) return false;
    std::memcpy(&to, data, size);
    return true;
}

}  // namespace

EXPORTED size_t cublasLtGetVersion() { return version; }

EXPORTED const char* cublasLtGetStatusName(Status status) { return status == SUCCESS ? "success" : reason.c_str(); }

EXPORTED Status cublasLtCreate(Handle* handle) {
    *handle = new HandleOpaque;
    return SUCCESS;
}

EXPORTED Status cublasLtMatrixLayoutCreate(Layout* layout, DataType type, uint64_t rows, uint64_t columns, int64_t ld) {
    if (type != R_32F && type != R_16BF) return invalid("a type that is not used");
    *layout = new LayoutOpaque{type, rows, columns, ld};
    return SUCCESS;
}

EXPORTED Status cublasLtMatrixLayoutDestroy(Layout layout) {
    delete layout;
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulDescCreate(Desc* desc, ComputeType compute, DataType scale) {
    if (compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_TF32) return invalid("a compute type that is not used");
    if (scale != R_32F) return invalid("a scale type that is not used");
    *desc = new DescOpaque{};
    (*desc)->compute = compute;
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulDescDestroy(Desc desc) {
    delete desc;
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulDescSetAttribute(Desc desc, DescAttribute attribute, const void* data, size_t size) {
    bool good = false;
    switch (attribute) {
        case DESC_TRANSA: good = take(desc->a, data, size) && (desc->a == N || desc->a == T); break;
        case DESC_TRANSB: good = take(desc->b, data, size) && (desc->b == N || desc->b == T); break;
        case DESC_EPILOGUE: good = take(desc->epilogue, data, size); break;
        case DESC_BIAS_POINTER: good = take(desc->bias, data, size); break;
        case DESC_AUX_POINTER: good = take(desc->aux, data, size); break;
        case DESC_AUX_LD: good = take(desc->aux_ld, data, size); break;
    }
    return good ? SUCCESS : invalid("an attribute of a product");
}

EXPORTED Status cublasLtMatmulPreferenceCreate(Preference* preference) {
    *preference = new PreferenceOpaque;
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulPreferenceDestroy(Preference preference) {
    delete preference;
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulPreferenceSetAttribute(Preference preference, PreferenceAttribute attribute,
                                                     const void* data, size_t size) {
    bool good = false;
    switch (attribute) {
        case PREFERENCE_MAX_WORKSPACE_BYTES: good = take(preference->workspace, data, size); break;
        case PREFERENCE_REDUCTION_SCHEME_MASK: good = take(preference->reduction, data, size); break;
        case PREFERENCE_MIN_ALIGNMENT_A_BYTES:
        case PREFERENCE_MIN_ALIGNMENT_B_BYTES:
        case PREFERENCE_MIN_ALIGNMENT_C_BYTES:
        case PREFERENCE_MIN_ALIGNMENT_D_BYTES:
            good = take(preference->alignment[attribute - PREFERENCE_MIN_ALIGNMENT_A_BYTES], data, size);
            break;
    }
    return good ? SUCCESS : invalid("an attribute of a preference");
}

EXPORTED Status cublasLtMatmulAlgoGetHeuristic(Handle handle, Desc desc, Layout a, Layout b, Layout c, Layout d,
                                               Preference preference, int most, Candidate* candidates, int* found) {
    *found = 0;
    if (handle == nullptr || most < 1) return invalid("a handle, a number of algorithms");
    if (capturing()) return INTERNAL_ERROR;
    if (preference->reduction & ~REDUCTION_SCHEME_COMPUTE_TYPE) return invalid("sums in the output's type");
    if (const Status status = check(*desc, *a, *b, *c, *d); status != SUCCESS) return status;
    if (desc->epilogue != DEFAULT)
        for (uint32_t each : preference->alignment)
            if (each < 16) return unsupported("an epilogue with such addresses");
    for (int i = 0; i < ALGORITHMS && *found < most; ++i) {
        const size_t workspace = i % 2 ? WORKSPACE : 0;
        if (workspace > preference->workspace || (workspace != 0 && preference->reduction == 0)) continue;
        Candidate candidate{};
        candidate.algorithm.data[0] = MAGIC;
        candidate.algorithm.data[1] = fingerprint(*desc, *a, *b, *d);
        candidate.algorithm.data[2] = static_cast<uint64_t>(i);
        for (int j = 0; j < 4; ++j) candidate.algorithm.data[3 + j] = preference->alignment[j];
        candidate.workspace = workspace;
        candidates[(*found)++] = candidate;
    }
    return SUCCESS;
}

EXPORTED Status cublasLtMatmulAlgoCheck(Handle, Desc desc, Layout a, Layout b, Layout c, Layout d,
                                        const Algorithm* algorithm, Candidate* result) {
    if (capturing()) return INTERNAL_ERROR;
    if (const Status status = check(*desc, *a, *b, *c, *d); status != SUCCESS) return status;
    result->workspace = algorithm->data[2] % 2 ? WORKSPACE : 0;
    return check_algorithm(*algorithm, *desc, *a, *b, *d);
}

namespace {

// All that a call is told, which may be used again when the call is over.
struct Call {
    DescOpaque desc;
    LayoutOpaque of_a, of_b, of_c, of_d;
    const void *a, *b, *c;
    void *d, *workspace;
    size_t workspace_bytes;
    Algorithm algorithm;
    float factor, keep;
};

Status check(const Call& of) {
    if (const Status status = check(of.desc, of.of_a, of.of_b, of.of_c, of.of_d); status != SUCCESS) return status;
    if (const Status status = check_algorithm(of.algorithm, of.desc, of.of_a, of.of_b, of.of_d); status != SUCCESS)
        return status;
    if (of.algorithm.data[2] % 2 && (of.workspace_bytes < WORKSPACE || of.workspace == nullptr))
        return invalid("the workspace");
    const void* const addresses[] = {of.a, of.b, of.c, of.d};
    for (int i = 0; i < 4; ++i)
        if (!aligned(addresses[i], of.algorithm.data[3 + i])) return invalid("an address is less aligned than was said");
    if (refused & AT_THE_CALL && refused & of.desc.epilogue) return unsupported("refused at the call");
    if (of.factor != 1.0f || (of.keep != 0.0f && of.keep != 1.0f)) return invalid("factors that are not used");
    const uint64_t d_bytes = of.of_d.bytes();
    if (overlap(of.d, d_bytes, of.a, of.of_a.bytes()) || overlap(of.d, d_bytes, of.b, of.of_b.bytes()))
        return invalid("D overlaps");
    if (of.c != of.d && overlap(of.d, d_bytes, of.c, d_bytes)) return invalid("C overlaps D");
    return SUCCESS;
}

void multiply(const Call& of) {
    const DescOpaque& desc = of.desc;
    const LayoutOpaque &of_a = of.of_a, &of_b = of.of_b, &of_c = of.of_c, &of_d = of.of_d;
    const uint64_t number = of.algorithm.data[2];
    const uint64_t m = of_d.rows, n = of_d.columns, k = desc.a == T ? of_a.rows : of_a.columns;
    const bool as_tf32 = desc.compute == COMPUTE_32F_FAST_TF32;
    const std::vector<float> x = floats(of_a, of.a, desc.a == T, as_tf32), y = floats(of_b, of.b, desc.b == N, as_tf32);
    const uint64_t block = uint64_t{32} << number;
    std::vector<float> sums(m), part(m);
    for (uint64_t j = 0; j < n; ++j) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (uint64_t first = 0; first < k; first += block) {
            std::fill(part.begin(), part.end(), 0.0f);
            for (uint64_t l = first; l < std::min(first + block, k); ++l)
                add_scaled(part.data(), x.data() + l * m, y[l * n + j], m);
            add_scaled(sums.data(), part.data(), 1.0f, m);
        }
        for (uint64_t i = 0; i < m; ++i) {
            const uint64_t at = j * static_cast<uint64_t>(of_d.ld) + i;
            float value = sums[i];
            if (of.keep != 0.0f) value += as_float(of_c.type, of.c, at);
            if (number % 2 && desc.epilogue != DEFAULT) {  // a kernel of its own, behind one that has stored its sums
                put(of_d.type, of.d, at, value);
                value = as_float(of_d.type, of.d, at);
            }
            if (desc.epilogue & BIAS) value += as_float(of_d.type, desc.bias, i);
            if (desc.epilogue == DGELU)
                value *= gelu_slope(as_float(of_d.type, desc.aux, j * static_cast<uint64_t>(desc.aux_ld) + i));
            put(of_d.type, of.d, at, value);
        }
        if (desc.epilogue == BGRADB) {
            float sum = 0.0f;
            for (uint64_t l = 0; l < k; ++l) sum += y[l * n + j];
            put(of_d.type, desc.bias, j, sum);
        }
    }
    if (slow >> number & 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

}  // namespace

EXPORTED Status cublasLtMatmul(Handle handle, Desc desc, const void* alpha, const void* a, Layout a_layout,
                               const void* b, Layout b_layout, const void* beta, const void* c, Layout c_layout,
                               void* d, Layout d_layout, const Algorithm* algorithm, void* workspace,
                               size_t workspace_bytes, cudaStream_t stream) {
    if (handle == nullptr || algorithm == nullptr) return invalid("a handle, an algorithm");
    Call call{*desc, *a_layout, *b_layout, *c_layout, *d_layout, a, b, c, d, workspace, workspace_bytes, *algorithm, 0, 0};
    std::memcpy(&call.factor, alpha, sizeof call.factor);
    std::memcpy(&call.keep, beta, sizeof call.keep);
    if (const Status status = check(call); status != SUCCESS) return status;
    shim::perform(stream, [=] {
        multiply(call);
        return cudaSuccess;
    });
    return SUCCESS;
}

// ---- for the tests, through ctypes -----------------------------------------------------------------------------------

// Algorithms of these bits take 2 ms longer; there are no epilogues that have one of these bits, which AS_INVALID calls
// invalid values, and for which AT_THE_CALL names algorithms before it refuses them; the version.
EXPORTED void shim_cublaslt_slow(unsigned bits) { slow = bits; }
EXPORTED void shim_cublaslt_refuse(unsigned bits) { refused = bits; }
EXPORTED void shim_cublaslt_version(size_t number) { version = number; }
