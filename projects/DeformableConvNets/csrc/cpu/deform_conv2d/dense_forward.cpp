// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The forward pass of dense.h: the columns of a tile of output positions are gathered into the cache and multiplied
// there; the column matrix of a whole image never exists.
#include "cpu/deform_conv2d/dense.h"

namespace dcn::cpu {
namespace {

constexpr TileLimits kForwardTile{int64_t{256} << 10, 120};

// Writes output positions of one image. A tile's columns are gathered for some taps at a time, as (positions, taps,
// channels), and multiplied with the packed weight of these taps.
template <typename T>
class ForwardTile {
 public:
  ForwardTile(const OperandTensors<T>& operands, const GroupedPanels<T>& weight, int64_t tile, int64_t taps)
      : operands_(operands),
        weight_(weight),
        taps_(taps),
        offsets_(operands.offsets, tile),
        samples_(taps, tile, false),
        column_stride_(taps * operands.sizes.channels + kernels<T>().lanes),
        columns_(scratch<T>(tile * column_stride_)),
        output_(scratch<T>(tile * operands.sizes.out_channels)) {}

  // Positions [begin, end) of image n. `output` is (batch, out_channels, positions), or (batch, positions,
  // out_channels) for channels_last.
  void run(int64_t n, int64_t begin, int64_t end, const T* bias, T* output, bool channels_last) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t count = end - begin;
    T* out = channels_last ? output + (n * s.positions() + begin) * s.out_channels : output_.get();
    offsets_.load(n, begin, count);
    for (int64_t tap = 0; tap < s.taps(); tap += taps_) {
      const int64_t taps = std::min(taps_, s.taps() - tap);
      gather(n, count, tap, taps);
      multiply(tap, taps, count, out);
    }
    for (int64_t p = 0; bias && p < count; ++p) {
      kernels<T>().add_scaled(out + p * s.out_channels, bias, T(1), s.out_channels);
    }
    if (!channels_last) {
      kernels<T>().transpose(out, s.out_channels, count, s.out_channels,
                             output + n * s.out_channels * s.positions() + begin, s.positions());
    }
  }

 private:
  void gather(int64_t n, int64_t count, int64_t tap, int64_t taps) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t channels = s.deform_channels();
    for (int64_t group = 0; group < s.deform_groups; ++group) {
      const TapSamples<T>* samples = samples_.locate(offsets_, group, tap, taps, count);
      kernels<T>().gather(operands_.channels(n, group * channels, channels), samples, taps,
                          columns_.get() + group * channels, column_stride_, s.channels);
    }
  }

  void multiply(int64_t tap, int64_t taps, int64_t count, T* out) const {
    const DeformConv2dSizes& s = operands_.sizes;
    for (int64_t g = 0; g < s.groups; ++g) {
      TileProduct<T> product{};
      product.a = columns_.get() + g * s.group_channels();
      product.a_row = column_stride_;
      product.a_chunk = s.channels;
      product.chunks = taps;
      product.depth = s.group_channels();
      weight_.set_right(product, g, tap * s.group_channels());
      product.c = out + g * s.group_out_channels();
      product.c_row = s.out_channels;
      product.rows = count;
      product.columns = s.group_out_channels();
      product.accumulate = tap > 0;
      kernels<T>().multiply(product);
    }
  }

  const OperandTensors<T>& operands_;
  const GroupedPanels<T>& weight_;
  int64_t taps_;
  TileOffsets<T> offsets_;
  TapBuffer<T> samples_;
  int64_t column_stride_;
  Scratch<T> columns_, output_;
};

}  // namespace

template <typename T>
Tensor dense_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                     const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, scalar_type_of<T>(), channels_last);
  if (output.numel() == 0) return output;
  const OperandTensors<T> operands(s, input, sampling, weight);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias, scalar_type_of<T>());
  const T* bias_data = dense_bias ? dense_bias->template const_data_ptr<T>() : nullptr;
  T* out = output.template mutable_data_ptr<T>();

  const GroupedPanels<T> panels = pack_forward_weight(s, operands.weight);
  // Taps at a time: all that leave room for a tile of many positions.
  const int64_t positions = s.positions(), tap_bytes = s.channels * int64_t{sizeof(T)};
  const int64_t most_taps =
      std::clamp<int64_t>(kForwardTile.column_bytes / (kForwardTile.positions * tap_bytes), 1, s.taps());
  const int64_t taps = divide_up(s.taps(), divide_up(s.taps(), most_taps));  // in rounds of nearly equal length
  const int64_t tile =
      tile_size<T>(kForwardTile, taps * tap_bytes, s.batch * positions, torch::stable::get_num_threads());
  const int64_t tiles = divide_up(positions, tile);
  torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t first, int64_t last) {
    ForwardTile<T> worker(operands, panels, tile, taps);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t % tiles * tile;
      worker.run(t / tiles, begin, std::min(begin + tile, positions), bias_data, out, channels_last);
    }
  });
  return output;
}

template Tensor dense_forward<float>(const DeformConv2dSizes&, const Tensor&, const SamplingInputs&, const Tensor&,
                                     const std::optional<Tensor>&);
template Tensor dense_forward<double>(const DeformConv2dSizes&, const Tensor&, const SamplingInputs&, const Tensor&,
                                      const std::optional<Tensor>&);

}  // namespace dcn::cpu
