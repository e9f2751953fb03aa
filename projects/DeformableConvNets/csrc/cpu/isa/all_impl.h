// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The functions of the table in kernels.h. The .cpp of each instruction set defines DCN_ISA, DCN_VECTOR_BYTES, DCN_ROWS
// and DCN_PANEL_VECTORS, sets the compiler's target, then includes this file. Everything below is in the namespace
// DCN_ISA, so that no function compiled for one target is linked into another. README.md explains more.
#include "cpu/isa/gemm_impl.h"

namespace dcn::cpu::DCN_ISA {
namespace {

// What sample_axis_zeros (sample.h) finds, for a vector of positions.
template <typename T>
struct AxisVector {
  Integers<T> low, exists[2];
  Vector<T> weight[2], slope[2];
};

template <typename T>
[[gnu::always_inline]] inline AxisVector<T> sample_axis_vector(const Vector<T>& position, int32_t size) {
  const Vector<T> zero = {}, one = zero + 1;
  const Integers<T> inside = (position > -one) & (position < zero + static_cast<T>(size));
  const Vector<T> safe = inside ? position : zero;
  AxisVector<T> axis;
  axis.low = __builtin_convertvector(safe, Integers<T>);
  axis.low += __builtin_convertvector(axis.low, Vector<T>) > safe;  // rounded up, so one less is the floor
  const Vector<T> fraction = safe - __builtin_convertvector(axis.low, Vector<T>);
  axis.exists[0] = inside & (axis.low >= 0);
  axis.exists[1] = inside & (axis.low + 1 < Integers<T>{} + size);
  axis.weight[0] = axis.exists[0] ? one - fraction : zero;
  axis.weight[1] = axis.exists[1] ? fraction : zero;
  axis.slope[0] = axis.exists[0] ? -one : zero;
  axis.slope[1] = axis.exists[1] ? one : zero;
  return axis;
}

// Stores pixel numbers as int32_t, to which those that belong to double are narrowed.
template <typename T>
[[gnu::always_inline]] inline void store_pixels(int32_t* to, const Integers<T>& pixels) {
  typedef int32_t Narrow __attribute__((vector_size(kLanes<T> * sizeof(int32_t))));
  const Narrow narrow = __builtin_convertvector(pixels, Narrow);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

template <typename T, bool kMask, bool kDerivatives>
void locate_all(const DeformConv2dSizes& sizes, TileStart<T> start, TapOffsets<T> offsets, int64_t tap,
                TapSamples<T> samples) {
  constexpr int64_t lanes = kLanes<T>;
  const Vector<T> zero = {};
  const Vector<T> y = zero + static_cast<T>(tap / sizes.kernel_w * sizes.dilation_h);
  const Vector<T> x = zero + static_cast<T>(tap % sizes.kernel_w * sizes.dilation_w);
  T last[3][lanes] = {};  // the offsets of the last positions, as a whole vector
  for (int64_t p = 0; p < samples.count; p += lanes) {
    const T *offset_y = offsets.y + p, *offset_x = offsets.x + p, *mask = kMask ? offsets.mask + p : nullptr;
    if (const int64_t rest = samples.count - p; rest < lanes) {
      offset_y = std::copy_n(offset_y, rest, last[0]) - rest;
      offset_x = std::copy_n(offset_x, rest, last[1]) - rest;
      if (kMask) mask = std::copy_n(mask, rest, last[2]) - rest;
    }
    const AxisVector<T> row =
        sample_axis_vector<T>((load(start.y + p) + y) + load(offset_y), static_cast<int32_t>(sizes.height));
    const AxisVector<T> column =
        sample_axis_vector<T>((load(start.x + p) + x) + load(offset_x), static_cast<int32_t>(sizes.width));
    const Vector<T> modulation = kMask ? load(mask) : zero + 1;
    const Integers<T> first = row.low * static_cast<int32_t>(sizes.width) + column.low;
    const Integers<T> second = first + static_cast<int32_t>(sizes.width), none = Integers<T>{} + kNoPixel;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const int a = k / 2, b = k % 2;
      store_pixels<T>(samples.pixel[k] + p, row.exists[a] & column.exists[b] ? (a ? second : first) + b : none);
      store(samples.weight[k] + p, modulation * row.weight[a] * column.weight[b]);
    }
    if (!kDerivatives) continue;
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      store(samples.y_weight[a] + p, row.weight[a]);
      store(samples.y_slope[a] + p, row.slope[a]);
      store(samples.x_weight[a] + p, column.weight[a]);
      store(samples.x_slope[a] + p, column.slope[a]);
    }
    store(samples.modulation + p, modulation);
  }
}

template <typename T>
void locate(const DeformConv2dSizes& sizes, const TileStart<T>& start, const TapOffsets<T>& offsets, int64_t tap,
            const TapSamples<T>& samples) {
  if (samples.modulation) {
    (offsets.mask ? locate_all<T, true, true> : locate_all<T, false, true>)(sizes, start, offsets, tap, samples);
  } else {
    (offsets.mask ? locate_all<T, true, false> : locate_all<T, false, false>)(sizes, start, offsets, tap, samples);
  }
}

inline void sigmoid(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 1 / (1 + std::exp(-values[i]));
}

// exp(-x) is computed as 2^n * exp(r) with |r| <= ln(2) / 2. exp(r) is its Taylor polynomial; what that leaves out is
// smaller than rounding.
inline void sigmoid(float* values, int64_t count) {
  constexpr float kLog2E = 1.442695041F, kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.F;  // 1.5 * 2^23: adding it leaves an integer in the low bits
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i];
    // Beyond these the result is 0 or 1 up to the smallest normal number; NaN stays NaN.
    const float bounded = x > 87.F ? -87.F : x < -87.F ? 87.F : -x;
    const float rounded = bounded * kLog2E + kRound, n = rounded - kRound;
    const float r = (bounded - n * kLn2High) - n * kLn2Low;
    const float tail = 1.F / 24 + r * (1.F / 120 + r * (1.F / 720 + r * (1.F / 5040)));
    const float power = 1 + r * (1 + r * (0.5F + r * (1.F / 6 + r * tail)));
    const int32_t exponent = (__builtin_bit_cast(int32_t, rounded) - 0x4B400000 + 127) << 23;
    const float exponential = power * __builtin_bit_cast(float, exponent);
    values[i] = 1 / (1 + exponential);
  }
}

