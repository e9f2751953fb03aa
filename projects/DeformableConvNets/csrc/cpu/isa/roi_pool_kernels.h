// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of RoI pooling, part of the table in kernels.h.
#pragma once

#include <cstdint>

namespace dcn::cpu {

// A row or a column of pixels that a bin reads: the sum of its samples' weights, and of their slopes.
template <typename T>
struct AxisEntry {
  int32_t pixel;
  T weight, slope;
};

// The pixels of one bin: all pairs of its rows and columns, which are indices into the entries of its RoI.
template <typename T>
struct BinPixels {
  int32_t rows, columns, row_count, column_count;
  int32_t cell;  // which group of channels it reads
  T scale;       // of the bin's sum
};

// The bins of one RoI for some channels of an image, whose pixel (y, x) has those of group `cell` from
// y * row_stride + x * pixel_stride + cell * cell_stride on.
template <typename T>
struct RoiPixels {
  const AxisEntry<T>* entries;
  const BinPixels<T>* bins;
  int64_t count;
  int64_t row_stride, pixel_stride, cell_stride;
  int64_t channels;
  int64_t readable;  // channels that may be read and written behind a pixel: more than `channels` where it is padded
};

template <typename T>
struct RoiPoolKernels {
  int64_t group;        // channels that a pass over the bins handles at most
  int64_t buffer_size;  // values for each bin in the buffer of `forward`

  // out[c * count + b] = bin b's weighted sum of channel c; `past_caches` where it is too much to stay in them.
  void (*forward)(const RoiPixels<T>& roi, const T* image, T* buffer, T* out, bool past_caches);

  // For the bins' gradients (count, channels), rows `gradient_stride` values apart: adds to the pixels of `grad_image`,
  // and to `sums` (count, 3), for each bin, the gradient's products with the derivatives of the sum, without its scale,
  // by x and y, and with the sum. `grad_image` and `sums` may be null; without `sums` so may `image`.
  void (*backward)(const RoiPixels<T>& roi, const T* image, const T* gradient, int64_t gradient_stride, T* grad_image,
                   T* sums);
};

}  // namespace dcn::cpu
