// For tests/test_cuda_attention.py: what pyllmc/_cuda/mma.cuh does with matrices, element by element. Registers are
// filled and read by the figures of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix"), not by its own code.
#include "../../pyllmc/_cuda/mma.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace pyllmc {
namespace {

uint32_t two(const uint16_t* elements, int at, int distance) {
    return elements[at] | static_cast<uint32_t>(elements[at + distance]) << 16;
}

// a (16, 16), b (16, 8), sum (16, 8)
void multiply_kernel(const uint16_t* a, const uint16_t* b, float* sum) {
    const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
    Left left;
    for (int i = 0; i < 4; ++i) {  // of the pair i: row, first column
        const int row = i == 0 || i == 2 ? group : group + 8, column = member * 2 + (i < 2 ? 0 : 8);
        left.x[i] = two(a, row * 16 + column, 1);
    }
    Sum16x8 c;
    for (int i = 0; i < 4; ++i) c.x[i] = sum[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
    multiply(c, left, two(b, member * 2 * 8 + group, 8), two(b, (member * 2 + 8) * 8 + group, 8));
    for (int i = 0; i < 4; ++i) sum[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = c.x[i];
}

// four matrices (4, 8, 8) -> the registers (32 lanes, 4, 2)
void load_kernel(const uint16_t* matrices, uint16_t* registers, int transposed) {
    SHARED(bf16, tile, [4 * 8 * 8]);
    for (int i = threadIdx.x; i < 4 * 8 * 8; i += 32) tile[i].bits = matrices[i];
    __syncwarp();
    const bf16* const row = tile + threadIdx.x * 8;
    const Left loaded = transposed ? load_transposed<Left>(row) : load_matrices<Left>(row);
    std::memcpy(registers + threadIdx.x * 8, loaded.x, 16);
}

// 32 vectors of 16 bytes, copied ahead; each lane that is not `valid` gets zeros. `seen` is what lies there before the
// copies are waited for.
void copy_kernel(const int4* from, const int* valid, int4* seen, int4* to) {
    SHARED(int4, tile, [32]);
    copy_ahead(&tile[threadIdx.x], from + threadIdx.x, valid[threadIdx.x] != 0);
    seen[threadIdx.x] = tile[threadIdx.x];
    wait_for_copies();
    to[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

EXPORTED int fragments_multiply(const uint16_t* a, const uint16_t* b, float* sum) {
    return shim::launch(multiply_kernel, 1, 32, 0, nullptr, a, b, sum);
}

EXPORTED int fragments_load(const uint16_t* matrices, uint16_t* registers, int transposed) {
    return shim::launch(load_kernel, 1, 32, 0, nullptr, matrices, registers, transposed);
}

EXPORTED int fragments_copy(const int4* from, const int* valid, int4* seen, int4* to) {
    return shim::launch(copy_kernel, 1, 32, 0, nullptr, from, valid, seen, to);
}

}  // namespace pyllmc
