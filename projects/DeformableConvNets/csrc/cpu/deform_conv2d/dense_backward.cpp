// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The backward pass of dense.h: the gradient columns of a tile of output positions are multiplied out in the cache,
// spread to the input and the offsets, and overwritten with the samples, from which the weight's gradient is computed.
#include "cpu/deform_conv2d/dense.h"

namespace dcn::cpu {
namespace {

constexpr TileLimits kBackwardTile{int64_t{576} << 10, 240};
constexpr int64_t kWeightBytes = int64_t{1200} << 10;
// A task with at least that many segments packs an image's output gradients once, and keeps them.
constexpr int64_t kKeptPanelSegments = 4;

// Backward of some images and some channels. Tasks of other channels or images write elsewhere, so there is nothing
// to lock, and the order of all sums is fixed.
template <typename T>
class BackwardTask {
 public:
  BackwardTask(const OperandTensors<T>& operands, const T* grad_output, bool channels_last, int64_t tile,
               int64_t segment_channels, bool keeps_panels, const GradientsView<T>& gradients)
      : operands_(operands),
        grad_output_(grad_output),
        channels_last_(channels_last),
        tile_(tile),
        keeps_panels_(keeps_panels),
        gradients_(gradients),
        grad_panels_(operands.sizes.group_out_channels()),
        offsets_(operands.offsets, tile),
        samples_(operands.sizes.taps(), tile, true),
        grad_tiles_(scratch<T>(grad_panels_.size(tile) *
                               (keeps_panels ? divide_up(operands.sizes.positions(), tile) : int64_t{1}))),
        columns_(scratch<T>(tile * operands.sizes.taps() * segment_channels)),
        grad_weight_(scratch<T>(operands.sizes.taps() * segment_channels * operands.sizes.group_out_channels())),
        dots_(scratch<T>(operands.sizes.taps() * 4 * tile)),
        trash_(segment_channels, T(0)) {}

  void run(const Segment& segment, Range images) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t width = s.taps() * segment.count, group_out = s.group_out_channels();
    if (gradients_.input || gradients_.offset) {
      weight_ = pack_backward_weight(s, operands_.weight, segment.group, segment.begin % s.group_channels(),
                                     segment.count, grad_panels_);
    }
    if (gradients_.weight.data) std::fill_n(grad_weight_.get(), width * group_out, T(0));
    for (int64_t n = images.begin; n < images.end; ++n) {
      const bool packed = keeps_panels_ && packed_image_ == n && packed_group_ == segment.group;
      for (int64_t begin = 0; begin < s.positions(); begin += tile_) {
        run_tile(segment, n, begin, std::min(tile_, s.positions() - begin), packed);
      }
      packed_image_ = n, packed_group_ = segment.group;
    }
    if (gradients_.weight.data) {
      unpack_weight_gradient(s, grad_weight_.get(), segment.group, segment.begin % s.group_channels(), segment.count,
                             gradients_.weight);
    }
  }

 private:
  void run_tile(const Segment& segment, int64_t n, int64_t begin, int64_t count, bool packed) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t width = s.taps() * segment.count;
    offsets_.load(n, begin, count);
    grad_tile_ = grad_tiles_.get() + (keeps_panels_ ? begin / tile_ * grad_panels_.size(tile_) : 0);
    if (!packed) pack_grad_output(segment, n, begin, count);
    if (gradients_.input || gradients_.offset) multiply_columns(count, width);
    sample(segment, n, begin, count, width);
    if (gradients_.weight.data) multiply_weight(count, width);
  }

