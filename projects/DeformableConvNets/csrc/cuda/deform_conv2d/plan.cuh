// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Which kernels deform_conv2d runs, and how their work is cut up. All of this runs on the host.
#pragma once

#include <numeric>
#include <optional>

#include "cuda/deform_conv2d/tensor_cores/product_sizes.cuh"
#include "cuda/deform_conv2d/tensor_cores/sample_gather.cuh"

namespace dcn::cuda {

// Conv groups of few channels are merged and multiplied together, with zeros for the weights between different groups.
// An infinite or NaN sample then makes the outputs of all merged groups NaN.
struct Grouping {
  int groups, channels, outputs;  // after merging: how many groups, and channels and output channels of each
};

// The grouping for operands whose chunks hold `chunk` channels, or nothing if a chunk would reach over a group's end.
// `outputs_too` says that output channels are read by chunks as well.
inline std::optional<Grouping> grouping(const DeformConv2dSizes& s, int64_t chunk, bool outputs_too) {
  std::optional<Grouping> best;
  for (int64_t merged = 1; merged <= s.groups; ++merged) {
    if (s.groups % merged != 0) continue;
    const Grouping candidate{static_cast<int>(s.groups / merged), static_cast<int>(merged * s.group_channels()),
                             static_cast<int>(merged * s.group_out_channels())};
    if (best && candidate.channels > kRowChunks * chunk) break;
    if (std::gcd(int64_t{candidate.channels}, s.deform_channels()) % chunk != 0) continue;
    if (outputs_too && candidate.outputs % chunk != 0) continue;
    best = candidate;
    if (candidate.channels >= kRowChunks * chunk) break;
  }
  return best;
}

// Whether the tensor-core kernels can compute this. Pixels must be whole chunks apart, and indices must fit 32 bits.
inline bool fits_tensor_cores(const DeformConv2dSizes& s, const Device& device, const void* images, int64_t chunk) {
  const int64_t most = std::numeric_limits<int32_t>::max() / 2;
  return device.capability >= 80 && s.channels % chunk == 0 && s.out_channels > 0 &&
         reinterpret_cast<uintptr_t>(images) % kChunkBytes == 0 &&
         s.positions() <= std::numeric_limits<int32_t>::max() / PatchOrder::kBand &&
         s.batch * s.pixels() + s.width + 1 <= kMostPackedPixels &&
         s.batch * s.pixels() * (s.channels / chunk) <= kMostChunks && s.batch * s.positions() <= most &&
         s.width * s.channels <= most && s.out_channels <= most && s.taps() <= most / s.channels;
}

// What all packings of a convolution's weights have in common.
inline Packing packing_of(const DeformConv2dSizes& s) {
  Packing packing{};
  packing.conv_outputs = static_cast<int>(s.group_out_channels());
  packing.conv_channels = static_cast<int>(s.group_channels());
  return packing;
}

struct Cut {
  int columns;  // of a block's tile: 64, 128 or 256
  int splits;
};

// At most this many bytes of partial results, so that they are still in the second-level cache when they are added up.
constexpr int64_t kMostPartialBytes = int64_t{16} << 20;

// The tile and the number of splits with the least estimated time. Time is counted in steps of the tensor cores on a
// tile of 64 columns. A step on `columns` columns takes columns / 64 of that, and gathering its samples takes 1.5 of
// it, whatever the columns. A thread block takes 6 to start, and columns / 64 to write its results.
//
// For example a 3x3 convolution with 128 channels (c3) on two images of 100x152, on 132 multiprocessors. It has 30,400
// rows, which is 238 tiles of 128 rows, and 18 steps. Tiles of 64 columns are 476, in 4 waves: 4 * (18 * (1.5 + 1) + 6
// + 1) = 208. Tiles of 128 columns are 238, in 2 waves: 2 * (18 * (1.5 + 2) + 6 + 2) = 142, so these are chosen.
//
// The estimate was compared with measurements on an H200, for the shapes of benchmarks/deform_conv2d.py in bfloat16
// with 1, 2 and 16 images, forward and the gradient by the input. Its choice was the fastest everywhere, except for one
// image of c3, where it costs 9 %.
inline Cut cut_product(const ProductSizes& sizes, int64_t multiprocessors, int64_t most_columns) {
  const int64_t rows = sizes.row_tiles(), steps = sizes.packing.reduction.steps();
  const double gathering = 1.5, start = 6.0, partial = 1.0;
  Cut best{64, 1};
  double least = 0;
  for (int64_t columns = 64; columns <= most_columns; columns *= 2) {
    if (columns > 64 && columns / 2 >= sizes.packing.columns) break;
    const int64_t tiles = rows * sizes.packing.stripes * divide_up(sizes.packing.columns, columns);
    const int64_t result_bytes = int64_t{sizes.rows} * sizes.columns * int64_t{sizeof(float)};
    const int64_t most_splits =
        std::clamp<int64_t>(std::min(steps / 4, kMostPartialBytes / std::max<int64_t>(result_bytes, 1)), 1, 16);
    for (int64_t splits = 1; splits <= most_splits; ++splits) {
      const double waves = static_cast<double>(divide_up(tiles * splits, multiprocessors));
      const double wide = static_cast<double>(columns) / 64;
      const double reduce = splits == 1 ? 0.0
                                        : partial * static_cast<double>(splits + 1) * wide *
                                                  static_cast<double>(tiles) / static_cast<double>(multiprocessors) +
                                              start;
      const double time =
          waves * (static_cast<double>(divide_up(steps, splits)) * (gathering + wide) + start + wide) + reduce;
      if (least == 0 || time < least) {
        least = time;
        best = {static_cast<int>(columns), static_cast<int>(splits)};
      }
    }
  }
  return best;
}

// How many blocks with `bytes` of shared memory a multiprocessor holds at once, up to `most`. It has as much shared
// memory as one block may have, and keeps 1 KB for itself with each block.
inline int64_t resident_blocks(const Device& device, int64_t bytes, int64_t most) {
  const int64_t own = 1 << 10;
  return std::clamp<int64_t>((device.shared_bytes + own) / (bytes + own), 1, most);
}

// At most this many bytes of partial gradients by the weight.
constexpr int64_t kMostWeightPartialBytes = int64_t{32} << 20;

// Into how many splits each of `tiles` sums of `steps` steps is cut, on a device that runs `slots` blocks at a time.
// The partial results of one split have `bytes`. Blocks of one wave begin and end together, so a wave that is not full
// costs as much as a full one. Time is counted in steps: a block takes 4 to start and end, and writing and reading the
// partial results of a full wave takes 6, by measurements on an H200.
inline int weight_gradient_splits(int64_t tiles, int64_t steps, int64_t slots, int64_t bytes) {
  const double start = 4.0, partial = 6.0;
  const int64_t most =
      std::clamp<int64_t>(std::min(steps / 4, kMostWeightPartialBytes / std::max<int64_t>(bytes, 1)), 1, 64);
  int best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double waves = static_cast<double>(divide_up(tiles * splits, slots));
    const double time = waves * (static_cast<double>(divide_up(steps, splits)) + start) +
                        partial * static_cast<double>(tiles * splits) / static_cast<double>(slots);
    if (splits == 1 || time < least) {
      least = time;
      best = static_cast<int>(splits);
    }
  }
  return best;
}

}  // namespace dcn::cuda
