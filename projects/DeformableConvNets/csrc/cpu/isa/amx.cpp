// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The kernels for x86-64 processors with matrix tiles for bfloat16 (AMX). Headers come before the target is set: what
// they define must run on every processor.
//
// This file is longer than 300 lines because all of it must be compiled for one target, which no other file may be.
#include "cpu/isa/amx_kernels.h"

#if defined(DCN_WITH_AMX)
#include <immintrin.h>

#include <algorithm>
#include <utility>

#define DCN_AMX_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(DCN_AMX_TARGET))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16,prefer-vector-width=512")
#endif

#define DCN_ISA amx
#define DCN_VECTOR_BYTES 64
#include "cpu/isa/vectors_impl.h"

namespace dcn::cpu::amx {
namespace {

// What the compiler must not move memory accesses across: it does not know what the tile instructions read and write.
[[gnu::always_inline]] inline void fence() { __asm__ volatile("" ::: "memory"); }

void begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  fence();
  _tile_loadconfig(&config);
  fence();
}

void end() { _tile_release(); }

using Floats = Vector<float>;
using Pairs = Vector<uint32_t>;  // of bfloat16: the first of a pair is the lower half

[[gnu::always_inline]] inline Floats first_values(Pairs pairs) { return __builtin_bit_cast(Floats, pairs << 16); }
[[gnu::always_inline]] inline Floats second_values(Pairs pairs) {
  return __builtin_bit_cast(Floats, pairs & 0xffff0000U);
}
// Rounds to the nearest, and what is half-way away from zero. NaNs must have come from bfloat16.
[[gnu::always_inline]] inline Pairs round_pairs(Floats first, Floats second) {
  const Pairs low = __builtin_bit_cast(Pairs, first) + 0x8000U, high = __builtin_bit_cast(Pairs, second) + 0x8000U;
  return low >> 16 | (high & 0xffff0000U);
}
[[gnu::always_inline]] inline __m512i round_two(Floats low, Floats high) {
  return __builtin_bit_cast(__m512i,
                            _mm512_cvtne2ps_pbh(__builtin_bit_cast(__m512, high), __builtin_bit_cast(__m512, low)));
}
[[gnu::always_inline]] inline Pairs load_pairs(const Bfloat16* from) {
  Pairs pairs;
  __builtin_memcpy(&pairs, from, sizeof(pairs));
  __asm__("" : "+v"(pairs));  // or compilers load twice what is used twice
  return pairs;
}
[[gnu::always_inline]] inline void store_pairs(Bfloat16* to, Pairs pairs) {
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}
[[gnu::always_inline]] inline Pairs load_some(const Bfloat16* from, __mmask32 mask) {
  return __builtin_bit_cast(Pairs, _mm512_maskz_loadu_epi16(mask, from));
}

[[gnu::always_inline]] inline Floats all_of(float value) { return __builtin_bit_cast(Floats, _mm512_set1_ps(value)); }

// The four neighbours of a sample.
struct Neighbours {
  const Bfloat16* row[4];
  Floats weight[4];

  [[gnu::always_inline]] Neighbours(const Bfloat16Channels& image, const TapSamples<float>& samples, int64_t p) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int32_t pixel = samples.pixel[k][p];
      row[k] = pixel == kNoPixel ? image.zeros : image.image + pixel * image.stride;
      weight[k] = all_of(samples.weight[k][p]);
    }
  }

  [[gnu::always_inline]] static Pairs sample(const Floats* weight, const Pairs& a, const Pairs& b, const Pairs& c,
                                             const Pairs& d) {
    const Floats first = weight[0] * first_values(a) + weight[1] * first_values(b) + weight[2] * first_values(c) +
                         weight[3] * first_values(d);
    const Floats second = weight[0] * second_values(a) + weight[1] * second_values(b) + weight[2] * second_values(c) +
                          weight[3] * second_values(d);
    return round_pairs(first, second);
  }
};

