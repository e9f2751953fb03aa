// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The backward pass of bfloat16.h: gradient columns, their spreading to the input and the offsets, and the weight's
// gradient, tap by tap for a tile of output positions.
#include "cpu/deform_conv2d/bfloat16.h"
#include "cpu/deform_conv2d/bfloat16_operands.h"
#include "cpu/deform_conv2d/bfloat16_packing.h"

namespace dcn::cpu {
namespace {

// What a tile keeps in the second-level cache: the output gradients, and a segment's weight gradient.
constexpr int64_t kGradOutputBytes = int64_t{512} << 10;
constexpr int64_t kWeightBytes = int64_t{1200} << 10;
// Positions of a tile: more of them read the weight and its gradient less often.
constexpr int64_t kMaxTile = 512;

// The input's gradients while they are summed up: (batch, pixels, channels), the channels in the order of
// Bfloat16Backward and each segment in whole panels.
class InputGradientTensor {
 public:
  InputGradientTensor(const Bfloat16OperandTensors& operands, const Tensor& input, bool needed)
      : operands_(operands), row_(operands.panels.total() * kPanelColumns) {
    const DeformConv2dSizes& s = operands.sizes;
    if (needed) sums_ = torch::stable::new_zeros(input, {s.batch, s.pixels(), row_}, ScalarType::Float);
  }

  int64_t row() const { return row_; }
  // Null where not needed.
  float* at(int64_t n, int64_t segment) {
    if (!sums_) return nullptr;
    return sums_->mutable_data_ptr<float>() + n * operands_.sizes.pixels() * row_ +
           operands_.panels.first_panel(segment) * kPanelColumns;
  }

  // In the dtype and the memory format of `input`.
  Tensor finish(const Tensor& input) const {
    if (!sums_) return empty_result(input);
    const DeformConv2dSizes& s = operands_.sizes;
    const bool channels_last = is_channels_last(input);
    Tensor result = empty_4d(input, {s.batch, s.channels, s.height, s.width}, ScalarType::BFloat16, channels_last);
    const float* from = sums_->const_data_ptr<float>();
    auto* const to = static_cast<Bfloat16*>(result.mutable_data_ptr());
    for_each_pixel_range(s.batch, s.pixels(), [&](int64_t n, int64_t begin, int64_t count) {
      const int64_t first = n * s.pixels() + begin;
      if (channels_last) return round(from + first * row_, count, to + first * s.channels);
      const Scratch<Bfloat16> rounded = scratch<Bfloat16>(count * s.channels);
      round(from + first * row_, count, rounded.get());
      amx_kernels()->transpose(rounded.get(), s.channels, count, s.channels, to + n * s.channels * s.pixels() + begin,
                               s.pixels());
    });
    return result;
  }

 private:
  void round(const float* from, int64_t pixels, Bfloat16* to) const {
    const std::vector<Segment>& segments = operands_.panels.segments();
    for (int64_t i = 0; i < pixels; ++i, from += row_, to += operands_.sizes.channels) {
      for (size_t k = 0; k < segments.size(); ++k) {
        amx_kernels()->round_gradients(from + operands_.panels.first_panel(k) * kPanelColumns, segments[k].count,
                                       to + segments[k].begin);
      }
    }
  }

  const Bfloat16OperandTensors& operands_;
  int64_t row_;
  std::optional<Tensor> sums_;
};

// Backward of some images and some channels. Tasks of other channels or images write elsewhere, so there is nothing to
// lock, and the order of all sums is fixed.
class Bfloat16BackwardTask {
 public:
  Bfloat16BackwardTask(const Bfloat16OperandTensors& operands, const Bfloat16* weight, const Bfloat16* grad,
                       bool channels_last, int64_t tile, int64_t segment_channels, InputGradientTensor& input_gradient,
                       const WeightGradientView& weight_gradient, const GradientsView<float>& gradients)
      : operands_(operands),
        weight_(weight),
        tile_(tile),
        input_gradient_(input_gradient),
        weight_gradient_(weight_gradient),
        gradients_(gradients),
        grad_output_(operands.sizes, grad, channels_last, tile),
        offsets_(operands.offsets, tile),
        samples_(1, tile, true),
        columns_(scratch<float>(tile * panels_of(segment_channels) * kPanelColumns)),
        right_(scratch<Bfloat16>(panels_of(segment_channels) * right_panel_size())),
        grad_weight_(scratch<float>(operands.sizes.taps() * tap_size(segment_channels))),
        dots_(scratch<float>(4 * tile)),
        trash_(panels_of(segment_channels) * kPanelColumns, 0.F) {}