  // Panels of the tile's output gradients, (positions, output channels of the group).
  void pack_grad_output(const Segment& segment, int64_t n, int64_t begin, int64_t count) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t first = segment.group * s.group_out_channels();
    if (channels_last_) {
      grad_panels_.pack_rows(grad_output_ + (n * s.positions() + begin) * s.out_channels + first, s.out_channels, count,
                             grad_tile_);
    } else {
      grad_panels_.pack_columns(grad_output_ + (n * s.out_channels + first) * s.positions() + begin, s.positions(),
                                count, grad_tile_);
    }
  }

  // Gradient columns (positions, taps, channels) = output gradients @ weight.
  void multiply_columns(int64_t count, int64_t width) const {
    TileProduct<T> product{};
    product.a = grad_tile_;
    product.a_row = grad_panels_.width();
    product.a_chunk = count * grad_panels_.width();
    product.chunks = grad_panels_.panels();
    product.depth = grad_panels_.depth();
    weight_.set_right(product);
    product.c = columns_.get();
    product.c_row = width;
    product.rows = count;
    product.columns = width;
    kernels<T>().multiply(product);
  }

  // Weight gradient (taps, channels, output channels) += columns^T @ output gradients.
  void multiply_weight(int64_t count, int64_t width) const {
    TileProduct<T> product{};
    product.a = columns_.get();
    product.a_row = width;
    product.chunks = 1;
    product.depth = count;
    product.transposed = true;
    product.b = grad_tile_;
    product.b_panel = count * grad_panels_.width();
    product.panel_vectors = grad_panels_.vectors();
    product.c = grad_weight_.get();
    product.c_row = grad_panels_.columns();
    product.rows = width;
    product.columns = grad_panels_.columns();
    product.accumulate = true;
    kernels<T>().multiply(product);
  }

  // Puts the samples in the place of the gradient columns, and their gradients where they belong.
  void sample(const Segment& segment, int64_t n, int64_t begin, int64_t count, int64_t width) {
    const DeformConv2dSizes& s = operands_.sizes;
    const TapSamples<T>* samples = samples_.locate(offsets_, segment.deform_group, 0, s.taps(), count);
    const ImageChannels<T> channels = operands_.channels(n, segment.begin, segment.count);
    if (!gradients_.input && !gradients_.offset) {
      return kernels<T>().gather(channels, samples, s.taps(), columns_.get(), width, segment.count);
    }
    T* grad_image = gradients_.input ? gradients_.input + operands_.image_begin(n) + segment.begin : nullptr;
    ColumnsBackward<T> pass{};
    pass.columns = columns_.get();
    pass.column_stride = width;
    pass.tap_stride = segment.count;
    pass.grad_image = grad_image;
    pass.trash = trash_.data();
    if (gradients_.offset) pass.dots = dots_.get();
    pass.dot_stride = tile_;
    kernels<T>().backward(channels, samples, s.taps(), pass);
    for (int64_t tap = 0; gradients_.offset && tap < s.taps(); ++tap) {
      const T* first = dots_.get() + tap * 4 * tile_;
      const T* const dots[4] = {first, first + tile_, first + 2 * tile_, first + 3 * tile_};
      gradients_.add_to_offsets(s, n, segment.deform_group, tap, begin, samples[tap], dots);
    }
  }

  const OperandTensors<T>& operands_;
  const T* grad_output_;
  bool channels_last_;
  int64_t tile_;
  bool keeps_panels_;  // of all tiles of an image, for the segments that follow
  int64_t packed_image_ = -1, packed_group_ = -1;
  GradientsView<T> gradients_;
  PanelShape<T> grad_panels_;
  TileOffsets<T> offsets_;
  TapBuffer<T> samples_;
  Panels<T> weight_;
  Scratch<T> grad_tiles_;
  T* grad_tile_ = nullptr;
  Scratch<T> columns_, grad_weight_, dots_;
  std::vector<T> trash_;
};

}  // namespace

template <typename T>
std::array<Tensor, 4> dense_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                     const SamplingInputs& sampling, const Tensor& weight,
                                     const NeededGradients& need) {
  const OperandTensors<T> operands(s, input, sampling, weight);
  const bool channels_last = is_channels_last(grad);
  const Tensor grad_output =
      dense(grad, scalar_type_of<T>(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const T* grad_data = grad_output.template const_data_ptr<T>();

  // Tasks: images first, then channels, until there is one for each thread.
  const int64_t workers = torch::stable::get_num_threads();
  const int64_t image_shares = std::clamp<int64_t>(s.batch, 1, workers);
  const int64_t wanted_shares = divide_up(workers, image_shares);
  const int64_t weight_bytes = s.taps() * std::max<int64_t>(s.group_out_channels(), 1) * int64_t{sizeof(T)};
  const int64_t fitting = std::clamp<int64_t>(kWeightBytes / weight_bytes, 16, 128) / 16 * 16;
  const int64_t segment_channels = std::min(fitting, std::max<int64_t>(divide_up(s.channels, wanted_shares), 16));
  const std::vector<Segment> segments = segments_of(s, segment_channels);
  const int64_t channel_shares = std::min(wanted_shares, static_cast<int64_t>(segments.size()));

  GradientTensors<T> gradients(s, input, sampling, weight, need, image_shares, channel_shares);
  if (s.batch > 0 && s.out_channels > 0) {
    const int64_t widest = std::min(segment_channels, s.group_channels());
    const int64_t tile = tile_size<T>(kBackwardTile, s.taps() * widest * int64_t{sizeof(T)}, s.positions(), 1);
    torch::stable::parallel_for(0, image_shares * channel_shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image_share = task / channel_shares, channel_share = task % channel_shares;
        const Range range = share_of(static_cast<int64_t>(segments.size()), channel_shares, channel_share);
        // Where an image's output gradients are small beside the weight, they are packed once for all segments.
        const bool keeps_panels = s.batch == 1 && range.end - range.begin >= kKeptPanelSegments;
        BackwardTask<T> worker(operands, grad_data, channels_last, tile, widest, keeps_panels,
                               gradients.of(image_share, channel_share));
        for (int64_t i = range.begin; i < range.end; ++i) {
          worker.run(segments[i], share_of(s.batch, image_shares, image_share));
        }
      }
    });
  }
  return gradients.finish();
}

template std::array<Tensor, 4> dense_backward<float>(const DeformConv2dSizes&, const Tensor&, const Tensor&,
                                                     const SamplingInputs&, const Tensor&, const NeededGradients&);
template std::array<Tensor, 4> dense_backward<double>(const DeformConv2dSizes&, const Tensor&, const Tensor&,
                                                      const SamplingInputs&, const Tensor&, const NeededGradients&);

}  // namespace dcn::cpu
