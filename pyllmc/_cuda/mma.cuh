// Tensor cores and what feeds them: one device function per PTX instruction, as plain C++ without a GPU.
//
// Matrices of 16 x 16 and 16 x 8 elements lie spread over a warp, as the PTX ISA fixes it for mma.m16n8k16. Of lane l,
// with g = l / 4 and q = l % 4; a register holds two bfloat16, the lower half first:
//     Left   (16 x 16)  [0] row g, columns 2q and 2q + 1   [1] row g + 8   [2], [3] those rows, columns + 8
//     right  (16 x 8)   b0: rows 2q and 2q + 1, column g   b1: rows + 8
//     Sum    (16 x 8)   [0], [1] row g, columns 2q and 2q + 1   [2], [3] row g + 8
// So a Sum of two neighbouring products, packed, is a Left: what one product gives, the next one takes.
// Called by attention.cu; tests/cuda_shim/fragments.cu holds the plain C++ below to it.
#pragma once

#include "common.cuh"

namespace pyllmc {

struct Left {
    uint32_t x[4];
};

struct Sum16x8 {
    float x[4];
};

// Two neighbouring right operands, 16 x 16 in all: x[0], x[1] are b0, b1 of the first, x[2], x[3] of the second.
struct RightPair {
    uint32_t x[4];
};

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices of 8 x 8 from shared memory: the rows of the i-th start where lanes 8i .. 8i + 7 say, 16-byte aligned.
// Register i gets of the i-th matrix row g, columns 2q and 2q + 1.
template <class Fragment>
__device__ __forceinline__ Fragment load_matrices(const bf16* row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(shared_address(row))
                 : "memory");
    return f;
}

// The same, each matrix transposed: register i gets column g, rows 2q and 2q + 1.
template <class Fragment>
__device__ __forceinline__ Fragment load_transposed(const bf16* row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3])
                 : "r"(shared_address(row))
                 : "memory");
    return f;
}

// sum += left right, in float.
__device__ __forceinline__ void multiply(Sum16x8& sum, const Left& left, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(b0), "r"(b1));
}

// Starts to copy 16 bytes to shared memory, zeros unless `valid`. There they are after wait_for_copies, for this
// thread, and after a barrier as well for the others.
__device__ __forceinline__ void copy_ahead(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// Waits for all copies that this thread has started.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two floats as bfloat16 in one register, the first in the lower half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// From block to block, in a flag that one thread writes and one thread of the other block reads: what the first block
// has written before the barrier ahead of publish, the second sees after the barrier behind wait_for.
__device__ __forceinline__ void publish(int* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_for(const int* flag, int value) {
    for (int seen;;) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
        if (seen == value) return;
        __nanosleep(20);
    }
}

#else

struct MatrixLoad {
    const bf16* row;
    uint32_t* registers;
};

template <class Fragment>
Fragment load_8x8(const bf16* row, bool transposed) {
    Fragment f;
    MatrixLoad mine{row, f.x};
    shim::together(mine, [&](MatrixLoad* const* lanes) {
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, q = 2 * (lane % 4);
                bf16 two[2];
                for (int j = 0; j < 2; ++j)
                    two[j] = transposed ? lanes[8 * i + q + j]->row[g] : lanes[8 * i + g]->row[q + j];
                std::memcpy(&lanes[lane]->registers[i], two, sizeof two);
            }
    });
    return f;
}

template <class Fragment>
Fragment load_matrices(const bf16* row) { return load_8x8<Fragment>(row, false); }

template <class Fragment>
Fragment load_transposed(const bf16* row) { return load_8x8<Fragment>(row, true); }

struct Multiply {
    Sum16x8* sum;
    const Left* left;
    uint32_t b[2];
};

inline float half_of(uint32_t both, int i) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(both >> 16 * i)));
}

inline void multiply(Sum16x8& sum, const Left& left, uint32_t b0, uint32_t b1) {
    Multiply mine{&sum, &left, {b0, b1}};
    shim::together(mine, [](Multiply* const* lanes) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, q = 2 * (lane % 4);
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 2; ++j) a[g + i % 2 * 8][q + i / 2 * 8 + j] = half_of(lanes[lane]->left->x[i], j);
            for (int i = 0; i < 2; ++i)
                for (int j = 0; j < 2; ++j) b[q + i * 8 + j][g] = half_of(lanes[lane]->b[i], j);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
                float total = lanes[lane]->sum->x[i];
                for (int k = 0; k < 16; ++k) total += a[row][k] * b[k][column];
                lanes[lane]->sum->x[i] = total;
            }
    });
}

inline void copy_ahead(void* shared, const void* global, bool valid) {
    shim::copy_ahead(shared, global, 16, valid);
}

inline void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    shim::wait_for_copies(file, line);
}

inline uint32_t pack(float low, float high) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

inline void publish(int* flag, int value) { *flag = value; }

// Blocks run one after the other: what is not there now never comes.
inline void wait_for(const int* flag, int value) {
    if (*flag != value) shim::stuck("a block waits for one that comes after it");
}

#endif

// Two neighbouring sums, rounded, as the left operand of the next product.
__device__ __forceinline__ Left as_left(const Sum16x8& a, const Sum16x8& b) {
    return {{pack(a.x[0], a.x[1]), pack(a.x[2], a.x[3]), pack(b.x[0], b.x[1]), pack(b.x[2], b.x[3])}};
}

}  // namespace pyllmc