void gather(const Bfloat16Channels& from, const TapSamples<float>& samples, Bfloat16* columns, int64_t panel_stride) {
  const Bfloat16Channels image = from;  // a copy: what is stored below cannot be part of it
  const TapSamples<float> at = samples;
  const int64_t whole = image.channels / kPanelColumns * kPanelColumns, count = at.count;
  const auto tail = static_cast<__mmask32>((uint64_t{1} << (image.channels - whole)) - 1);
  for (int64_t p = 0; p < count; ++p, columns += kPanelColumns) {
    const Neighbours near(image, at, p);
    const Bfloat16 *a = near.row[0], *b = near.row[1], *c = near.row[2], *d = near.row[3];
    Bfloat16* to = columns;
    for (int64_t i = 0; i < whole; i += kPanelColumns, to += panel_stride) {
      store_pairs(to, Neighbours::sample(near.weight, load_pairs(a + i), load_pairs(b + i), load_pairs(c + i),
                                         load_pairs(d + i)));
    }
    if (tail) {
      store_pairs(to, Neighbours::sample(near.weight, load_some(a + whole, tail), load_some(b + whole, tail),
                                         load_some(c + whole, tail), load_some(d + whole, tail)));
    }
  }
}

[[gnu::always_inline]] inline Floats load_floats(const float* from, __mmask16 mask) {
  return __builtin_bit_cast(Floats, _mm512_maskz_loadu_ps(mask, from));
}

[[gnu::always_inline]] inline Floats add_neighbours(const Floats& a, const Floats& b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
         __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

// Sums of four vectors.
[[gnu::always_inline]] inline __m128 sums_of(const Floats* v) {
  const Floats ab = add_neighbours(v[0], v[1]), cd = add_neighbours(v[2], v[3]);  // a b a b of every quarter
  const Floats all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                     __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  typedef float Quarter __attribute__((vector_size(16)));
  const Quarter sum = __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7) +
                      __builtin_shufflevector(all, all, 8, 9, 10, 11) +
                      __builtin_shufflevector(all, all, 12, 13, 14, 15);
  return __builtin_bit_cast(__m128, sum);
}

template <bool kInput, bool kOffset, bool kWeight>
void backward_pass(const Bfloat16Channels& from, const TapSamples<float>& samples, const Bfloat16Backward& given) {
  const Bfloat16Channels image = from;  // copies: what is stored below cannot be part of them
  const TapSamples<float> at = samples;
  const Bfloat16Backward pass = given;
  const int64_t whole = image.channels / kPanelColumns * kPanelColumns, rest = image.channels - whole;
  const auto tail = static_cast<__mmask32>((uint64_t{1} << rest) - 1);
  const auto even_tail = static_cast<__mmask16>((1U << ((rest + 1) / 2)) - 1);
  const auto odd_tail = static_cast<__mmask16>((1U << (rest / 2)) - 1);
  for (int64_t p = 0; p < at.count; ++p) {
    const Neighbours near(image, at, p);
    float* grad_row[4];
#pragma GCC unroll 4
    for (int k = 0; kInput && k < 4; ++k) {
      const int32_t pixel = at.pixel[k][p];
      grad_row[k] = pixel == kNoPixel ? pass.trash : pass.grad_image + pixel * pass.grad_stride;
    }
    const float* gradient = pass.gradient + p * pass.gradient_row;
    Bfloat16* right = pass.right + p / kPanelColumns * 2 * kRegisterTileValues + p % kPanelColumns / 2 * kPanelColumns;
    Floats dot[4] = {};
    const auto add_panel = [&](int64_t c, const Pairs* values, const Floats& even,
                               const Floats& odd) __attribute__((always_inline)) {
      // All gradients are loaded before any is stored: rows of pixels are often a multiple of 4096 bytes apart, and a
      // load would wait for stores that seem to go to the same place.
      Floats first = {}, second = {}, sum[8];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (kInput) sum[2 * k] = load(grad_row[k] + c) + near.weight[k] * even;
        if (kInput) sum[2 * k + 1] = load(grad_row[k] + c + 16) + near.weight[k] * odd;
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Floats a = first_values(values[k]), b = second_values(values[k]);
        if (kOffset) dot[k] += even * a;
        if (kOffset) dot[k] += odd * b;
        if (kWeight) first += near.weight[k] * a;
        if (kWeight) second += near.weight[k] * b;
        if (kInput) store(grad_row[k] + c, sum[2 * k]);
        if (kInput) store(grad_row[k] + c + 16, sum[2 * k + 1]);
      }
      if (!kWeight) return;
      Bfloat16* to = right + c / kPanelColumns * pass.right_panel;
      const Pairs low = __builtin_bit_cast(Pairs, first) + 0x8000U, high = __builtin_bit_cast(Pairs, second) + 0x8000U;
      if (p % 2 == 0) {
        store_pairs(to, low >> 16);
        store_pairs(to + kRegisterTileValues, high >> 16);
      } else {
        store_pairs(to, load_pairs(to) | (low & 0xffff0000U));
        store_pairs(to + kRegisterTileValues, load_pairs(to + kRegisterTileValues) | (high & 0xffff0000U));
      }
    };
    constexpr bool kGradient = kInput || kOffset;
    for (int64_t c = 0; c < whole; c += kPanelColumns) {
      const Pairs values[4] = {load_pairs(near.row[0] + c), load_pairs(near.row[1] + c), load_pairs(near.row[2] + c),
                               load_pairs(near.row[3] + c)};
      add_panel(c, values, kGradient ? load(gradient + c) : Floats{}, kGradient ? load(gradient + c + 16) : Floats{});
    }
    if (tail) {
      const Pairs values[4] = {load_some(near.row[0] + whole, tail), load_some(near.row[1] + whole, tail),
                               load_some(near.row[2] + whole, tail), load_some(near.row[3] + whole, tail)};
      add_panel(whole, values, kGradient ? load_floats(gradient + whole, even_tail) : Floats{},
                kGradient ? load_floats(gradient + whole + 16, odd_tail) : Floats{});
    }
    if (kOffset) {
      const __m128 sums = sums_of(dot);
      float four[4];
      _mm_storeu_ps(four, sums);
      for (int k = 0; k < 4; ++k) pass.dots[k][p] = four[k];
    }
  }
}

