// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU operators. They are compiled once for each instruction set and chosen at run time.
//
// Images are channels_last here: pixel i of an image holds its channels side by side, `stride` values after pixel i-1.
#pragma once

#include <cstdint>

#include "deform_conv2d.h"

namespace dcn::cpu {

constexpr int32_t kNoPixel = -1;  // a neighbour outside the image

// The four neighbours that a sample reads, top left, top right, bottom left, bottom right.
template <typename T>
struct Neighbours {
  int32_t pixel[4];
  T weight[4];  // modulated by the mask
};

// What the backward pass needs beside them.
template <typename T>
struct Derivatives {
  T by_mask[4];  // derivatives of Neighbours::weight
  T by_y[4];
  T by_x[4];
};

template <typename T>
struct Kernels {
  // Locates the samples of deform group `group` for output positions [begin, end) of one image, position-major, taps
  // within. `offset` and `mask` point to the image; `mask` and `derivatives` may be null.
  void (*locate)(const DeformConv2dSizes& sizes, const T* offset, const T* mask, int64_t group, int64_t begin,
                 int64_t end, Neighbours<T>* samples, Derivatives<T>* derivatives);

  // columns[s * column_stride + c] = sample s of channel c. `zeros` holds at least `channels` zeros.
  void (*gather)(const T* image, int64_t stride, const T* zeros, const Neighbours<T>* samples, int64_t count,
                 int64_t channels, T* columns, int64_t column_stride);

  // Adds every gradient column to the pixels that it was read from.
  void (*scatter)(const T* grad_columns, int64_t column_stride, const Neighbours<T>* samples, int64_t count,
                  int64_t channels, T* grad_image, int64_t stride);

  // dots[4 * s + k] = <gradient column of sample s, neighbour k of sample s>.
  void (*dot)(const T* grad_columns, int64_t column_stride, const T* image, int64_t stride,
              const Neighbours<T>* samples, int64_t count, int64_t channels, T* dots);

  // a[c] += scale * b[c], and <a, b>.
  void (*add_scaled)(T* a, const T* b, T scale, int64_t count);
  T (*inner)(const T* a, const T* b, int64_t count);
};

// The kernels of the best instruction set that this processor has. DCN_CPU_CAPABILITY=default|avx2|avx512 caps it.
template <typename T>
const Kernels<T>& kernels();

// Name of that instruction set.
const char* capability();

#define DCN_DECLARE_KERNELS(isa)               \
  namespace isa {                              \
  extern const Kernels<float> float_kernels;   \
  extern const Kernels<double> double_kernels; \
  }
DCN_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
DCN_DECLARE_KERNELS(avx2)
DCN_DECLARE_KERNELS(avx512)
#endif
#undef DCN_DECLARE_KERNELS

}  // namespace dcn::cpu
