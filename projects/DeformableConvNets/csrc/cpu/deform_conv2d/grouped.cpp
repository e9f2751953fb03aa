// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The path of grouped.h: how the weight is packed for its kernels, which samples they get, and what a thread does.
#include "cpu/deform_conv2d/grouped.h"

namespace dcn::cpu {
namespace {

// Groups of more channels are left to matrix products.
constexpr int64_t kMostGroupChannels = 32;

// Channels of a lane group (see grouped_impl.h): a vector of whole groups, or the vectors of one group.
template <typename T>
int64_t lane_group_channels(const DeformConv2dSizes& s) {
  return std::max(kernels<T>().lanes, s.group_channels());
}

// Calls visit(place in the packed weight, place in the weight, stride of taps in the packed weight) for tap 0 of every
// pair of channels in the channels [begin, end); in the weight, taps lie side by side. The packed weight has, for every
// lane group, (taps, output vectors, input vectors, distances, lanes), of input lane i and output lane i ^ distance.
template <typename T, typename Visit>
void for_each_weight(const DeformConv2dSizes& s, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t lanes = kernels<T>().lanes, width = lane_group_channels<T>(s), vectors = width / lanes;
  const int64_t channels = s.group_channels(), taps = s.taps(), distances = std::min(channels, lanes);
  const int64_t tap_stride = width * vectors * distances;
  for (int64_t first = begin; first < end; first += width) {
    int64_t packed = (first - begin) * channels * taps;
    for (int64_t u = 0; u < vectors; ++u) {
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t distance = 0; distance < distances; ++distance) {
          for (int64_t lane = 0; lane < lanes; ++lane, ++packed) {
            const int64_t out = first + u * lanes + (lane ^ distance), in = (first + v * lanes + lane) % channels;
            visit(packed, (out * channels + in) * taps, tap_stride);
          }
        }
      }
    }
  }
}

template <typename T>
Scratch<T> pack_grouped_weight(const DeformConv2dSizes& s, const T* weight, int64_t begin, int64_t end) {
  Scratch<T> packed = scratch<T>((end - begin) * s.group_channels() * s.taps());
  for_each_weight<T>(s, begin, end, [&](int64_t to, int64_t from, int64_t tap_stride) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) packed[to + tap * tap_stride] = weight[from + tap];
  });
  return packed;
}

// Samples of all taps of a tile, and memory for them.
template <typename T>
class SampleBuffer {
 public:
  SampleBuffer(const OperandTensors<T>& operands, bool derivatives)
      : operands_(operands),
        offsets_(operands.offsets, kGroupedTile),
        pixels_(scratch<int32_t>(4 * kGroupedStride)),
        rows_(scratch<const T*>(size())),
        weights_(scratch<T>(size())) {
    if (!derivatives) return;
    grad_rows_ = scratch<T*>(size());
    factors_ = scratch<T>(9 * size() / 4);
    trash_ = scratch<T>(operands.sizes.channels);
    std::fill_n(trash_.get(), operands.sizes.channels, T(0));
  }

  // Goes to positions [begin, begin + count) of image n.
  void load(int64_t n, int64_t begin, int64_t count) {
    offsets_.load(n, begin, count);
    image_ = operands_.images + operands_.image_begin(n), count_ = count;
  }

  // Samples of the positions for the channels from `channel` on. `grad_image` is where the image's gradients are added,
  // null if they are not wanted.
  GroupedSamples<T> locate(int64_t deform_group, int64_t channel, T* grad_image = nullptr) {
    const DeformConv2dSizes& s = operands_.sizes;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      const TapSamples<T> samples = of_tap(tap);
      offsets_.locate(deform_group, tap, samples);
      const int64_t at = tap * 4 * kGroupedStride;
      kernels<T>().point(samples, image_ + channel, s.channels, operands_.zeros.data(), rows_.get() + at);
      if (!grad_rows_) continue;
      if (grad_image) {
        kernels<T>().point_gradients(samples, grad_image + channel, s.channels, trash_.get(), grad_rows_.get() + at);
      } else {
        std::fill_n(grad_rows_.get() + at, 4 * kGroupedStride, trash_.get());
      }
    }
    return {s.taps(), count_, rows_.get(), grad_rows_.get(), weights_.get()};
  }

  // The samples of one tap, as the last call of locate left them; their pixels are those of the last tap.
  TapSamples<T> of_tap(int64_t tap) const {
    TapSamples<T> samples{};
    samples.count = count_;
    for (int k = 0; k < 4; ++k) {
      samples.pixel[k] = pixels_.get() + k * kGroupedStride;
      samples.weight[k] = weights_.get() + (tap * 4 + k) * kGroupedStride;
    }
    if (!factors_) return samples;
    T* next = factors_.get() + tap * 9 * kGroupedStride;
    set_derivatives(samples, next, kGroupedStride);
    return samples;
  }

 private:
  int64_t size() const { return operands_.sizes.taps() * 4 * kGroupedStride; }

  const OperandTensors<T>& operands_;
  TileOffsets<T> offsets_;
  const T* image_ = nullptr;
  int64_t count_ = 0;
  Scratch<int32_t> pixels_;
  Scratch<const T*> rows_;
  Scratch<T*> grad_rows_;
  Scratch<T> weights_, factors_;
  Scratch<T> trash_;
};

