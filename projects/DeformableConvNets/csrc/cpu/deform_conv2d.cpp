// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d on CPU. A tile of output positions is gathered into a column matrix that stays in the cache and
// multiplied there; the column matrix of a whole image never exists.
#include <cstring>

#include "kernels.h"
#include "tiles.h"

namespace dcn::cpu {
namespace {

// A tile's columns shall fit the second-level cache together with what the matmul packs of them.
constexpr int64_t kTileBytes = int64_t{768} << 10;
constexpr int64_t kMinTile = 16;
constexpr int64_t kMaxTile = 512;
// Channels that the backward pass handles at a time.
constexpr int64_t kMaxSegment = 128;

// Channels [begin, begin + count) lie in one conv group and one deform group.
struct Segment {
  int64_t begin, count, group, deform_group;
};

std::vector<Segment> segments_of(const DeformConv2dSizes& s, int64_t max_count) {
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

int64_t tile_size(int64_t bytes_per_position, int64_t positions, int64_t workers) {
  const int64_t fitting = std::clamp(kTileBytes / std::max<int64_t>(bytes_per_position, 1), kMinTile, kMaxTile);
  return std::min(fitting, std::max(kMinTile, divide_up(positions, workers)));
}

// The tensors of one call, dense, in the dtype of the computation.
template <typename T>
struct Operands {
  Tensor image_tensor, offset_tensor, weight_tensor;
  std::optional<Tensor> mask_tensor;
  DeformConv2dSizes sizes;
  const T *images, *offsets, *masks, *weights;  // weights: (out_channels, taps, group_channels)

  Operands(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
           const std::optional<Tensor>& mask)
      : image_tensor(dense(input, scalar_type_of<T>(), MemoryFormat::ChannelsLast)),
        offset_tensor(dense(offset, scalar_type_of<T>())),
        weight_tensor(dense(weight, scalar_type_of<T>(), MemoryFormat::ChannelsLast)),
        sizes(s) {
    if (mask) mask_tensor = dense(*mask, scalar_type_of<T>());
    images = image_tensor.template const_data_ptr<T>();
    offsets = offset_tensor.template const_data_ptr<T>();
    weights = weight_tensor.template const_data_ptr<T>();
    masks = mask_tensor ? mask_tensor->template const_data_ptr<T>() : nullptr;
  }

  const T* image(int64_t n) const { return images + n * sizes.pixels() * sizes.channels; }
  int64_t offset_begin(int64_t n) const { return n * sizes.deform_groups * sizes.taps() * 2 * sizes.positions(); }
  const T* mask(int64_t n) const { return masks ? masks + offset_begin(n) / 2 : nullptr; }

  void locate(int64_t n, int64_t deform_group, int64_t begin, int64_t end, Neighbours<T>* samples,
              Derivatives<T>* derivatives) const {
    kernels<T>().locate(sizes, offsets + offset_begin(n), mask(n), deform_group, begin, end, samples, derivatives);
  }
};

// Writes output positions [begin, end) of image n. `output` is (batch, out_channels, positions), or
// (batch, positions, out_channels) for channels_last.
template <typename T>
class ForwardTile {
 public:
  ForwardTile(const Operands<T>& operands, int64_t tile)
      : operands_(operands),
        segments_(segments_of(operands.sizes, operands.sizes.channels)),
        columns_(scratch<T>(tile * operands.sizes.taps() * operands.sizes.channels)),
        samples_(scratch<Neighbours<T>>(tile * operands.sizes.taps())),
        zeros_(operands.sizes.channels, T(0)) {}

  void run(int64_t n, int64_t begin, int64_t end, const T* bias, T* output, bool channels_last) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t count = end - begin, taps = s.taps(), width = s.group_channels() * taps;
    int64_t located = -1;
    for (const Segment& segment : segments_) {
      if (segment.deform_group != located) {
        located = segment.deform_group;
        operands_.locate(n, located, begin, end, samples_.get(), nullptr);
      }
      T* columns = columns_.get() + segment.group * count * width + segment.begin % s.group_channels();
      kernels<T>().gather(operands_.image(n) + segment.begin, s.channels, zeros_.data(), samples_.get(), count * taps,
                          segment.count, columns, s.group_channels());
    }
    const int64_t group_out = s.group_out_channels(), positions = s.positions();
    for (int64_t g = 0; g < s.groups; ++g) {
      const T* columns = columns_.get() + g * count * width;
      const T* weight = operands_.weights + g * group_out * width;
      if (channels_last) {
        T* out = output + (n * positions + begin) * s.out_channels + g * group_out;
        const Tensor result = matrix(out, count, group_out, s.out_channels, 1);
        matmul_out(matrix(columns, count, width, width, 1), matrix(weight, width, group_out, 1, width), result, false);
      } else {
        T* out = output + (n * s.out_channels + g * group_out) * positions + begin;
        const Tensor result = matrix(out, group_out, count, positions, 1);
        matmul_out(matrix(weight, group_out, width, width, 1), matrix(columns, width, count, 1, width), result, false);
      }
    }
    if (bias) add_bias(n, begin, end, bias, output, channels_last);
  }

 private:
  void add_bias(int64_t n, int64_t begin, int64_t end, const T* bias, T* output, bool channels_last) const {
    const DeformConv2dSizes& s = operands_.sizes;
    if (channels_last) {
      for (int64_t p = begin; p < end; ++p) {
        kernels<T>().add_scaled(output + (n * s.positions() + p) * s.out_channels, bias, T(1), s.out_channels);
      }
    } else {
      for (int64_t o = 0; o < s.out_channels; ++o) {
        T* row = output + (n * s.out_channels + o) * s.positions();
        for (int64_t p = begin; p < end; ++p) row[p] += bias[o];
      }
    }
  }

  const Operands<T>& operands_;
  std::vector<Segment> segments_;
  std::unique_ptr<T[]> columns_;
  std::unique_ptr<Neighbours<T>[]> samples_;
  std::vector<T> zeros_;
};

template <typename T>
Tensor forward(const DeformConv2dSizes& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& mask) {
  const bool channels_last = is_channels_last(input);
  Tensor output = empty_4d(input, {s.batch, s.out_channels, s.out_h, s.out_w}, scalar_type_of<T>(), channels_last);
  if (output.numel() == 0) return output;
  const Operands<T> operands(s, input, offset, weight, mask);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias, scalar_type_of<T>());
  const T* bias_data = dense_bias ? dense_bias->template const_data_ptr<T>() : nullptr;
  T* out = output.template mutable_data_ptr<T>();

