// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/mma.cuh for the CPU. What each lane gives to an instruction of a whole warp goes into the
// warp's exchange, and each lane takes its share of the result from there, by the layouts in the PTX manual.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <bit>

namespace dcn::cuda {

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* pointer) { return static_cast<unsigned char*>(pointer); }
inline unsigned block_index() { return blockIdx.x; }
inline unsigned thread_index() { return threadIdx.x; }
inline uint64_t multiply_wide(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

inline SharedAddress flip(SharedAddress address, unsigned bits) {
  return reinterpret_cast<SharedAddress>(reinterpret_cast<uintptr_t>(address) ^ bits);
}

inline Chunk load_chunk(const void* address) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % kChunkBytes == 0, "emulated kernel: a load is not aligned");
  return *static_cast<const Chunk*>(address);
}
inline void load_chunk_if(Chunk& chunk, const void* address, uint32_t wanted) {
  if (wanted) chunk = load_chunk(address);
}
inline Chunk zero_chunk() { return Chunk{}; }
inline void store_chunk(void* address, const Chunk& chunk) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(address) % kChunkBytes == 0, "emulated kernel: a store is not aligned");
  *static_cast<Chunk*>(address) = chunk;
}

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }

template <Kind kKind>
using Half = std::conditional_t<kKind == Kind::kBFloat16, torch::headeronly::BFloat16, torch::headeronly::Half>;
template <Kind kKind>
void unpack(uint32_t word, float& low, float& high) {
  using T = Half<kKind>;
  low = T(static_cast<uint16_t>(word & 0xffff), T::from_bits());
  high = T(static_cast<uint16_t>(word >> 16), T::from_bits());
}
template <Kind kKind>
uint32_t pack(float low, float high) {
  using T = Half<kKind>;
  return T(low).x | uint32_t{T(high).x} << 16;
}

inline uint32_t both_halves(uint32_t word, int half) {
  const uint32_t bits = half == 0 ? word & 0xffff : word >> 16;
  return bits | bits << 16;
}
template <Kind kKind>
uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  float low[3], high[3];
  unpack<kKind>(a, low[0], high[0]), unpack<kKind>(b, low[1], high[1]), unpack<kKind>(c, low[2], high[2]);
  // A float holds the product of two 16-bit floats exactly. The sum is rounded twice, which shows only next to a tie.
  return pack<kKind>(low[0] * low[1] + low[2], high[0] * high[1] + high[2]);
}
template <int kCount, bool kTransposed = false>
void load_matrices(uint32_t (&matrices)[kCount][4], const SharedAddress (&rows)[kCount]) {
  const auto lane = threadIdx.x % emulate::kWarpLanes;
  for (const SharedAddress row : rows) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(row) % kChunkBytes == 0, "emulated kernel: a row is not aligned");
  }
  const emulate::Exchange all = emulate::Machine::get().exchange_all(rows, sizeof(rows));
  for (int i = 0; i < kCount; ++i) {
    for (unsigned m = 0; m < 4; ++m) {
      const auto row = [&](unsigned r) { return (*all.from<SharedAddress[kCount]>(8 * m + r))[i]; };
      if (kTransposed) {
        uint16_t element[2];
        for (unsigned k = 0; k < 2; ++k) std::memcpy(&element[k], row(lane % 4 * 2 + k) + lane / 4 * 2, 2);
        matrices[i][m] = element[0] | uint32_t{element[1]} << 16;
      } else {
        std::memcpy(&matrices[i][m], row(lane / 4) + lane % 4 * 4, 4);
      }
    }
  }
}

// The elements of one word of an operand; tf32 operands lose the bits that the tensor cores ignore.
template <Kind kKind>
std::array<float, 2> elements(uint32_t word) {
  if constexpr (kKind == Kind::kHalf || kKind == Kind::kBFloat16) {
    std::array<float, 2> both;
    unpack<kKind>(word, both[0], both[1]);
    return both;
  } else {
    return {bits_to_float(word & 0xffffe000u), 0.0f};
  }
}

template <Kind kKind, int kRows, int kAll, int kColumns>
void multiply(float (&sum)[kRows][kAll][4], int first, const uint32_t (&a)[kRows][4],
              const uint32_t (&b)[kColumns][2]) {
  struct Fragments {
    uint32_t a[kRows][4], b[kColumns][2];
  };
  Fragments mine;
  std::memcpy(mine.a, a, sizeof(a)), std::memcpy(mine.b, b, sizeof(b));
  const emulate::Exchange all = emulate::Machine::get().exchange_all(&mine, sizeof(mine));
  const auto lane = threadIdx.x % emulate::kWarpLanes;
  const unsigned g = lane / 4, t = lane % 4;
  constexpr int kElements = kKind == Kind::kHalf || kKind == Kind::kBFloat16 ? 2 : 1;
  for (unsigned word = 0; word < 8; ++word) {  // the words of 32 bytes of each row
    for (int i = 0; i < kRows; ++i) {
      for (unsigned e = 0; e < 4; ++e) {
        const auto left = elements<kKind>(all.from<Fragments>(g * 4 + word % 4)->a[i][e / 2 + 2 * (word / 4)]);
        for (int j = 0; j < kColumns; ++j) {
          const unsigned column = 2 * t + e % 2;
          const auto right = elements<kKind>(all.from<Fragments>(column * 4 + word % 4)->b[j][word / 4]);
          for (int k = 0; k < kElements; ++k) sum[i][first + j][e] += left[k] * right[k];
        }
      }
    }
  }
}

inline void copy_async(SharedAddress shared, const void* global, bool exists = true) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(shared) % kChunkBytes == 0 &&
                      (!exists || reinterpret_cast<uintptr_t>(global) % kChunkBytes == 0),
                  "emulated kernel: a copy is not aligned");
  emulate::Machine::get().copy_later(shared, exists ? global : nullptr, kChunkBytes);
}
inline void commit_copies() { emulate::Machine::get().commit_copies(); }
template <int kLeft>
void wait_copies() {
  emulate::Machine::get().wait_copies(kLeft);
}

}  // namespace dcn::cuda