  void run(int64_t index, Range images) {
    const DeformConv2dSizes& s = operands_.sizes;
    const Segment& segment = operands_.panels.segments()[index];
    if (gradient_columns()) packed_weight_ = pack_backward_weight(s, segment, weight_);
    if (weight_gradient_) std::fill_n(grad_weight_.get(), s.taps() * tap_size(segment.count), 0.F);
    for (int64_t n = images.begin; n < images.end; ++n) {
      for (int64_t begin = 0; begin < s.positions(); begin += tile_) {
        run_tile(index, n, begin, std::min(tile_, s.positions() - begin));
      }
    }
    if (weight_gradient_) unpack_weight_gradient(s, segment, grad_weight_.get(), weight_gradient_);
  }

 private:
  bool gradient_columns() { return gradients_.offset || input_gradient_.at(0, 0); }
  int64_t right_panel_size() const { return panels_of(tile_) * 2 * kRegisterTileValues; }
  int64_t tap_size(int64_t channels) const {
    return register_tiles_of(operands_.sizes.group_out_channels()) * kRegisterTileRows * panels_of(channels) *
           kPanelColumns;
  }

  void run_tile(int64_t index, int64_t n, int64_t begin, int64_t count) {
    const DeformConv2dSizes& s = operands_.sizes;
    const Segment& segment = operands_.panels.segments()[index];
    offsets_.load(n, begin, count);
    if (gradient_columns()) grad_output_.pack_rows(n, begin, count, segment.group);
    if (weight_gradient_) {
      grad_output_.pack_columns(n, begin, count, segment.group);
      clear_after(count, panels_of(segment.count));
    }
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      if (gradient_columns()) multiply_columns(segment, tap, count);
      const TapSamples<float>& samples = *samples_.locate(offsets_, segment.deform_group, tap, 1, count);
      Bfloat16Backward pass{};
      if (gradient_columns()) pass.gradient = columns_.get();
      pass.gradient_row = panels_of(segment.count) * kPanelColumns;
      pass.grad_image = input_gradient_.at(n, index);
      pass.grad_stride = input_gradient_.row();
      pass.trash = trash_.data();
      for (int k = 0; gradients_.offset && k < 4; ++k) pass.dots[k] = dots_.get() + k * tile_;
      if (weight_gradient_) pass.right = right_.get();
      pass.right_panel = right_panel_size();
      amx_kernels()->backward(operands_.channels(n, segment), samples, pass);
      if (gradients_.offset) {
        gradients_.add_to_offsets(s, n, segment.deform_group, tap, begin, samples, pass.dots);
      }
      if (weight_gradient_) multiply_weight(segment, tap, count);
    }
  }

  // Positions after the last one, up to a whole panel, must not count: they become zeros.
  void clear_after(int64_t count, int64_t channel_panels) {
    const int64_t pairs = divide_up(count, 2), left = panels_of(count) * kPanelColumns / 2 - pairs;
    for (int64_t b = 0; b < channel_panels; ++b) {
      for (int64_t odd = 0; odd < 2; ++odd) {
        Bfloat16* last =
            right_.get() + b * right_panel_size() + (2 * (panels_of(count) - 1) + odd) * kRegisterTileValues;
        std::fill_n(last + kRegisterTileValues - left * kPanelColumns, left * kPanelColumns, Bfloat16{0});
      }
    }
  }

  // Gradient columns (positions, channels) of a tap = output gradients @ weight.
  void multiply_columns(const Segment& segment, int64_t tap, int64_t count) const {
    const int64_t out_panels = panels_of(operands_.sizes.group_out_channels());
    const int64_t channel_panels = panels_of(segment.count);
    AmxProduct product{};
    product.a = grad_output_.rows();
    product.a_panel = grad_output_.position_panel();
    product.a_panels = out_panels;
    product.b = packed_weight_.get() + tap * channel_panels * out_panels * 2 * kRegisterTileValues;
    product.b_panel = out_panels * 2 * kRegisterTileValues;
    product.c = columns_.get();
    product.c_row = channel_panels * kPanelColumns;
    product.row_tiles = register_tiles_of(count);
    product.column_tiles = 2 * channel_panels;
    amx_kernels()->multiply(product);
  }