void backward(const Bfloat16Channels& from, const TapSamples<float>& samples, const Bfloat16Backward& pass) {
  using Pass = void (*)(const Bfloat16Channels&, const TapSamples<float>&, const Bfloat16Backward&);
  static constexpr Pass kPasses[8] = {backward_pass<false, false, false>, backward_pass<false, false, true>,
                                      backward_pass<false, true, false>,  backward_pass<false, true, true>,
                                      backward_pass<true, false, false>,  backward_pass<true, false, true>,
                                      backward_pass<true, true, false>,   backward_pass<true, true, true>};
  kPasses[(pass.grad_image ? 4 : 0) + (pass.dots[0] ? 2 : 0) + (pass.right ? 1 : 0)](from, samples, pass);
}

// c (kM x kN register tiles) = or += a @ b. Register tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 columns
// of b.
template <int kM, int kN>
[[gnu::always_inline]] inline void micro_kernel(const Bfloat16* a, int64_t a_panel, int64_t panels, const Bfloat16* b,
                                                float* c, int64_t c_row, bool accumulate) {
  const int64_t c_bytes = c_row * 4;
  float* const c_low = c + kRegisterTileRows * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kN > 1) _tile_loadd(1, c + kRegisterTileRows, c_bytes);
    if constexpr (kM > 1) _tile_loadd(2, c_low, c_bytes);
    if constexpr (kM > 1 && kN > 1) _tile_loadd(3, c_low + kRegisterTileRows, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN > 1) _tile_zero(1);
    if constexpr (kM > 1) _tile_zero(2);
    if constexpr (kM > 1 && kN > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < panels; ++k, a += a_panel, b += kN * kRegisterTileValues) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kM > 1) {
      _tile_loadd(5, a + kRegisterTileValues, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kN > 1) {
      _tile_loadd(7, b + kRegisterTileValues, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kM > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kN > 1) _tile_stored(1, c + kRegisterTileRows, c_bytes);
  if constexpr (kM > 1) _tile_stored(2, c_low, c_bytes);
  if constexpr (kM > 1 && kN > 1) _tile_stored(3, c_low + kRegisterTileRows, c_bytes);
}

void multiply(const AmxProduct& p) {
  // Panels that are used at a time, in rounds of nearly equal length: the rows of two register tiles of them stay in
  // the first-level cache.
  constexpr int64_t kMostPanels = 18;
  const int64_t rounds = (p.a_panels + kMostPanels - 1) / kMostPanels;
  const int64_t panels_at_once = (p.a_panels + rounds - 1) / rounds;
  fence();
  for (int64_t k = 0; k < p.a_panels; k += panels_at_once) {
    const int64_t panels = std::min(panels_at_once, p.a_panels - k);
    const bool accumulate = p.accumulate || k > 0;
    for (int64_t row = 0; row < p.row_tiles; row += 2) {
      const Bfloat16* a = p.a + k * p.a_panel + row * kRegisterTileValues;
      for (int64_t column = 0; column < p.column_tiles; column += 2) {
        const bool two_rows = p.row_tiles - row > 1, two_columns = p.column_tiles - column > 1;
        const Bfloat16* b =
            p.b + column / 2 * p.b_panel + (p.b_first + k) * (two_columns ? 2 : 1) * kRegisterTileValues;
        float* c = p.c + row * kRegisterTileRows * p.c_row + column * kRegisterTileRows;
        if (two_rows && two_columns) {
          micro_kernel<2, 2>(a, p.a_panel, panels, b, c, p.c_row, accumulate);
        } else if (two_rows) {
          micro_kernel<2, 1>(a, p.a_panel, panels, b, c, p.c_row, accumulate);
        } else if (two_columns) {
          micro_kernel<1, 2>(a, p.a_panel, panels, b, c, p.c_row, accumulate);
        } else {
          micro_kernel<1, 1>(a, p.a_panel, panels, b, c, p.c_row, accumulate);
        }
      }
    }
  }
  fence();
}

void round_rows(const float* from, int64_t from_row, const float* bias, int64_t rows, int64_t columns, Bfloat16* to,
                int64_t to_row) {
  for (int64_t c = 0; c < columns; c += kPanelColumns) {
    const uint64_t bits = (uint64_t{1} << std::min(kPanelColumns, columns - c)) - 1;
    const auto low = static_cast<__mmask16>(bits), high = static_cast<__mmask16>(bits >> 16);
    const Floats bias_low = bias ? load_floats(bias + c, low) : Floats{};
    const Floats bias_high = bias ? load_floats(bias + c + 16, high) : Floats{};
    for (int64_t r = 0; r < rows; ++r) {
      const float* in = from + r * from_row + c;
      _mm512_mask_storeu_epi16(to + r * to_row + c, static_cast<__mmask32>(bits),
                               round_two(load_floats(in, low) + bias_low, load_floats(in + 16, high) + bias_high));
    }
  }
}

void pack_right(const Bfloat16* const* rows, int64_t tiles, Bfloat16* to) {
  typedef Bfloat16 Half __attribute__((vector_size(32)));
  const auto load_row = [&](int64_t k, int64_t tile) __attribute__((always_inline)) {
    Half values;
    __builtin_memcpy(&values, rows[k] + tile * kRegisterTileRows, sizeof(values));
    return __builtin_convertvector(values, Pairs);
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t k = 0; k < kPanelColumns; k += 2, to += kPanelColumns) {
      const Pairs pairs = load_row(k, tile) | load_row(k + 1, tile) << 16;
      store_pairs(to, pairs);
    }
  }
}

void transpose_pairs(const Bfloat16* from, int64_t from_stride, Bfloat16* to) {
  uint32_t* const pairs = reinterpret_cast<uint32_t*>(to);
  transpose_square(reinterpret_cast<const uint32_t*>(from), from_stride / 2,
                   [=](int64_t column) { return pairs + column * kRegisterTileRows; });
}

void round_gradients(const float* from, int64_t channels, Bfloat16* to) {
  for (int64_t c = 0; c < channels; c += kPanelColumns) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << std::min(kPanelColumns, channels - c)) - 1);
    const Pairs pairs = round_pairs(load(from + c), load(from + c + 16));
    _mm512_mask_storeu_epi16(to + c, mask, __builtin_bit_cast(__m512i, pairs));
  }
}

}  // namespace

const AmxKernels kernels = {
    begin,          end, multiply, gather, backward, round_rows, transpose<Bfloat16>, pack_right, transpose_pairs,
    round_gradients};

}  // namespace dcn::cpu::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
