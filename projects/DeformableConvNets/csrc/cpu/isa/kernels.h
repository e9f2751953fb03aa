// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU operators. They are compiled once for each instruction set and chosen at run time.
//
// Images are channels_last here: pixel i of an image holds its channels side by side, `stride` values after pixel i-1.
#pragma once

#include <cstdint>

#include "cpu/isa/roi_pool_kernels.h"
#include "deform_conv2d.h"

namespace dcn::cpu {

constexpr int32_t kNoPixel = -1;  // a neighbour outside the image

// The samples of one tap for `count` output positions, as arrays over the positions, which hold whole vectors.
// Neighbours come in the order top left, top right, bottom left, bottom right: neighbour k is row k / 2, column k % 2.
template <typename T>
struct TapSamples {
  int64_t count;
  int32_t* pixel[4];
  T* weight[4];  // modulated by the mask
  // Factors of the derivatives, per row and per column of neighbours; null where they are not needed.
  T *y_weight[2], *y_slope[2], *x_weight[2], *x_slope[2];
  T* modulation;
};

// Where the first tap reads before its offset is added, for the output positions of a tile, in input pixels. Both
// arrays hold whole vectors.
template <typename T>
struct TileStart {
  const T *y, *x;
};

// Offsets of one tap for output positions side by side, in input pixels, and the modulation, null where there is none.
template <typename T>
struct TapOffsets {
  const T *y, *x, *mask;
};

// The channels of an image that a pass works on.
template <typename T>
struct ImageChannels {
  const T* image;
  int64_t stride, channels;
  const T* zeros;  // at least `channels` zeros, read in place of neighbours outside
};

// c = or += a @ b for a tile. `a` is given in chunks of `depth` columns: a(row, chunk * depth + k) is
// a[row * a_row + chunk * a_chunk + k], or a[k * a_row + row] where `transposed` (one chunk only). `b` is packed into
// panels of panel_vectors vectors' width, `b_panel` values apart, each with chunks * depth rows.
template <typename T>
struct TileProduct {
  const T* a;
  int64_t a_row, a_chunk, chunks, depth;
  bool transposed;
  const T* b;
  int64_t b_panel, panel_vectors;
  T* c;
  int64_t c_row, rows, columns;
  bool accumulate;
};

// Positions of a tile of a grouped convolution at most, and how far apart arrays over them lie: not a power of two, or
// they would share cache sets.
constexpr int64_t kGroupedTile = 64;
constexpr int64_t kGroupedStride = kGroupedTile + 8;
constexpr int64_t kGroupedMemory = 16 * kGroupedTile + 512;

// The samples of all taps of a tile. Tap t's neighbour k of position p stands at (t * 4 + k) * kGroupedStride + p.
template <typename T>
struct GroupedSamples {
  int64_t taps, count;
  const T** rows;  // the neighbour's channels, or zeros where it is outside
  T** grad_rows;   // the place of their gradients, or one that nobody reads; null in the forward pass
  T* weights;      // modulated by the mask
};

// Channels of a grouped convolution that share their samples. There are as many output channels.
template <typename T>
struct GroupedChannels {
  int64_t count;           // a multiple of the vector and of group_channels
  int64_t group_channels;  // a power of two, at most four vectors
  const T* weight;         // as pack_grouped_weight leaves it
};

// The most values that a vector holds.
constexpr int64_t kMostLanes = 16;

template <typename T>
struct Kernels {
  int64_t lanes;          // values in a vector
  int64_t rows;           // rows that a product handles at a time
  int64_t panel_vectors;  // the widest panel: 1, 2 or 4 vectors

  // Locates the samples of one tap.
  void (*locate)(const DeformConv2dSizes& sizes, const TileStart<T>& start, const TapOffsets<T>& offsets, int64_t tap,
                 const TapSamples<T>& samples);

  // values[i] = 1 / (1 + exp(-values[i])).
  void (*sigmoid)(T* values, int64_t count);

  // columns[p * column_stride + t * tap_stride + c] = sample p of tap t and channel c, for `taps` of `samples`.
  void (*gather)(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps, T* columns,
                 int64_t column_stride, int64_t tap_stride);

  // From gradient columns, laid out as the columns above: adds each to the pixels of `grad_image` that it was read
  // from, writes dots[(t * 4 + k) * dot_stride + p] = <gradient column p of tap t, neighbour k of its sample>, and puts
  // the samples in the gradient columns' place. `grad_image` and `dots` may be null; `trash` holds at least `channels`
  // values, written in place of neighbours outside.
  void (*backward)(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps, T* columns,
                   int64_t column_stride, int64_t tap_stride, T* grad_image, T* dots, int64_t dot_stride, T* trash);

  // Adds the gradients that follow from the dots; `grad_mask` may be null, and is by the logits of the modulation where
  // `logits`.
  void (*add_offset_gradients)(const TapSamples<T>& samples, const T* const* dots, T* grad_y, T* grad_x, T* grad_mask,
                               bool logits);

  void (*multiply)(const TileProduct<T>& product);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride);

  // to[places[c] + r] = from[r * from_stride + c].
  void (*transpose_to_places)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                              const int64_t* places);

  // a[c] += scale * b[c].
  void (*add_scaled)(T* a, const T* b, T scale, int64_t count);

  RoiPoolKernels<T> roi_pool;

  // rows[k * kGroupedStride + p] = where neighbour k of sample p stands in `image`, or `outside`.
  void (*point)(const TapSamples<T>& samples, const T* image, int64_t stride, const T* outside, const T** rows);
  void (*point_gradients)(const TapSamples<T>& samples, T* image, int64_t stride, T* outside, T** rows);

  // output[p * output_stride + c] = output channel c of position p. `bias` may be null.
  void (*grouped_forward)(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* bias,
                          T* output, int64_t output_stride);

  // Adds to the samples' grad_rows and to `grad_weight`, packed as the weight is, and writes, in the order of the
  // samples, dots = <gradient of the sample's column, neighbour>. `memory` is scratch memory for kGroupedMemory values
  // of every tap, on a cache line.
  void (*grouped_backward)(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* grad_output,
                           int64_t grad_stride, T* grad_weight, T* dots, T* memory);
};

// The kernels of the best instruction set that this processor has. DCN_CPU_CAPABILITY=default|avx2|avx512|amx
// caps it; amx_kernels.h has more for amx.
template <typename T>
const Kernels<T>& kernels();

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
