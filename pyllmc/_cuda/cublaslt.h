// cuBLASLt as far as it is used here. The library is opened at run time (cublaslt.cu), so its header is not needed to
// build: these are its types and numbers, which have been the same from version 12 on.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace pyllmc::lt {

enum Status : int { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

enum DataType : int { R_32F = 0, R_16BF = 14 };
enum ComputeType : int { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum Operation : int32_t { N = 0, T = 1 };

// What happens to the sums of a product before they are stored. Matrices are column by column.
enum Epilogue : uint32_t {
    DEFAULT = 1,
    BIAS = 4,                  // + bias, one number for each row
    DGELU = 64 | 128,          // * gelu'(aux), in its tanh form
    BGRADB = 512,              // bias = sums of op(B) over k, one for each column of D
};

enum DescAttribute : int {
    DESC_TRANSA = 3,
    DESC_TRANSB = 4,
    DESC_EPILOGUE = 7,
    DESC_BIAS_POINTER = 8,
    DESC_AUX_POINTER = 11,
    DESC_AUX_LD = 12,
};

enum PreferenceAttribute : int {
    PREFERENCE_MAX_WORKSPACE_BYTES = 1,
    PREFERENCE_REDUCTION_SCHEME_MASK = 3,
    PREFERENCE_MIN_ALIGNMENT_A_BYTES = 5,
    PREFERENCE_MIN_ALIGNMENT_B_BYTES = 6,
    PREFERENCE_MIN_ALIGNMENT_C_BYTES = 7,
    PREFERENCE_MIN_ALIGNMENT_D_BYTES = 8,
};

// Where k is split: partial sums in float and added in a step of their own, never in the output's type. What is not
// split is in either mask.
constexpr uint32_t REDUCTION_SCHEME_NONE = 0, REDUCTION_SCHEME_COMPUTE_TYPE = 2;

using Handle = struct HandleOpaque*;
using Layout = struct LayoutOpaque*;
using Desc = struct DescOpaque*;
using Preference = struct PreferenceOpaque*;

// May be stored, and used again with the same version of the library.
struct Algorithm {
    uint64_t data[8];
};

struct Candidate {
    Algorithm algorithm;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

// The functions, each under its name without "cublasLt".
#define CUBLASLT_FUNCTIONS(X)                                                                                         \
    X(size_t, GetVersion, ())                                                                                         \
    X(const char*, GetStatusName, (Status))                                                                           \
    X(Status, Create, (Handle*))                                                                                      \
    X(Status, MatrixLayoutCreate, (Layout*, DataType, uint64_t rows, uint64_t columns, int64_t ld))                   \
    X(Status, MatrixLayoutDestroy, (Layout))                                                                          \
    X(Status, MatmulDescCreate, (Desc*, ComputeType, DataType scale))                                                 \
    X(Status, MatmulDescDestroy, (Desc))                                                                              \
    X(Status, MatmulDescSetAttribute, (Desc, DescAttribute, const void*, size_t))                                     \
    X(Status, MatmulPreferenceCreate, (Preference*))                                                                  \
    X(Status, MatmulPreferenceDestroy, (Preference))                                                                  \
    X(Status, MatmulPreferenceSetAttribute, (Preference, PreferenceAttribute, const void*, size_t))                   \
    X(Status, MatmulAlgoGetHeuristic,                                                                                 \
      (Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int most, Candidate*, int* found))           \
    X(Status, MatmulAlgoCheck, (Handle, Desc, Layout a, Layout b, Layout c, Layout d, const Algorithm*, Candidate*))  \
    X(Status, Matmul,                                                                                                 \
      (Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,               \
       const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace, size_t, cudaStream_t))

struct Functions {
#define X(result, name, parameters) result(*name) parameters;
    CUBLASLT_FUNCTIONS(X)
#undef X
};

}  // namespace pyllmc::lt