// Backward of some images and channels, as BackwardTask.
template <typename T>
class GroupedBackwardTask {
 public:
  GroupedBackwardTask(const OperandTensors<T>& operands, const T* grad_output, bool channels_last,
                      const GradientsView<T>& gradients, int64_t begin, int64_t end)
      : operands_(operands),
        sizes_(operands.sizes),
        grad_output_(grad_output),
        channels_last_(channels_last),
        gradients_(gradients),
        begin_(begin),
        end_(end),
        samples_(operands, true),
        weight_(pack_grouped_weight(sizes_, operands.weight.data, begin, end)),
        grad_weight_(scratch<T>((end - begin) * weight_row())),
        dots_(scratch<T>(sizes_.taps() * 4 * kGroupedStride)),
        memory_(scratch<T>(sizes_.taps() * kGroupedMemory)) {
    std::fill_n(grad_weight_.get(), (end - begin) * weight_row(), T(0));
    if (!channels_last) grad_tile_ = scratch<T>(kGroupedTile * (end - begin));
  }

  void run(Range images) {
    for (int64_t n = images.begin; n < images.end; ++n) {
      for (int64_t first = 0; first < sizes_.positions(); first += kGroupedTile) {
        run_tile(n, first, std::min(kGroupedTile, sizes_.positions() - first));
      }
    }
    if (!gradients_.weight.data) return;
    for_each_weight<T>(sizes_, begin_, end_, [&](int64_t from, int64_t to, int64_t tap_stride) {
      for (int64_t tap = 0; tap < sizes_.taps(); ++tap) {
        gradients_.weight.data[to + tap] = grad_weight_[from + tap * tap_stride];
      }
    });
  }

 private:
  // Values of the weight for one channel.
  int64_t weight_row() const { return sizes_.group_channels() * sizes_.taps(); }

  void run_tile(int64_t n, int64_t first, int64_t count) {
    // The tile's output gradients from channel begin_ on.
    const T* grad = grad_output_ + (n * sizes_.positions() + first) * sizes_.channels + begin_;
    int64_t grad_stride = sizes_.channels;
    if (!channels_last_) {
      grad_stride = end_ - begin_;
      kernels<T>().transpose(grad_output_ + (n * sizes_.channels + begin_) * sizes_.positions() + first,
                             sizes_.positions(), grad_stride, count, grad_tile_.get(), grad_stride);
      grad = grad_tile_.get();
    }
    samples_.load(n, first, count);
    const int64_t deform_channels = sizes_.deform_channels();
    for (int64_t c = begin_; c < end_;) {
      const int64_t group = c / deform_channels, end = std::min(end_, (group + 1) * deform_channels);
      T* grad_image = gradients_.input ? gradients_.input + operands_.image_begin(n) : nullptr;
      const GroupedSamples<T> samples = samples_.locate(group, c, grad_image);
      const int64_t from = (c - begin_) * weight_row();
      kernels<T>().grouped_tile_backward(samples, {end - c, sizes_.group_channels(), weight_.get() + from},
                                         grad + c - begin_, grad_stride, grad_weight_.get() + from, dots_.get(),
                                         memory_.get());
      if (gradients_.offset) add_offset_gradients(n, group, first);
      c = end;
    }
  }

  void add_offset_gradients(int64_t n, int64_t group, int64_t first) {
    for (int64_t tap = 0; tap < sizes_.taps(); ++tap) {
      const T* tap_dots = dots_.get() + tap * 4 * kGroupedStride;
      const T* const dots[4] = {tap_dots, tap_dots + kGroupedStride, tap_dots + 2 * kGroupedStride,
                                tap_dots + 3 * kGroupedStride};
      gradients_.add_to_offsets(sizes_, n, group, tap, first, samples_.of_tap(tap), dots);
    }
  }

  const OperandTensors<T>& operands_;
  const DeformConv2dSizes& sizes_;
  const T* grad_output_;
  bool channels_last_;
  GradientsView<T> gradients_;
  int64_t begin_, end_;
  SampleBuffer<T> samples_;
  Scratch<T> weight_;
  Scratch<T> grad_weight_;
  Scratch<T> dots_, memory_, grad_tile_;
};

}  // namespace

