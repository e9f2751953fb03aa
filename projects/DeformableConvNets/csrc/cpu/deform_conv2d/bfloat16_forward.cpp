// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The forward pass of bfloat16.h: columns are gathered as bfloat16, a tile of output positions at a time, and
// multiplied with matrix instructions.
#include "cpu/deform_conv2d/bfloat16.h"
#include "cpu/deform_conv2d/bfloat16_operands.h"
#include "cpu/deform_conv2d/bfloat16_packing.h"
#include "cpu/deform_conv2d/grouped.h"

namespace dcn::cpu {
namespace {

// What a tile's columns may take of the second-level cache.
constexpr int64_t kColumnBytes = int64_t{576} << 10;
// Positions of a tile: more of them read the packed weight less often.
constexpr int64_t kMaxTile = 256;

// Writes output positions of one image. A tile's columns are gathered for some taps at a time, as (groups, taps, panels
// of the group, positions, channels of the panel), and multiplied with the packed weight of these taps.
class Bfloat16ForwardTile {
 public:
  Bfloat16ForwardTile(const Bfloat16OperandTensors& operands, const Bfloat16Weight& weight, int64_t tile, int64_t taps)
      : operands_(operands),
        weight_(weight),
        tile_(tile),
        taps_(taps),
        sum_row_(operands.sizes.groups * weight.tiles * kRegisterTileRows),
        offsets_(operands.offsets, tile),
        samples_(1, tile, false),
        columns_(scratch<Bfloat16>(taps * operands.panels.total() * tile * kPanelColumns)),
        sums_(scratch<float>(tile * sum_row_)),
        output_(scratch<Bfloat16>(tile * operands.sizes.out_channels)) {}

  // Positions [begin, end) of image n. `output` is (batch, out_channels, positions), or (batch, positions,
  // out_channels) for channels_last.
  void run(int64_t n, int64_t begin, int64_t end, const float* bias, Bfloat16* output, bool channels_last) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t count = end - begin;
    offsets_.load(n, begin, count);
    for (int64_t tap = 0; tap < s.taps(); tap += taps_) {
      const int64_t taps = std::min(taps_, s.taps() - tap);
      for (int64_t t = 0; t < taps; ++t) gather(n, count, tap + t, t, taps);
      multiply(tap, taps, count);
    }
    Bfloat16* out = channels_last ? output + (n * s.positions() + begin) * s.out_channels : output_.get();
    const int64_t group_out = s.group_out_channels();
    for (int64_t g = 0; g < s.groups; ++g) {
      amx_kernels()->round_rows(sums_.get() + g * weight_.tiles * kRegisterTileRows, sum_row_,
                                bias ? bias + g * group_out : nullptr, count, group_out, out + g * group_out,
                                s.out_channels);
    }
    if (!channels_last) {
      amx_kernels()->transpose(out, s.out_channels, count, s.out_channels,
                               output + n * s.out_channels * s.positions() + begin, s.positions());
    }
  }

 private:
  int64_t panel_size() const { return tile_ * kPanelColumns; }

  // Columns of tap t of the `taps` that are gathered at a time.
  void gather(int64_t n, int64_t count, int64_t tap, int64_t t, int64_t taps) {
    const ChannelPanels& panels = operands_.panels;
    const TapSamples<float>* samples = nullptr;
    int64_t located = -1;
    for (size_t i = 0; i < panels.segments().size(); ++i) {
      const Segment& segment = panels.segments()[i];
      if (segment.deform_group != located) {
        located = segment.deform_group;
        samples = samples_.locate(offsets_, located, tap, 1, count);
      }
      const int64_t first = panels.first_of_group(segment.group);
      const int64_t panel = first * taps + t * panels.of_group(segment.group) + panels.first_panel(i) - first;
      amx_kernels()->gather(operands_.channels(n, segment), *samples, columns_.get() + panel * panel_size(),
                            panel_size());
    }
  }

  void multiply(int64_t tap, int64_t taps, int64_t count) const {
    const ChannelPanels& panels = operands_.panels;
    for (int64_t g = 0; g < operands_.sizes.groups; ++g) {
      AmxProduct product{};
      product.a = columns_.get() + panels.first_of_group(g) * taps * panel_size();
      product.a_panel = panel_size();
      product.a_panels = taps * panels.of_group(g);
      product.b = weight_.data.get() + weight_.begin[g];
      product.b_panel = 2 * kRegisterTileValues * operands_.sizes.taps() * panels.of_group(g);
      product.b_first = tap * panels.of_group(g);
      product.c = sums_.get() + g * weight_.tiles * kRegisterTileRows;
      product.c_row = sum_row_;
      product.row_tiles = register_tiles_of(count);
      product.column_tiles = weight_.tiles;
      product.accumulate = tap > 0;
      amx_kernels()->multiply(product);
    }
  }

  const Bfloat16OperandTensors& operands_;
  const Bfloat16Weight& weight_;
  int64_t tile_, taps_, sum_row_;
  RegisterTileSession session_;
  TileOffsets<float> offsets_;
  TapBuffer<float> samples_;
  Scratch<Bfloat16> columns_;
  Scratch<float> sums_;
  Scratch<Bfloat16> output_;
};

}  // namespace

bool uses_bfloat16_path(const DeformConv2dSizes& s, ScalarType dtype) {
  return dtype == ScalarType::BFloat16 && amx_kernels() && !uses_grouped_path<float>(s);
}

Tensor bfloat16_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                        const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, ScalarType::BFloat16, channels_last);
  if (output.numel() == 0) return output;
  const Bfloat16OperandTensors operands(s, input, sampling, s.channels);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias, ScalarType::Float);
  const float* bias_data = dense_bias ? dense_bias->const_data_ptr<float>() : nullptr;
  auto* const out = static_cast<Bfloat16*>(output.mutable_data_ptr());
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Bfloat16Weight packed(s, operands.panels, bits_of(dense_weight));

  // Taps at a time: all that leave room for a tile of many positions.
  const int64_t positions = s.positions(), workers = torch::stable::get_num_threads();
  const int64_t tap_bytes = operands.panels.total() * kPanelColumns * int64_t{sizeof(Bfloat16)};
  const int64_t most_taps = std::clamp<int64_t>(kColumnBytes / (kMaxTile * tap_bytes), 1, s.taps());
  const int64_t taps = divide_up(s.taps(), divide_up(s.taps(), most_taps));  // in rounds of nearly equal length
  const int64_t most = std::min({kMaxTile, kColumnBytes / (taps * tap_bytes), divide_up(s.batch * positions, workers)});
  // The rows of two register tiles at a time, and tiles of nearly equal size.
  constexpr int64_t kRows = 2 * kRegisterTileRows;
  const int64_t about = std::max(most / kRows * kRows, kRows);
  const int64_t tile =
      divide_up(divide_up(positions, divide_up(positions, about)), kRegisterTileRows) * kRegisterTileRows;
  const int64_t tiles = divide_up(positions, tile);
  torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t first, int64_t last) {
    Bfloat16ForwardTile worker(operands, packed, tile, taps);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t % tiles * tile;
      worker.run(t / tiles, begin, std::min(begin + tile, positions), bias_data, out, channels_last);
    }
  });
  return output;
}

}  // namespace dcn::cpu
