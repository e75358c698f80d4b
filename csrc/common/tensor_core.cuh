// Tensor-core products of a warp and the loads that feed them (sm_80 and newer). tests/cuda_on_cpu/shim/common/
// tensor_core.cuh simulates them. PTX ISA, "Warp Level Matrix Instructions".
//
// D[16, 8] += A[16, K] * B[K, 8], where a 32-bit register holds P = K / 8 neighbours along K, the first in the lowest
// bits. With g = lane / 4 and t = lane % 4:
//   a[r]  holds A[g + 8 * (r % 2)][P * t + 4 * P * (r / 2) ..]
//   b[r]  holds B[P * t + 4 * P * r ..][g]
//   d[i]  is    D[g + 8 * (i / 2)][2 * t + i % 2]
#pragma once

#include <cstdint>

namespace fastembed::device {

#define FASTEMBED_MMA(name, shape_and_types, operation, Sum, constraint)                    \
  __device__ inline void name(Sum(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape_and_types operation                              \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));       \
  }

// Integer sums wrap around.
FASTEMBED_MMA(mma_s8_s8, "m16n8k32.row.col", ".s32.s8.s8.s32", int, "+r")
FASTEMBED_MMA(mma_u8_s8, "m16n8k32.row.col", ".s32.u8.s8.s32", int, "+r")
FASTEMBED_MMA(mma_s8_u8, "m16n8k32.row.col", ".s32.s8.u8.s32", int, "+r")
// The order of the sums is the hardware's.
FASTEMBED_MMA(mma_bf16, "m16n8k16.row.col", ".f32.bf16.bf16.f32", float, "+f")
FASTEMBED_MMA(mma_f16, "m16n8k16.row.col", ".f32.f16.f16.f32", float, "+f")
// Counts of the bits that differ, and of those set in both.
FASTEMBED_MMA(mma_b1_xor, "m16n8k256.row.col", ".s32.b1.b1.s32.xor.popc", int, "+r")
FASTEMBED_MMA(mma_b1_and, "m16n8k256.row.col", ".s32.b1.b1.s32.and.popc", int, "+r")

#undef FASTEMBED_MMA

#define FASTEMBED_LDMATRIX(name, transposed)                                                        \
  template <int matrices>                                                                           \
  __device__ inline void name(uint32_t (&registers)[matrices], const void* row) {                   \
    static_assert(matrices == 1 || matrices == 2 || matrices == 4);                                 \
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));                      \
    if constexpr (matrices == 1) {                                                                  \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" transposed ".shared.b16 {%0}, [%1];"             \
                   : "=r"(registers[0])                                                             \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
    } else if constexpr (matrices == 2) {                                                           \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" transposed ".shared.b16 {%0, %1}, [%2];"         \
                   : "=r"(registers[0]), "=r"(registers[1])                                         \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
    } else {                                                                                        \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" transposed ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                   : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) \
                   : "r"(address)                                                                   \
                   : "memory");                                                                     \
    }                                                                                               \
  }

// Loads `matrices` matrices of 8 rows of 16 bytes from shared memory: lane 8 * m + i names row i of matrix m by its
// address, aligned to 16 bytes, and registers[m] gets 4 bytes of matrix m: row lane / 4, from byte 4 * (lane % 4) on.
// Addresses in lanes past 8 * matrices are not used.
FASTEMBED_LDMATRIX(load_matrices, "")
// The same, but registers[m] gets two elements of 16 bits of column lane / 4: those of rows 2 * (lane % 4) and the
// next.
FASTEMBED_LDMATRIX(load_matrices_transposed, ".trans")

#undef FASTEMBED_LDMATRIX

}  // namespace fastembed::device