template <typename T>
bool uses_grouped_path(const DeformConv2dSizes& s) {
  const int64_t channels = s.group_channels(), lanes = kernels<T>().lanes;
  if (channels < 1 || channels != s.group_out_channels() || s.groups == 1) return false;
  if (channels > std::min(kMostGroupChannels, 4 * lanes) || (channels & (channels - 1))) return false;
  const int64_t width = lane_group_channels<T>(s);
  return s.channels % width == 0 && s.deform_channels() % width == 0;
}

template <typename T>
Tensor grouped_forward(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                       const Tensor& weight, const std::optional<Tensor>& bias) {
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, scalar_type_of<T>(), channels_last);
  if (output.numel() == 0) return output;
  const OperandTensors<T> operands(s, input, sampling, dense(weight, scalar_type_of<T>()));
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias, scalar_type_of<T>());
  const T* bias_data = dense_bias ? dense_bias->template const_data_ptr<T>() : nullptr;
  T* out = output.template mutable_data_ptr<T>();

  const Scratch<T> packed = pack_grouped_weight(s, operands.weight.data, 0, s.channels);
  const int64_t positions = s.positions(), channels = s.channels, deform_channels = s.deform_channels();
  const int64_t tiles = divide_up(positions, kGroupedTile);
  torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t first, int64_t last) {
    SampleBuffer<T> buffer(operands, false);
    const Scratch<T> tile = scratch<T>(channels_last ? 0 : kGroupedTile * channels);
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = t / tiles, begin = t % tiles * kGroupedTile, count = std::min(kGroupedTile, positions - begin);
      buffer.load(n, begin, count);
      T* to = channels_last ? out + (n * positions + begin) * channels : tile.get();
      for (int64_t group = 0; group < s.deform_groups; ++group) {
        const int64_t c = group * deform_channels;
        const GroupedSamples<T> samples = buffer.locate(group, c);
        const GroupedChannels<T> some{deform_channels, s.group_channels(),
                                      packed.get() + c * s.group_channels() * s.taps()};
        kernels<T>().grouped_tile_forward(samples, some, bias_data ? bias_data + c : nullptr, to + c, channels);
      }
      if (!channels_last) {
        kernels<T>().transpose(to, channels, count, channels, out + n * channels * positions + begin, positions);
      }
    }
  });
  return output;
}

template <typename T>
std::array<Tensor, 4> grouped_backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                                       const SamplingInputs& sampling, const Tensor& weight,
                                       const NeededGradients& need) {
  // Tasks: images first, then channels, until there is one for each thread.
  const int64_t workers = torch::stable::get_num_threads(), width = lane_group_channels<T>(s);
  const int64_t image_shares = std::clamp<int64_t>(s.batch, 1, workers);
  const int64_t channel_shares = std::min(divide_up(workers, image_shares), s.channels / width);
  const Tensor contiguous_weight = dense(weight, scalar_type_of<T>());
  GradientTensors<T> gradients(s, input, sampling, contiguous_weight, need, image_shares, channel_shares);
  if (s.batch > 0) {
    // They end with this block: before the input gradient is copied to another memory format.
    const OperandTensors<T> operands(s, input, sampling, contiguous_weight);
    const bool channels_last = is_channels_last(grad);
    const Tensor grad_output =
        dense(grad, scalar_type_of<T>(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    const T* grad_data = grad_output.template const_data_ptr<T>();
    torch::stable::parallel_for(0, image_shares * channel_shares, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image_share = task / channel_shares, channel_share = task % channel_shares;
        const Range lane_groups = share_of(s.channels / width, channel_shares, channel_share);
        GroupedBackwardTask<T>(operands, grad_data, channels_last, gradients.of(image_share, channel_share),
                               lane_groups.begin * width, lane_groups.end * width)
            .run(share_of(s.batch, image_shares, image_share));
      }
    });
  }
  return gradients.finish();
}

#define DCN_INSTANTIATE(T)                                                                                          \
  template bool uses_grouped_path<T>(const DeformConv2dSizes&);                                                     \
  template Tensor grouped_forward<T>(const DeformConv2dSizes&, const Tensor&, const SamplingInputs&, const Tensor&, \
                                     const std::optional<Tensor>&);                                                 \
  template std::array<Tensor, 4> grouped_backward<T>(const DeformConv2dSizes&, const Tensor&, const Tensor&,        \
                                                     const SamplingInputs&, const Tensor&, const NeededGradients&);
DCN_INSTANTIATE(float)
DCN_INSTANTIATE(double)
#undef DCN_INSTANTIATE

}  // namespace dcn::cpu