  // Weight gradient (output channels, channels) of a tap += output gradients^T @ columns.
  void multiply_weight(const Segment& segment, int64_t tap, int64_t count) const {
    AmxProduct product{};
    product.a = grad_output_.columns();
    product.a_panel = grad_output_.out_panel();
    product.a_panels = panels_of(count);
    product.b = right_.get();
    product.b_panel = right_panel_size();
    product.c = grad_weight_.get() + tap * tap_size(segment.count);
    product.c_row = panels_of(segment.count) * kPanelColumns;
    product.row_tiles = register_tiles_of(operands_.sizes.group_out_channels());
    product.column_tiles = 2 * panels_of(segment.count);
    product.accumulate = true;
    amx_kernels()->multiply(product);
  }

  const Bfloat16OperandTensors& operands_;
  const Bfloat16* weight_;
  int64_t tile_;
  InputGradientTensor& input_gradient_;
  WeightGradientView weight_gradient_;
  GradientsView<float> gradients_;
  RegisterTileSession session_;
  Bfloat16GradOutput grad_output_;
  TileOffsets<float> offsets_;
  TapBuffer<float> samples_;
  Scratch<Bfloat16> packed_weight_;
  Scratch<float> columns_;
  Scratch<Bfloat16> right_;
  Scratch<float> grad_weight_, dots_;
  std::vector<float> trash_;
};

}  // namespace

std::array<Tensor, 4> bfloat16_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                        const SamplingInputs& sampling, const Tensor& weight,
                                        const NeededGradients& need) {
  // Tasks: images first, then channels, until there is one for each thread.
  const int64_t workers = torch::stable::get_num_threads();
  const int64_t image_shares = std::clamp<int64_t>(s.batch, 1, workers),
                wanted_shares = divide_up(workers, image_shares);
  const int64_t weight_bytes = s.taps() * std::max<int64_t>(s.group_out_channels(), 1) * int64_t{sizeof(float)};
  const int64_t fitting = std::clamp<int64_t>(kWeightBytes / weight_bytes, kPanelColumns, 128);
  const int64_t wanted = std::min(fitting, divide_up(s.channels, wanted_shares));
  const int64_t segment_channels = std::max(wanted / kPanelColumns, int64_t{1}) * kPanelColumns;

  const Bfloat16OperandTensors operands(s, input, sampling, segment_channels);
  const auto segments = static_cast<int64_t>(operands.panels.segments().size());
  const int64_t channel_shares = std::min(wanted_shares, segments);
  const bool channels_last = is_channels_last(grad);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const Tensor grad_output =
      torch::stable::contiguous(grad, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);

  InputGradientTensor input_gradient(operands, input, need.input);
  // The shares of several tasks are added up in float32. With an empty batch there is none, and zeros are returned.
  const bool add_weights = need.weight && (image_shares > 1 || s.batch == 0);
  GradientTensors<float> gradients(s, input, sampling, dense_weight, {false, need.offset, add_weights}, image_shares,
                                   channel_shares);
  Tensor weight_gradient = empty_result(weight);
  if (need.weight && !add_weights) weight_gradient = torch::stable::empty_like(dense_weight);
  if (s.batch > 0 && s.out_channels > 0) {
    const int64_t out_bytes = panels_of(s.group_out_channels()) * kPanelColumns * int64_t{2 * sizeof(Bfloat16)};
    const int64_t most = std::clamp<int64_t>(kGradOutputBytes / out_bytes, kPanelColumns, kMaxTile);
    const int64_t tile = panels_of(divide_up(s.positions(), divide_up(s.positions(), most))) * kPanelColumns;
    torch::stable::parallel_for(0, image_shares * channel_shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image_share = task / channel_shares, channel_share = task % channel_shares;
        const GradientsView<float> view = gradients.of(image_share, channel_share);
        WeightGradientView weights{nullptr, view.weight.data};
        if (need.weight && !add_weights) weights.rounded = static_cast<Bfloat16*>(weight_gradient.mutable_data_ptr());
        Bfloat16BackwardTask worker(operands, bits_of(dense_weight), bits_of(grad_output), channels_last, tile,
                                    segment_channels, input_gradient, weights, view);
        const Range range = share_of(segments, channel_shares, channel_share);
        for (int64_t i = range.begin; i < range.end; ++i) worker.run(i, share_of(s.batch, image_shares, image_share));
      }
    });
  }
  std::array<Tensor, 4> results = gradients.finish();
  results[0] = input_gradient.finish(input);
  if (need.weight && !add_weights) results[2] = weight_gradient;
  return results;
}

}  // namespace dcn::cpu