  const int64_t positions = s.positions();
  const int64_t tile =
      tile_size(s.taps() * s.channels * sizeof(T), s.batch * positions, torch::stable::get_num_threads());
  const int64_t tiles = divide_up(positions, tile);
  torch::stable::parallel_for(0, s.batch * tiles, 1, [&](int64_t first, int64_t last) {
    ForwardTile<T> worker(operands, tile);
    for (int64_t t = first; t < last; ++t) {
      const int64_t begin = t % tiles * tile;
      worker.run(t / tiles, begin, std::min(begin + tile, positions), bias_data, out, channels_last);
    }
  });
  return output;
}

// Where a backward task adds its results. Null where a gradient is not needed.
template <typename T>
struct Gradients {
  T* input;   // (batch, pixels, channels)
  T* offset;  // as offset
  T* mask;    // as mask
  T* weight;  // (out_channels, taps, group_channels)
};

// Backward of some images and some channels. Tasks of other channels or images write elsewhere, so there is nothing
// to lock, and the order of all sums is fixed.
template <typename T>
class BackwardTask {
 public:
  BackwardTask(const Operands<T>& operands, const T* grad_output, bool channels_last, int64_t tile,
               const Gradients<T>& gradients)
      : operands_(operands),
        grad_output_(grad_output),
        channels_last_(channels_last),
        tile_(tile),
        gradients_(gradients) {
    const DeformConv2dSizes& s = operands.sizes;
    const int64_t taps = s.taps(), channels = std::min(s.group_channels(), kMaxSegment);
    samples_ = scratch<Neighbours<T>>(tile * taps);
    derivatives_ = scratch<Derivatives<T>>(tile * taps);
    dots_ = scratch<T>(tile * taps * 4);
    columns_ = scratch<T>(tile * taps * channels);
    weight_ = scratch<T>(s.group_out_channels() * taps * channels);
    grad_weight_ = scratch<T>(s.group_out_channels() * taps * channels);
    zeros_.assign(channels, T(0));
  }

