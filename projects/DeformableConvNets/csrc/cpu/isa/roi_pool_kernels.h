// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of RoI pooling, a section of the table in kernels.h.
#pragma once

#include <cstdint>

namespace dcn::cpu {

// A row or a column of pixels that a bin reads, with the sums of its samples' weights and of their derivatives by the
// position.
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
  T scale;       // factor of the bin's sum: one over the number of samples, times the modulation
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
  int64_t readable;  // channels of a pixel that may be read and written: more than `channels` where it is padded
};

template <typename T>
struct RoiPoolKernels {
  int64_t group;        // channels that a pass over the bins handles at most
  int64_t buffer_size;  // values for each bin in the buffer of `forward`

  // out[c * count + b] = scale * sum over rows i and columns j of bin b: weight[i] * weight[j] * image[pixel (i, j),
  // c]. With `past_caches` the output is written without going through the caches: it is too large to stay in them.
  void (*forward)(const RoiPixels<T>& roi, const T* image, T* buffer, T* out, bool past_caches);

  // `gradient` is that of the bins, (count, channels), with rows `gradient_stride` values apart. With g = gradient[b,
  // c], rows i and columns j of bin b, and (i, j) the pixel where they meet, adds
  //   grad_image[(i, j), c] += scale * weight[i] * weight[j] * g
  //   sums[b, 0] += sum over i, j, c: weight[i] * slope[j] * image[(i, j), c] * g     (by x, without the scale)
  //   sums[b, 1] += sum over i, j, c: slope[i] * weight[j] * image[(i, j), c] * g     (by y, without the scale)
  //   sums[b, 2] += sum over i, j, c: weight[i] * weight[j] * image[(i, j), c] * g    (by the scale)
  // `grad_image` and `sums` may be null; `image` is not read without `sums`.
  void (*backward)(const RoiPixels<T>& roi, const T* image, const T* gradient, int64_t gradient_stride, T* grad_image,
                   T* sums);
};

}  // namespace dcn::cpu
