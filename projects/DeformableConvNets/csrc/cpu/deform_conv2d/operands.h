// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the paths of deform_conv2d on CPU read: the operands of a call, segments of its channels, samples of a tile.
#pragma once

#include <utility>
#include <vector>

#include "cpu/deform_conv2d/offsets.h"
#include "cpu/deform_conv2d/panels.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory.h"
#include "cpu/memory_format.h"

namespace dcn::cpu {

// The tensors of one call, dense, in the dtype of the computation.
template <typename T>
struct OperandTensors {
  Tensor image_tensor, weight_tensor;
  DeformConv2dSizes sizes;
  OffsetTensors<T> offsets;
  const T* images;
  WeightView<const T> weight;
  std::vector<T> zeros;

  OperandTensors(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling, const Tensor& weight)
      : image_tensor(to_channels_last<T>(input)),
        weight_tensor(dense(weight, scalar_type_of<T>(),
                            is_channels_last(weight) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous)),
        sizes(s),
        offsets(s, sampling),
        zeros(s.channels, T(0)) {
    images = image_tensor.template const_data_ptr<T>();
    this->weight = {weight_tensor.template const_data_ptr<T>(), is_channels_last(weight_tensor)};
  }

  int64_t image_begin(int64_t n) const { return n * sizes.pixels() * sizes.channels; }
  ImageChannels<T> channels(int64_t n, int64_t begin, int64_t count) const {
    return {images + image_begin(n) + begin, sizes.channels, count, zeros.data()};
  }
};

// Channels [begin, begin + count) lie in one conv group and one deform group.
struct Segment {
  int64_t begin, count, group, deform_group;
};

inline std::vector<Segment> segments_of(const DeformConv2dSizes& s, int64_t max_count) {
  std::vector<Segment> segments;
  for (int64_t c = 0; c < s.channels;) {
    const int64_t group = c / s.group_channels(), deform_group = c / s.deform_channels();
    const int64_t end = std::min((group + 1) * s.group_channels(), (deform_group + 1) * s.deform_channels());
    const int64_t count = std::min(end - c, max_count);
    segments.push_back({c, count, group, deform_group});
    c += count;
  }
  return segments;
}

// Puts the nine arrays of the derivatives side by side, `stride` values apart; moves `next` behind them.
template <typename T>
void set_derivatives(TapSamples<T>& samples, T*& next, int64_t stride) {
  const auto take = [&] { return std::exchange(next, next + stride); };
  for (int a = 0; a < 2; ++a) {
    samples.y_weight[a] = take();
    samples.y_slope[a] = take();
    samples.x_weight[a] = take();
    samples.x_slope[a] = take();
  }
  samples.modulation = take();
}

// Memory for the samples of some taps.
template <typename T>
class TapBuffer {
 public:
  TapBuffer(int64_t taps, int64_t tile, bool derivatives) : samples_(taps) {
    tile = divide_up(tile, kMostLanes) * kMostLanes;
    pixels_ = scratch<int32_t>(4 * taps * tile);
    values_ = scratch<T>((derivatives ? 13 : 4) * taps * tile);
    int32_t* next_pixel = pixels_.get();
    T* next = values_.get();
    for (TapSamples<T>& samples : samples_) {
      for (int k = 0; k < 4; ++k) {
        samples.pixel[k] = std::exchange(next_pixel, next_pixel + tile);
        samples.weight[k] = std::exchange(next, next + tile);
      }
      if (derivatives) set_derivatives(samples, next, tile);
    }
  }

  // Samples of taps [tap, tap + taps) for the first `count` positions of a tile.
  const TapSamples<T>* locate(const TileOffsets<T>& offsets, int64_t deform_group, int64_t tap, int64_t taps,
                              int64_t count) {
    for (int64_t t = 0; t < taps; ++t) {
      samples_[t].count = count;
      offsets.locate(deform_group, tap + t, samples_[t]);
    }
    return samples_.data();
  }

 private:
  Scratch<int32_t> pixels_;
  Scratch<T> values_;
  std::vector<TapSamples<T>> samples_;
};

}  // namespace dcn::cpu