  void run(const Segment& segment, Range images) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t count = s.group_out_channels() * s.taps();
    copy_segment(segment, count, operands_.weights, s.group_channels(), weight_.get(), segment.count);
    if (gradients_.weight) std::fill_n(grad_weight_.get(), count * segment.count, T(0));
    for (int64_t n = images.begin; n < images.end; ++n) {
      for (int64_t begin = 0; begin < s.positions(); begin += tile_) {
        run_tile(segment, n, begin, std::min(begin + tile_, s.positions()));
      }
    }
    if (gradients_.weight) {
      T* out = gradients_.weight + segment.group * count * s.group_channels() + segment.begin % s.group_channels();
      for (int64_t row = 0; row < count; ++row) {
        std::copy_n(grad_weight_.get() + row * segment.count, segment.count, out + row * s.group_channels());
      }
    }
  }

 private:
  // (out_channels of the group, taps, channels of the segment) of the packed weight.
  void copy_segment(const Segment& segment, int64_t rows, const T* from, int64_t from_stride, T* to,
                    int64_t to_stride) const {
    from += segment.group * rows * from_stride + segment.begin % from_stride;
    for (int64_t row = 0; row < rows; ++row) std::copy_n(from + row * from_stride, segment.count, to + row * to_stride);
  }

  // Rows are positions [begin, end) of image n, columns the output channels of the segment's group.
  Tensor grad_output_tile(const Segment& segment, int64_t n, int64_t begin, int64_t end) const {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t first = segment.group * s.group_out_channels();
    if (channels_last_) {
      return matrix(grad_output_ + (n * s.positions() + begin) * s.out_channels + first, end - begin,
                    s.group_out_channels(), s.out_channels, 1);
    }
    return matrix(grad_output_ + (n * s.out_channels + first) * s.positions() + begin, end - begin,
                  s.group_out_channels(), 1, s.positions());
  }

  void run_tile(const Segment& segment, int64_t n, int64_t begin, int64_t end) {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t count = end - begin, width = s.taps() * segment.count, group_out = s.group_out_channels();
    const int64_t samples = count * s.taps();
    const Tensor grad_tile = grad_output_tile(segment, n, begin, end);
    const T* image = operands_.image(n) + segment.begin;
    operands_.locate(n, segment.deform_group, begin, end, samples_.get(), derivatives_.get());

    if (gradients_.input || gradients_.offset) {
      const Tensor grad_columns = matrix(columns_.get(), count, width, width, 1);
      matmul_out(grad_tile, matrix(weight_.get(), group_out, width, width, 1), grad_columns, false);
      if (gradients_.input) {
        kernels<T>().scatter(columns_.get(), segment.count, samples_.get(), samples, segment.count,
                             gradients_.input + n * s.pixels() * s.channels + segment.begin, s.channels);
      }
      if (gradients_.offset) {
        kernels<T>().dot(columns_.get(), segment.count, image, s.channels, samples_.get(), samples, segment.count,
                         dots_.get());
        add_offset_gradients(segment.deform_group, n, begin, end);
      }
    }
    if (gradients_.weight) {
      kernels<T>().gather(image, s.channels, zeros_.data(), samples_.get(), samples, segment.count, columns_.get(),
                          segment.count);
      const Tensor grad_weight = matrix(grad_weight_.get(), group_out, width, width, 1);
      matmul_out(torch::stable::transpose(grad_tile, 0, 1), matrix(columns_.get(), count, width, width, 1), grad_weight,
                 true);
    }
  }