template <typename T>
void gather(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps, T* columns, int64_t column_stride,
            int64_t tap_stride) {
  constexpr int64_t lanes = kLanes<T>;
  const ImageChannels<T> image = from;  // a copy: what is stored below cannot be part of it
  const int64_t channels = image.channels, whole = channels / lanes * lanes, count = samples->count;
  // All taps of a position one after the other: neighbouring positions and taps read the same pixels.
  for (int64_t p = 0; p < count; ++p, columns += column_stride) {
    T* column = columns;
    for (int64_t t = 0; t < taps; ++t, column += tap_stride) {
      const T* row[4];
      Vector<T> weight[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const int32_t pixel = samples[t].pixel[k][p];
        row[k] = pixel == kNoPixel ? image.zeros : image.image + pixel * image.stride;
        weight[k] = Vector<T>{} + samples[t].weight[k][p];
      }
      for (int64_t c = 0; c < whole; c += lanes) {
        store(column + c, weight[0] * load(row[0] + c) + weight[1] * load(row[1] + c) + weight[2] * load(row[2] + c) +
                              weight[3] * load(row[3] + c));
      }
      for (int64_t c = whole; c < channels; ++c) {
        column[c] =
            weight[0][0] * row[0][c] + weight[1][0] * row[1][c] + weight[2][0] * row[2][c] + weight[3][0] * row[3][c];
      }
    }
  }
}

