// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Sums that many threads add to: as fast as the GPU can, or in fixed point, where the order of adding does not matter.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/launch.cuh"

namespace dcn::cuda {

// to[i] += values[i], each atomically, in any order. `to` lies in global memory and is aligned to N values.
template <typename A, int N>
__device__ __forceinline__ void add_vector(A* to, const A (&values)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool vectors = std::is_same_v<A, float> && N % 4 == 0;
#else
  constexpr bool vectors = false;
#endif
  if constexpr (vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + i)),
                   "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
                   : "memory");
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(to + i, values[i]);
  }
}

// The exponent of a number: the least e of its type with |value| < 2^e, or kNotFinite.
constexpr int kNotFinite = 1 << 20;
template <typename A>
__device__ __forceinline__ int exponent_of(A value) {
  if constexpr (std::is_same_v<A, double>) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const int biased = static_cast<int>(bits >> 52 & 0x7ff);
    return biased == 0x7ff ? kNotFinite : biased - 1022;
  } else {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const int biased = static_cast<int>(bits >> 23 & 0xff);
    return biased == 0xff ? kNotFinite : biased - 126;
  }
}

// An exponent as a number that is never negative, so that 0 stands below all of them.
constexpr int kExponentBias = 2048;

// Fixed point in 64 bits: whole numbers add up to the same sum in every order, on every GPU.
//
// For sums of at most 2^log2_terms terms below 2^exponent in magnitude. A unit is 2^(exponent + log2_terms - 62), or
// more where the type A has no such small numbers. A term is rounded to half a unit, so that a sum of n terms is off by
// at most n * 2^(exponent + log2_terms - 63): with 2^16 terms and float32 results, less than their own rounding.
template <typename A>
struct FixedPoint {
  A scale = 1, unit = 1;  // powers of two; their product is 1
  bool finite = true;     // whether the terms are; otherwise all sums are NaN

  FixedPoint() = default;

  __device__ __forceinline__ FixedPoint(int exponent, int log2_terms) : finite(exponent <= kMost + 2) {
    const int shift = 62 - log2_terms - exponent;
    const int least = shift < kMost ? shift : kMost, within = least > -kMost ? least : -kMost;
    scale = std::ldexp(A(1), within), unit = std::ldexp(A(1), -within);
  }
  // For terms that are products of two numbers. `codes` holds the exponents of both as find_largest_exponent writes
  // them; 0 stands for a number that is always 1.
  __device__ __forceinline__ FixedPoint(const int* codes, int log2_terms)
      : FixedPoint((codes[0] ? codes[0] - kExponentBias : 0) + (codes[1] ? codes[1] - kExponentBias : 0), log2_terms) {}

  __device__ __forceinline__ unsigned long long fixed(A value) const {
    return static_cast<unsigned long long>(std::llrint(value * scale));
  }
  __device__ __forceinline__ A value(unsigned long long sum) const {
    return finite ? static_cast<A>(static_cast<long long>(sum)) * unit : static_cast<A>(NAN);
  }

 private:
  static constexpr int kMost = std::is_same_v<A, double> ? 1022 : 126;
};

inline int log2_ceil(int64_t count) {
  int log2 = 0;
  while (log2 < 62 && int64_t{1} << log2 < count) ++log2;
  return log2;
}

// Sums that many threads add to. Either in floating point, in `values`, where the result depends on the order of
// adding; or in fixed point, in `fixed`, where it has the same bits in every run. They begin with zeros. Both pointers
// are null where sums are not needed.
template <typename A>
struct Sums {
  A* values;
  unsigned long long* fixed;

  __device__ __forceinline__ bool needed() const { return values || fixed; }

  template <int N>
  __device__ __forceinline__ void add(int64_t at, const A (&terms)[N], const FixedPoint<A>& point) const {
    if (fixed) {
#pragma unroll
      for (int i = 0; i < N; ++i) atomicAdd(fixed + at + i, point.fixed(terms[i]));
    } else {
      add_vector(values + at, terms);
    }
  }
};

constexpr int kExponentThreads = 256;
constexpr int64_t kExponentBlocks = 512;

// *code = kExponentBias + the largest exponent of `values`. It must be 0 before.
template <typename T>
__global__ void __launch_bounds__(kExponentThreads, 1)
    largest_exponent_kernel(const T* values, const int64_t count, int* code) {
  int largest = 0;
  for (int64_t i = int64_t{blockIdx.x} * kExponentThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kExponentThreads) {
    const int found = exponent_of(static_cast<Accumulate<T>>(values[i])) + kExponentBias;
    largest = largest > found ? largest : found;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = largest > other ? largest : other;
  }
  if (threadIdx.x % kWarp == 0) atomicMax(code, largest);
}

// Launches largest_exponent_kernel for `tensor`, which is dense.
template <typename T, typename Stream>
void find_largest_exponent(const Tensor& tensor, int* code, Stream stream) {
  if (tensor.numel() == 0) return;
  DCN_LAUNCH(largest_exponent_kernel<T>,
             std::min({divide_up(tensor.numel(), kExponentThreads), kExponentBlocks, kMaxBlocks}), kExponentThreads,
             stream, tensor.const_data_ptr<T>(), static_cast<int64_t>(tensor.numel()), code);
}

}  // namespace dcn::cuda