  void add_offset_gradients(int64_t deform_group, int64_t n, int64_t begin, int64_t end) const {
    const DeformConv2dSizes& s = operands_.sizes;
    const int64_t taps = s.taps(), positions = s.positions();
    const int64_t start = (n * s.deform_groups + deform_group) * taps * positions;
    T* grad_offset = gradients_.offset + 2 * start;
    T* grad_mask = gradients_.mask ? gradients_.mask + start : nullptr;
    const T* dot = dots_.get();
    const Derivatives<T>* derivative = derivatives_.get();
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t tap = 0; tap < taps; ++tap, dot += 4, ++derivative) {
        T by_y = 0, by_x = 0, by_mask = 0;
        for (int k = 0; k < 4; ++k) {
          by_y += derivative->by_y[k] * dot[k];
          by_x += derivative->by_x[k] * dot[k];
          by_mask += derivative->by_mask[k] * dot[k];
        }
        grad_offset[(2 * tap) * positions + p] += by_y;
        grad_offset[(2 * tap + 1) * positions + p] += by_x;
        if (grad_mask) grad_mask[tap * positions + p] += by_mask;
      }
    }
  }

  const Operands<T>& operands_;
  const T* grad_output_;
  bool channels_last_;
  int64_t tile_;
  Gradients<T> gradients_;
  std::unique_ptr<Neighbours<T>[]> samples_;
  std::unique_ptr<Derivatives<T>[]> derivatives_;
  std::unique_ptr<T[]> dots_, columns_, weight_, grad_weight_;
  std::vector<T> zeros_;
};

template <typename T>
Tensor zeros_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_zeros(like, sizes, scalar_type_of<T>());
}

