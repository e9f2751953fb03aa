// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The instructions behind the tensor-core kernels, as functions: tests/emulation has the same functions for the CPU.
// The functions that move or multiply matrices are for whole warps: all lanes call them together.
//
// Fragments are those of PTX's mma.m16n8k16 (16-bit operands) and mma.m16n8k8 (tf32). Both take 32 bytes of every row
// at a time, so that in bytes they are the same: with g = lane / 4 and t = lane % 4, words of 4 bytes,
//   a[0..3] = A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]      A is 16 rows of 8 words
//   b[0..1] = B[g][t], B[g][t + 4]                                    B is 8 columns of 8 words each
//   sum[0..3] = C[g][2 t], C[g][2 t + 1], C[g + 8][2 t], C[g + 8][2 t + 1]
#pragma once

#include "cuda/launch.cuh"

namespace dcn::cuda {

// How products are formed. kTF32 rounds float32 operands to 11 bits; kFloat32 splits each into two such halves and
// leaves out only the product of the two lower halves.
enum class Kind { kHalf, kBFloat16, kTF32, kFloat32 };

// The 16 bytes that are loaded, stored and copied at a time.
struct alignas(16) Chunk {
  uint32_t word[4];
};
constexpr int kChunkBytes = 16;
// As many chunks as an index of 32 bits can name.
constexpr int64_t kMostChunks = (int64_t{1} << 32) - 1;

}  // namespace dcn::cuda

#if defined(DCN_EMULATE)
#include "emulate_mma.h"
#else
#include <cuda_fp16.h>

// Older GPUs lack these instructions. Entry points launch nothing there that needs them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define DCN_ASM(...) asm volatile(__VA_ARGS__)
#else
#define DCN_ASM(...) __trap()
#endif

namespace dcn::cuda {

// An address in shared memory.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// blockIdx.x. The compiler does not know that it is the same every time, so it keeps nothing that is computed from it
// in registers through a loop.
__device__ __forceinline__ unsigned block_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
// threadIdx.x, likewise.
__device__ __forceinline__ unsigned thread_index() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// Flips bits of an address.
__device__ __forceinline__ SharedAddress flip(SharedAddress address, unsigned bits) { return address ^ bits; }

// All 64 bits of a product, in one instruction whatever the compiler has made of its factors.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Loads a chunk of global memory. No kernel may write it meanwhile.
__device__ __forceinline__ Chunk load_chunk(const void* address) {
  const uint4 loaded = __ldg(static_cast<const uint4*>(address));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
}
// Loads a chunk if `wanted`. If not, the chunk stays what it is, and the address may lie anywhere.
__device__ __forceinline__ void load_chunk_if(Chunk& chunk, const void* address, uint32_t wanted) {
  asm("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(chunk.word[0]), "+r"(chunk.word[1]), "+r"(chunk.word[2]), "+r"(chunk.word[3])
      : "l"(address), "r"(wanted));
}
// A chunk of zeros, written only in the branch that asks for it. The compiler would write plain zeros in all cases, to
// save the branch.
__device__ __forceinline__ Chunk zero_chunk() {
  Chunk chunk;
#pragma unroll
  for (uint32_t& word : chunk.word) asm volatile("mov.u32 %0, 0;" : "=r"(word));
  return chunk;
}
__device__ __forceinline__ void store_chunk(void* address, const Chunk& chunk) {
  *static_cast<uint4*>(address) = make_uint4(chunk.word[0], chunk.word[1], chunk.word[2], chunk.word[3]);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// Takes the two 16-bit floats out of a word, the lower bits first. `pack` puts them back, rounded to the nearest.
template <Kind kKind>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (kKind == Kind::kBFloat16) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
}
template <Kind kKind>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word = 0;
  if constexpr (kKind == Kind::kBFloat16) {
    DCN_ASM("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    DCN_ASM("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// Both halves of the result are the lower (0) or the upper (1) half of a word.
__device__ __forceinline__ uint32_t both_halves(uint32_t word, int half) {
  return __byte_perm(word, 0, half == 0 ? 0x1010 : 0x3232);
}

// a * b + c of two 16-bit floats at a time, rounded once.
template <Kind kKind>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (kKind == Kind::kBFloat16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
#else
  __trap();
#endif
  return result;
}

// Loads kCount times four matrices of 8 rows of 16 bytes from shared memory. Lane 8 i + r gives the address of row r of
// matrix i. Each lane gets word t of row g of every matrix; with kTransposed, the 16-bit elements at rows 2 t and
// 2 t + 1 of column g.
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[kCount][4], const SharedAddress (&rows)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint32_t* m = matrices[i];
    if constexpr (kTransposed) {
      DCN_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(m[0]), "=r"(m[1]),
              "=r"(m[2]), "=r"(m[3]) : "r"(rows[i]) : "memory");
    } else {
      DCN_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]),
              "=r"(m[3]) : "r"(rows[i]) : "memory");
    }
  }
}

// Adds the products of kRows fragments a by kColumns fragments b to column `first` of the sums and those after it. With
// kFloat32, the operands are halves, see `split`.
template <Kind kKind, int kRows, int kAll, int kColumns>
__device__ __forceinline__ void multiply(float (&sum)[kRows][kAll][4], int first, const uint32_t (&a)[kRows][4],
                                         const uint32_t (&b)[kColumns][2]) {
#define DCN_MMA(instruction)                                                                                         \
  DCN_ASM("mma.sync.aligned." instruction                                                                            \
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]),                           \
          "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), \
          "r"(b[j][1]))
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float (&c)[4] = sum[i][first + j];
      if constexpr (kKind == Kind::kHalf) {
        DCN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
      } else if constexpr (kKind == Kind::kBFloat16) {
        DCN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
      } else {
        DCN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
      }
    }
  }
#undef DCN_MMA
}

// Copies a chunk from global to shared memory, or writes zeros if it does not exist. Copies have arrived once
// wait_copies has waited for the group that they were committed in. Other threads see them after the next barrier.
__device__ __forceinline__ void copy_async(SharedAddress shared, const void* global, bool exists = true) {
  DCN_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { DCN_ASM("cp.async.commit_group;" :: : "memory"); }
// Waits until at most kLeft groups of this thread's copies are under way.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  DCN_ASM("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#undef DCN_ASM

}  // namespace dcn::cuda
#endif
