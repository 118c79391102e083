// For tests/test_cuda_attention.py: what pyllmc/_cuda/mma.cuh does with matrices, element by element. Registers are
// filled and read by the figures of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix"), not by its own code.
#include "mma.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace pyllmc {
namespace {

__device__ uint32_t two(const uint16_t* elements, int at, int distance) {
    return elements[at] | static_cast<uint32_t>(elements[at + distance]) << 16;
}

// a (16, 16), b (16, 8), sum (16, 8)
__global__ void multiply_kernel(const uint16_t* a, const uint16_t* b, float* sum) {
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
__global__ void load_kernel(const uint16_t* matrices, uint32_t* registers, int transposed) {
    SHARED(bf16, tile, [4 * 8 * 8]);
    for (int i = threadIdx.x; i < 4 * 8 * 8; i += 32) tile[i] = __ushort_as_bfloat16(matrices[i]);
    __syncwarp();
    const bf16* const row = tile + threadIdx.x * 8;
    const Left loaded = transposed ? load_transposed<Left>(row) : load_matrices<Left>(row);
    for (int i = 0; i < 4; ++i) registers[threadIdx.x * 4 + i] = loaded.x[i];
}

// 32 vectors of 16 bytes, copied ahead; each lane that is not `valid` gets zeros. Where it `looks`, `seen` is what lies
// there before the copies are waited for.
__global__ void copy_kernel(const int4* from, const int* valid, int4* seen, int4* to, int looks) {
    SHARED(int4, tile, [32]);
    copy_ahead(&tile[threadIdx.x], from + threadIdx.x, valid[threadIdx.x] != 0);
    if (looks) seen[threadIdx.x] = tile[threadIdx.x];
    wait_for_copies();
    to[threadIdx.x] = tile[threadIdx.x];
}

// A host array in device memory for as long as this lives; what is written there comes back.
class OnDevice {
public:
    OnDevice(void* host, size_t bytes) : host(host), bytes(bytes), scratch(bytes) {
        CHECK(cudaMemcpyAsync(scratch.as<void>(), host, bytes, cudaMemcpyDefault, stream()));
    }
    ~OnDevice() {
        cudaMemcpyAsync(host, scratch.as<void>(), bytes, cudaMemcpyDefault, stream());
        cudaStreamSynchronize(stream());
    }
    template <class T>
    T* as() const {
        return scratch.as<T>();
    }

private:
    void* host;
    size_t bytes;
    Scratch scratch;
};

}  // namespace

EXPORTED void fragments_multiply(uint16_t* a, uint16_t* b, float* sum) {
    const OnDevice left(a, 16 * 16 * 2), right(b, 16 * 8 * 2), both(sum, 16 * 8 * 4);
    Launch(1, WARP)(multiply_kernel, left.as<uint16_t>(), right.as<uint16_t>(), both.as<float>());
}

EXPORTED void fragments_load(uint16_t* matrices, uint32_t* registers, int transposed) {
    const OnDevice from(matrices, 4 * 8 * 8 * 2), to(registers, 32 * 4 * 4);
    Launch(1, WARP)(load_kernel, from.as<uint16_t>(), to.as<uint32_t>(), transposed);
}

EXPORTED void fragments_copy(int4* vectors, int* valid, int4* seen, int4* arrived, int looks) {
    const OnDevice from(vectors, 32 * 16), which(valid, 32 * 4), early(seen, 32 * 16), to(arrived, 32 * 16);
    Launch(1, WARP)(copy_kernel, from.as<int4>(), which.as<int>(), early.as<int4>(), to.as<int4>(), looks);
}

}  // namespace pyllmc
