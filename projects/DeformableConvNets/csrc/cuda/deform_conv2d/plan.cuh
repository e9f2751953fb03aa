// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Which kernels an operator of deform_conv2d runs, and how its work is cut up. All on the host.
#pragma once

#include <numeric>
#include <optional>

#include "cuda/deform_conv2d/tensor_cores/product_sizes.cuh"
#include "cuda/deform_conv2d/tensor_cores/sample_gather.cuh"

namespace dcn::cuda {

// Conv groups of few channels are multiplied together: weights that belong to different ones are zero. An infinite or
// NaN sample then makes the others' outputs NaN.
struct Grouping {
  int groups, channels, outputs;  // after merging: how many groups, channels and output channels of each
};

// The grouping for operands whose chunks have `chunk` channels, or nothing where chunks would not fit. `outputs_too` if
// output channels are read by chunks as well.
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

// Whether the tensor cores can compute in this kind. The strides of pixels must be chunks, and index computations of 32
// bits suffice.
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

// Of partial results: they shall be read again before they leave the cache, and take no more memory than that.
constexpr int64_t kMostPartialBytes = int64_t{16} << 20;

// The tile and the number of splits with the least estimated time. In units of the tensor cores' time for 64 columns, a
// step takes as long as its columns and the gathering, and a split writes and reads its partial results once. Of all
// that were tried on an H200 (the shapes of benchmarks/deform_conv2d.py in bfloat16 with 1, 2 and 16 images, forward
// and the gradient by the input), the choices were the fastest, but for one image of c3, where they cost 9 %.
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

// How many blocks with `bytes` of shared memory, at most `most`, a multiprocessor holds at once: it has as much as one
// block may have and keeps 1 KB of each for itself.
inline int64_t resident_blocks(const Device& device, int64_t bytes, int64_t most) {
  const int64_t own = 1 << 10;
  return std::clamp<int64_t>((device.shared_bytes + own) / (bytes + own), 1, most);
}

// Of partial gradients by the weight.
constexpr int64_t kMostWeightPartialBytes = int64_t{32} << 20;

// Into how many parts each of `tiles` sums of `steps` steps is cut on a device that runs `slots` blocks at a time,
// where the partial results of one part have `bytes`. Blocks of one wave begin and end together, so that a wave that is
// not full costs as much as a full one. In units of a step: a block starts and ends in 4, and partial results of a full
// wave are written and read in 6. Estimated from measurements of the steps on an H200.
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