template <typename T, bool kInput, bool kOffset>
void backward_pass(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps,
                   const ColumnsBackward<T>& given) {
  constexpr int64_t lanes = kLanes<T>;
  const ColumnsBackward<T> pass = given;  // a copy: what is stored below cannot be part of it
  const int64_t channels = from.channels, whole = channels / lanes * lanes, count = samples->count;
  T* columns = pass.columns;
  for (int64_t p = 0; p < count; ++p, columns += pass.column_stride) {
    T* column_of_tap = columns;
    for (int64_t t = 0; t < taps; ++t, column_of_tap += pass.tap_stride) {
      const T* row[4];
      T *grad_row[4], weight[4], tail[4];
      for (int k = 0; k < 4; ++k) {
        const int32_t pixel = samples[t].pixel[k][p];
        row[k] = pixel == kNoPixel ? from.zeros : from.image + pixel * from.stride;
        grad_row[k] = pixel == kNoPixel || !kInput ? pass.trash : pass.grad_image + pixel * from.stride;
        weight[k] = samples[t].weight[k][p];
        tail[k] = 0;
      }
      Vector<T> dot[4] = {};
      for (int64_t c = 0; c < whole; c += lanes) {
        const Vector<T> gradient = load(column_of_tap + c);
        Vector<T> column = {}, grad_pixel[4];
        // All loads come before the stores: where rows of pixels are a multiple of 4096 bytes apart, a load would wait
        // for the store before it.
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const Vector<T> value = load(row[k] + c);
          column += weight[k] * value;
          if (kOffset) dot[k] += gradient * value;
          if (kInput) grad_pixel[k] = load(grad_row[k] + c) + weight[k] * gradient;
        }
#pragma GCC unroll 4
        for (int k = 0; kInput && k < 4; ++k) store(grad_row[k] + c, grad_pixel[k]);
        store(column_of_tap + c, column);
      }
      for (int64_t c = whole; c < channels; ++c) {
        // Compilers do not vectorise this loop then. If they did so for some of the template's cases only, these would
        // round the sums of `tail` differently, and a gradient would depend on which others are wanted.
        if (kOffset) __asm__ volatile("");
        const T gradient = column_of_tap[c];
        T column = 0;
        for (int k = 0; k < 4; ++k) {
          column += weight[k] * row[k][c];
          if (kOffset) tail[k] += gradient * row[k][c];
          if (kInput) grad_row[k][c] += weight[k] * gradient;
        }
        column_of_tap[c] = column;
      }
      if (!kOffset) continue;
      for (int k = 0; k < 4; ++k) pass.dots[(t * 4 + k) * pass.dot_stride + p] = lane_sum<T>(dot[k]) + tail[k];
    }
  }
}

template <typename T>
void backward(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps,
              const ColumnsBackward<T>& pass) {
  const auto run = pass.grad_image && pass.dots ? backward_pass<T, true, true>
                   : pass.grad_image            ? backward_pass<T, true, false>
                                                : backward_pass<T, false, true>;
  run(from, samples, taps, pass);
}

template <typename T>
void add_offset_gradients(const TapSamples<T>& samples, const T* const* dots, T* grad_y, T* grad_x, T* grad_mask,
                          bool logits) {
#pragma omp simd
  for (int64_t p = 0; p < samples.count; ++p) {
    T by_y = 0, by_x = 0;
    for (int k = 0; k < 4; ++k) {
      by_y += samples.y_slope[k / 2][p] * samples.x_weight[k % 2][p] * dots[k][p];
      by_x += samples.y_weight[k / 2][p] * samples.x_slope[k % 2][p] * dots[k][p];
    }
    grad_y[p] += samples.modulation[p] * by_y;
    grad_x[p] += samples.modulation[p] * by_x;
  }
  if (!grad_mask) return;
#pragma omp simd
  for (int64_t p = 0; p < samples.count; ++p) {
    T by_mask = 0;
    for (int k = 0; k < 4; ++k) by_mask += samples.y_weight[k / 2][p] * samples.x_weight[k % 2][p] * dots[k][p];
    const T modulation = samples.modulation[p];
    grad_mask[p] += logits ? modulation * (T(1) - modulation) * by_mask : by_mask;
  }
}

template <typename T>
void add_scaled(T* a, const T* b, T scale, int64_t count) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) a[c] += scale * b[c];
}

}  // namespace
}  // namespace dcn::cpu::DCN_ISA

#include "cpu/isa/grouped_impl.h"
#include "cpu/isa/roi_pool_impl.h"  // needs transpose

namespace dcn::cpu::DCN_ISA {
namespace {

template <typename T>
constexpr Kernels<T> all_kernels() {
  return {kLanes<T>,
          kRows,
          DCN_PANEL_VECTORS,
          locate<T>,
          sigmoid,
          gather<T>,
          backward<T>,
          add_offset_gradients<T>,
          multiply<T>,
          transpose<T>,
          transpose_to_places<T>,
          add_scaled<T>,
          roi_pool_kernels<T>(),
          point<const T*, T>,
          point<T*, T>,
          grouped_tile_forward<T>,
          grouped_tile_backward<T>};
}

}  // namespace

const Kernels<float> float_kernels = all_kernels<float>();
const Kernels<double> double_kernels = all_kernels<double>();

}  // namespace dcn::cpu::DCN_ISA
