// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The inner loops of the CPU operators: a table of functions. There is one such table for each instruction set and type
// of values; kernels<T>() returns the one that this processor runs best. README.md says how they are compiled.
//
// Images are channels_last here: pixel i of an image holds its channels side by side, `stride` values after pixel i-1.
#pragma once

#include <cstdint>

#include "cpu/isa/roi_pool_kernels.h"
#include "deform_conv2d.h"

namespace dcn::cpu {

constexpr int32_t kNoPixel = -1;  // a neighbour outside the image

// The samples of one tap for `count` output positions, as arrays over the positions. The length of each array is a
// multiple of the vector. Neighbours come in the order top left, top right, bottom left, bottom right: neighbour k is
// row k / 2, column k % 2.
template <typename T>
struct TapSamples {
  int64_t count;
  int32_t* pixel[4];  // kNoPixel outside the image
  T* weight[4];       // of the neighbours, times the modulation
  // Weights and their derivatives by the position, for the two rows and the two columns of neighbours, and the
  // modulation. All are null where no derivatives are needed.
  T *y_weight[2], *y_slope[2], *x_weight[2], *x_slope[2];
  T* modulation;
};

// Where the first tap reads before its offset is added, for the output positions of a tile, in input pixels. The length
// of both arrays is a multiple of the vector.
template <typename T>
struct TileStart {
  const T *y, *x;
};

// Offsets of one tap for consecutive output positions, in input pixels, and the modulation, null where there is
// none.
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

// The gradient columns of some taps, and what is made of them.
template <typename T>
struct ColumnsBackward {
  // Gradient columns before, samples afterwards: channel c of tap t at position p is
  // columns[p * column_stride + t * tap_stride + c].
  T* columns;
  int64_t column_stride, tap_stride;
  T* grad_image;  // where the gradients of the image's pixels are added; null if they are not wanted
  T* trash;       // at least `channels` values, written in place of neighbours outside the image
  // dots[(t * 4 + k) * dot_stride + p] = <gradient column of tap t at position p, neighbour k of its sample>. Null if
  // they are not wanted.
  T* dots;
  int64_t dot_stride;
};

// The matrix product c = a @ b, or c += a @ b if `accumulate`, for a tile of positions. `a` is given in chunks of
// `depth` columns: a(row, chunk * depth + k) is a[row * a_row + chunk * a_chunk + k], or a[k * a_row + row] where
// `transposed` (one chunk only). `b` is packed into panels: a panel has the width of panel_vectors vectors and
// chunks * depth rows, and starts `b_panel` values after the panel before.
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

// The most positions that a tile of a grouped convolution has.
constexpr int64_t kGroupedTile = 64;
// Arrays over the positions of such a tile start that many values apart: not a power of two, or they would share cache
// sets.
constexpr int64_t kGroupedStride = kGroupedTile + 8;
// Values of scratch memory for every tap that the backward pass needs.
constexpr int64_t kGroupedMemory = 16 * kGroupedTile + 512;

// The samples of all taps of a tile, as arrays: what belongs to tap t, neighbour k and position p has the index
// (t * 4 + k) * kGroupedStride + p.
template <typename T>
struct GroupedSamples {
  int64_t taps, count;
  const T** rows;  // the neighbour's channels, or zeros where it is outside
  T** grad_rows;   // where their gradients are added, or memory that nobody reads; null in the forward pass
  T* weights;      // of the neighbours, times the modulation
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

// The table. The function that stands at an entry has the entry's name, in one of the *_impl.h.
template <typename T>
struct Kernels {
  int64_t lanes;          // values in a vector
  int64_t rows;           // rows that a product handles at a time
  int64_t panel_vectors;  // the widest panel: 1, 2 or 4 vectors

  // Finds the samples of one tap: which pixels each reads, with which weights.
  void (*locate)(const DeformConv2dSizes& sizes, const TileStart<T>& start, const TapOffsets<T>& offsets, int64_t tap,
                 const TapSamples<T>& samples);

  // values[i] = 1 / (1 + exp(-values[i])).
  void (*sigmoid)(T* values, int64_t count);

  // columns[p * column_stride + t * tap_stride + c] = channel c of the sample of tap t at position p.
  void (*gather)(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps, T* columns,
                 int64_t column_stride, int64_t tap_stride);

  // Adds each gradient column to the pixels that its sample was read from, forms the dots, and overwrites the gradient
  // columns with the samples, which the gradient of the weight needs. At least one of grad_image and dots is wanted.
  void (*backward)(const ImageChannels<T>& from, const TapSamples<T>* samples, int64_t taps,
                   const ColumnsBackward<T>& pass);

  // Adds the gradients of the offsets and the mask that follow from the dots of one tap: dots[k][p] for neighbour k of
  // position p. `grad_mask` may be null. If `logits` is set, it is the gradient with respect to the logits, whose
  // sigmoid is the modulation.
  void (*add_offset_gradients)(const TapSamples<T>& samples, const T* const* dots, T* grad_y, T* grad_x, T* grad_mask,
                               bool logits);

  // The product that the argument describes.
  void (*multiply)(const TileProduct<T>& product);

  // to[c * to_stride + r] = from[r * from_stride + c].
  void (*transpose)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride);

  // to[places[c] + r] = from[r * from_stride + c].
  void (*transpose_to_places)(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                              const int64_t* places);

  // a[c] += scale * b[c].
  void (*add_scaled)(T* a, const T* b, T scale, int64_t count);

  RoiPoolKernels<T> roi_pool;

  // rows[k * kGroupedStride + p] = the address in `image` of neighbour k of the sample at position p, or `outside`.
  void (*point)(const TapSamples<T>& samples, const T* image, int64_t stride, const T* outside, const T** rows);
  // The same for the gradients of an image.
  void (*point_gradients)(const TapSamples<T>& samples, T* image, int64_t stride, T* outside, T** rows);

  // output[p * output_stride + c] = output channel c of position p. `bias` may be null.
  void (*grouped_tile_forward)(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* bias,
                               T* output, int64_t output_stride);

  // Adds to the samples' grad_rows and to `grad_weight`, which is packed as the weight is. Writes
  // dots[(t * 4 + k) * kGroupedStride + p] = <gradient column of tap t at position p, neighbour k of its sample>.
  // `memory` is scratch memory that starts on a cache line, kGroupedMemory values for every tap.
  void (*grouped_tile_backward)(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels,
                                const T* grad_output, int64_t grad_stride, T* grad_weight, T* dots, T* memory);
};

// The kernels of the best instruction set that this processor has. DCN_CPU_CAPABILITY=default|avx2|avx512|amx names the
// best one that may be chosen; amx_kernels.h has more for amx.
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