// Gradients in the dtype of the computation: input, offset, weight, mask; empty where not needed.
template <typename T>
std::array<Tensor, 4> backward(const DeformConv2dSizes& s, const Tensor& grad, const Tensor& input,
                               const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                               bool need_input, bool need_offset, bool need_weight) {
  const Operands<T> operands(s, input, offset, weight, mask);
  const bool channels_last = is_channels_last(grad);
  const Tensor grad_output =
      dense(grad, scalar_type_of<T>(), channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  const T* grad_data = grad_output.template const_data_ptr<T>();

  // Tasks: images first, then channels, until there is one for each thread. Threads that share an image have
  // offset gradients of their own, threads that share a channel have weight gradients of their own.
  const std::vector<Segment> all = segments_of(s, kMaxSegment);
  const int64_t workers = torch::stable::get_num_threads();
  const int64_t image_parts = std::max<int64_t>(std::min(s.batch, workers), 1);
  std::vector<Segment> segments = all;
  if (const int64_t wanted = divide_up(workers, image_parts); static_cast<int64_t>(segments.size()) < wanted) {
    segments = segments_of(s, std::max<int64_t>(divide_up(s.channels, wanted), 16));
  }
  const int64_t channel_parts =
      std::min<int64_t>(divide_up(workers, image_parts), static_cast<int64_t>(segments.size()));

  Tensor grad_input = empty_4d(input, {s.batch, s.channels, s.height, s.width}, scalar_type_of<T>(), true);
  torch::stable::zero_(grad_input);
  const int64_t offset_count = offset.numel(), mask_count = mask ? mask->numel() : 0, weight_count = weight.numel();
  Tensor grad_offset = zeros_of<T>(input, {need_offset ? channel_parts : 0, offset_count});
  Tensor grad_mask = zeros_of<T>(input, {need_offset && mask ? channel_parts : 0, mask_count});
  Tensor grad_weight = zeros_of<T>(input, {need_weight ? image_parts : 0, weight_count});

  const int64_t widest = std::min(s.group_channels(), kMaxSegment);
  const int64_t tile = tile_size(s.taps() * widest * sizeof(T), s.positions(), 1);
  if (s.batch > 0) {
    torch::stable::parallel_for(0, image_parts * channel_parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t image_part = task / channel_parts, channel_part = task % channel_parts;
        Gradients<T> gradients{};
        if (need_input) gradients.input = grad_input.template mutable_data_ptr<T>();
        if (need_offset) gradients.offset = grad_offset.template mutable_data_ptr<T>() + channel_part * offset_count;
        if (need_offset && mask) gradients.mask = grad_mask.template mutable_data_ptr<T>() + channel_part * mask_count;
        if (need_weight) gradients.weight = grad_weight.template mutable_data_ptr<T>() + image_part * weight_count;
        BackwardTask<T> worker(operands, grad_data, channels_last, tile, gradients);
        const Range range = part_of(static_cast<int64_t>(segments.size()), channel_parts, channel_part);
        for (int64_t i = range.begin; i < range.end; ++i) {
          worker.run(segments[i], part_of(s.batch, image_parts, image_part));
        }
      }
    });
  }

  const Tensor none = empty_result(grad);
  const int64_t first_axis = 0;
  const auto total = [&](const Tensor& parts, const Tensor& like) {
    const torch::headeronly::IntHeaderOnlyArrayRef axis(&first_axis, 1);
    return torch::stable::reshape(torch::stable::sum(parts, axis), like.sizes());
  };
  Tensor weight_result = none;
  if (need_weight) {
    // (out_channels, kernel_h, kernel_w, channels) as accumulated, to (out_channels, channels, kernel_h, kernel_w).
    const std::array<int64_t, 1> axis{0};
    const std::array<int64_t, 4> packed{s.out_channels, s.kernel_h, s.kernel_w, s.group_channels()};
    Tensor summed = torch::stable::reshape(torch::stable::sum(grad_weight, axis), packed);
    summed = torch::stable::transpose(torch::stable::transpose(summed, 2, 3), 1, 2);
    weight_result = torch::stable::contiguous(summed);
  }
  return {need_input ? grad_input : none, need_offset ? total(grad_offset, offset) : none, weight_result,
          need_offset && mask ? total(grad_mask, *mask) : none};
}

Tensor deform_conv2d(Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> bias,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     std::optional<Tensor> mask) {
  const DeformConv2dSizes s = check_deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation);
  const ScalarType dtype = input.scalar_type();
  const Tensor output = dtype == ScalarType::Double ? forward<double>(s, input, offset, weight, bias, mask)
                                                    : forward<float>(s, input, offset, weight, bias, mask);
  return output.scalar_type() == dtype ? output : torch::stable::to(output, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv2d_backward(
    Tensor grad, Tensor input, Tensor offset, Tensor weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, bool need_input, bool need_offset, bool need_weight) {
  const DeformConv2dSizes s = check_deform_conv2d(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_operand("deform_conv2d_backward", "grad", grad, input, 4);
  check_shape("deform_conv2d_backward", "grad", grad, {s.batch, s.out_channels, s.out_h, s.out_w});
  const ScalarType dtype = input.scalar_type();
  std::array<Tensor, 4> gradients =
      dtype == ScalarType::Double
          ? backward<double>(s, grad, input, offset, weight, mask, need_input, need_offset, need_weight)
          : backward<float>(s, grad, input, offset, weight, mask, need_input, need_offset, need_weight);
  if (need_input && !is_channels_last(input)) gradients[0] = torch::stable::contiguous(gradients[0]);
  for (Tensor& gradient : gradients) {
    if (gradient.scalar_type() != dtype) gradient = torch::stable::to(gradient, dtype);
  }
  return {gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::cpu::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::cpu::deform_conv2d_backward));
}
