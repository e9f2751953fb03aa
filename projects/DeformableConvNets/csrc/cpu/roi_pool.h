// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CPU, for every operator whose bins sample an axis-aligned grid: the sum of a bin's samples factors
// into row weights times column weights, so every pixel under a bin is read once, however many samples fall on it.
#pragma once

#include "kernels.h"
#include "layout.h"
#include "roi_pool_sizes.h"
#include "tiles.h"

namespace dcn::cpu {

// The sum of a bin's samples along one axis: the pixels that they touch, each once.
template <typename T>
class AxisSum {
 public:
  void clear() {
    entries_.clear();
    samples_ = 0;
  }

  void add(const AxisSample<T>& sample) {
    for (int side = 0; side < 2; ++side) {
      if (sample.exists[side]) add(sample.low + side, sample.weight[side], sample.slope[side]);
    }
    samples_ += sample.exists[0] || sample.exists[1];
  }

  const std::vector<AxisEntry<T>>& entries() const { return entries_; }
  int64_t samples() const { return samples_; }  // those on the map

 private:
  void add(int32_t pixel, T weight, T slope) {
    // Positions rise from sample to sample, so a pixel that is met again is one of the last two.
    for (size_t back = 1; back <= 2 && back <= entries_.size(); ++back) {
      AxisEntry<T>& entry = entries_[entries_.size() - back];
      if (entry.pixel == pixel) {
        entry.weight += weight;
        entry.slope += slope;
        return;
      }
    }
    entries_.push_back({pixel, weight, slope});
  }

  std::vector<AxisEntry<T>> entries_;
  int64_t samples_ = 0;
};

// One bin of one RoI for one block of channels, as an operator's `locate` fills it.
template <typename T>
struct Bin {
  AxisSum<T> rows, columns;
  T average;         // factor of the sum: one over the number of samples
  T unit_y, unit_x;  // pixels that an offset of 1 moves the bin by
  int64_t cell;      // which group of the input's channels it reads
  int64_t part;      // index of its offset in a plane of the offset tensor

  BinPixels<T> pixels(int64_t width, int64_t stride) const {
    return {rows.entries().data(),
            columns.entries().data(),
            static_cast<int64_t>(rows.entries().size()),
            static_cast<int64_t>(columns.entries().size()),
            width,
            stride};
  }
};

// The operands of one call, dense, in the dtype of the computation.
template <typename T>
struct RoiPoolOperands {
  Tensor image_tensor, roi_tensor;  // images as (batch, height, width, cells, channels)
  std::optional<Tensor> offset_tensor, mask_tensor;
  RoiPoolSizes sizes;
  const T *images, *rois, *offsets = nullptr, *masks = nullptr;

  RoiPoolOperands(const char* op, const RoiPoolSizes& s, const Tensor& input, const Tensor& roi_rows,
                  const std::optional<Tensor>& offset, const std::optional<Tensor>& mask)
      : image_tensor(split_cells(input, s)), roi_tensor(dense(roi_rows, scalar_type_of<T>())), sizes(s) {
    images = image_tensor.template const_data_ptr<T>();
    rois = roi_tensor.template const_data_ptr<T>();
    if (offset) {
      offset_tensor = dense(*offset, scalar_type_of<T>());
      offsets = offset_tensor->template const_data_ptr<T>();
    }
    if (mask) {
      mask_tensor = dense(*mask, scalar_type_of<T>());
      masks = mask_tensor->template const_data_ptr<T>();
    }
    for (int64_t r = 0; r < s.rois; ++r) {
      STD_TORCH_CHECK(rois[5 * r] >= T(0) && rois[5 * r] < static_cast<T>(s.batch), op, ": rois[", r, "] names image ",
                      rois[5 * r], ", but input has ", s.batch, " images");
    }
  }

  int64_t pixel_stride() const { return sizes.input_channels(); }
  int64_t image_begin(int64_t r) const { return static_cast<int64_t>(rois[5 * r]) * sizes.pixels() * pixel_stride(); }
  // The offset of a part in x and in y; zero where there are no offsets.
  int64_t offset_index(int64_t r, int64_t block, int64_t part) const {
    return (r * sizes.blocks + block) * 2 * sizes.parts + part;
  }
  T offset_x(int64_t r, int64_t block, int64_t part) const {
    return offsets ? offsets[offset_index(r, block, part)] : T(0);
  }
  T offset_y(int64_t r, int64_t block, int64_t part) const {
    return offsets ? offsets[offset_index(r, block, part) + sizes.parts] : T(0);
  }
  T modulation(int64_t r, int64_t b) const { return masks ? masks[r * sizes.bins() + b] : T(1); }

  static Tensor split_cells(const Tensor& input, const RoiPoolSizes& s) {
    if (s.cells == 1) return to_channels_last<T>(input);
    const Tensor split = torch::stable::reshape(dense(input, scalar_type_of<T>()),
                                                std::vector<int64_t>{s.batch, s.channels, s.cells, s.pixels()});
    return torch::stable::contiguous(torch::stable::transpose(split, 1, 3));
  }
  // The inverse, for the input's gradient: (batch, pixels, cells, channels) to (batch, channels * cells, ...).
  static Tensor merge_cells(const Tensor& grad, const RoiPoolSizes& s) {
    const std::vector<int64_t> sizes{s.batch, s.channels * s.cells, s.height, s.width};
    if (s.cells > 1) return torch::stable::reshape(torch::stable::transpose(grad, 1, 3), sizes);
    const Tensor image = torch::stable::reshape(grad, std::vector<int64_t>{s.batch, s.height, s.width, s.channels});
    return torch::stable::transpose(torch::stable::transpose(image, 2, 3), 1, 2);
  }
};

// `locate(bin, operands, r, block, h, w)` fills a bin; it is all that an operator adds.
template <typename T, typename Locate>
Tensor roi_pool_forward(const char* op, const RoiPoolSizes& s, const Tensor& input, const Tensor& rois,
                        const std::optional<Tensor>& offset, const std::optional<Tensor>& mask, const Locate& locate) {
  Tensor output = empty_4d(input, {s.rois, s.channels, s.out_h, s.out_w}, scalar_type_of<T>(), false);
  const RoiPoolOperands<T> operands(op, s, input, rois, offset, mask);
  if (output.numel() == 0) return output;
  T* out = output.template mutable_data_ptr<T>();
  const int64_t bins = s.bins(), block_channels = s.block_channels();
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t first, int64_t last) {
    Bin<T> bin;
    std::vector<T> pooled(s.channels * bins);  // (bins, channels)
    for (int64_t r = first; r < last; ++r) {
      for (int64_t block = 0; block < s.blocks; ++block) {
        for (int64_t b = 0; b < bins; ++b) {
          locate(bin, operands, r, block, b / s.out_w, b % s.out_w);
          kernels<T>().pool(bin.pixels(s.width, operands.pixel_stride()),
                            operands.images + operands.image_begin(r) + bin.cell * s.channels + block * block_channels,
                            block_channels, bin.average * operands.modulation(r, b),
                            pooled.data() + b * s.channels + block * block_channels);
        }
      }
      kernels<T>().transpose(pooled.data(), s.channels, bins, s.channels, out + r * s.channels * bins, bins);
    }
  });
  return output;
}

// Gradients of input, offset and mask in the dtype of the computation; empty where not needed. Threads share out the
// channels, so each adds to pixels of its own and the order of all sums is fixed.
template <typename T, typename Locate>
std::array<Tensor, 3> roi_pool_backward(const char* op, const RoiPoolSizes& s, const Tensor& grad, const Tensor& input,
                                        const Tensor& rois, const std::optional<Tensor>& offset,
                                        const std::optional<Tensor>& mask, bool need_input, bool need_offset,
                                        const Locate& locate) {
  const RoiPoolOperands<T> operands(op, s, input, rois, offset, mask);
  // (rois, bins, channels): the channels of a bin side by side.
  const Tensor grad_bins = to_channels_last<T>(grad);
  const T* grad_data = grad_bins.template const_data_ptr<T>();
  const int64_t bins = s.bins(), block_channels = s.block_channels(), offsets = s.rois * s.blocks * 2 * s.parts;
  // None where there are no channels.
  const int64_t parts = std::min(s.channels, std::clamp<int64_t>(s.channels / 16, 1, torch::stable::get_num_threads()));

  const auto zeros = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(input, sizes, scalar_type_of<T>());
  };
  const Tensor grad_image = zeros({s.batch, s.pixels(), s.cells, s.channels});
  const Tensor grad_offset = zeros({parts, offsets}), grad_mask = zeros({parts, s.rois * bins});
  T* image_data = grad_image.template mutable_data_ptr<T>();
  T* offset_data = grad_offset.template mutable_data_ptr<T>();
  T* mask_data = grad_mask.template mutable_data_ptr<T>();

  // Bin b of RoI r, for the channels of a block that lie in `channels`.
  const auto run_bin = [&](const Bin<T>& bin, int64_t thread, int64_t r, int64_t block, int64_t b, Range channels) {
    const T* gradient = grad_data + (r * bins + b) * s.channels + channels.begin;
    const int64_t begin = operands.image_begin(r) + bin.cell * s.channels + channels.begin;
    const int64_t count = channels.end - channels.begin;
    const T scale = bin.average * operands.modulation(r, b);
    T sums[3] = {0, 0, 0};
    kernels<T>().pool_backward(bin.pixels(s.width, operands.pixel_stride()), operands.images + begin, count, scale,
                               gradient, need_input ? image_data + begin : nullptr, need_offset ? sums : nullptr);
    T* out = offset_data + thread * offsets + operands.offset_index(r, block, bin.part);
    out[0] += sums[0] * bin.unit_x * scale;
    out[s.parts] += sums[1] * bin.unit_y * scale;
    mask_data[(thread * s.rois + r) * bins + b] += sums[2] * bin.average;
  };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    Bin<T> bin;
    for (int64_t thread = first; thread < last; ++thread) {
      const Range mine = part_of(s.channels, parts, thread);
      for (int64_t r = 0; r < s.rois; ++r) {
        for (int64_t block = mine.begin / block_channels; block * block_channels < mine.end; ++block) {
          const Range channels{std::max(mine.begin, block * block_channels),
                               std::min(mine.end, (block + 1) * block_channels)};
          for (int64_t b = 0; b < bins; ++b) {
            locate(bin, operands, r, block, b / s.out_w, b % s.out_w);
            run_bin(bin, thread, r, block, b, channels);
          }
        }
      }
    }
  });

  const Tensor none = empty_result(grad);
  return {need_input ? like_input<T>(RoiPoolOperands<T>::merge_cells(grad_image, s), input) : none,
          need_offset && offset ? sum_parts(grad_offset, *offset) : none,
          need_offset && mask ? sum_parts(grad_mask, *mask) : none};
}

// The operator `op`, whose bins Locate<T> finds from its sizes `s`, for every dtype.
template <template <typename> class Locate, typename Sizes>
Tensor roi_pool(const char* op, const Sizes& s, const Tensor& input, const Tensor& rois,
                const std::optional<Tensor>& offset, const std::optional<Tensor>& mask) {
  const ScalarType dtype = input.scalar_type();
  const Tensor output = dtype == ScalarType::Double
                            ? roi_pool_forward<double>(op, sizes_of(s), input, rois, offset, mask, Locate<double>{s})
                            : roi_pool_forward<float>(op, sizes_of(s), input, rois, offset, mask, Locate<float>{s});
  return output.scalar_type() == dtype ? output : torch::stable::to(output, dtype);
}

// Its gradients by input, offset and mask; empty where not needed.
template <template <typename> class Locate, typename Sizes>
std::tuple<Tensor, Tensor, Tensor> roi_pool_gradients(const char* op, const Sizes& s, const Tensor& grad,
                                                      const Tensor& input, const Tensor& rois,
                                                      const std::optional<Tensor>& offset,
                                                      const std::optional<Tensor>& mask, bool need_input,
                                                      bool need_offset) {
  const RoiPoolSizes sizes = sizes_of(s);
  const std::string name = std::string(op) + "_backward";
  check_operand(name.c_str(), "grad", grad, input, 4);
  check_shape(name.c_str(), "grad", grad, {sizes.rois, sizes.channels, sizes.out_h, sizes.out_w});
  std::array<Tensor, 3> gradients = input.scalar_type() == ScalarType::Double
                                        ? roi_pool_backward<double>(op, sizes, grad, input, rois, offset, mask,
                                                                    need_input, need_offset, Locate<double>{s})
                                        : roi_pool_backward<float>(op, sizes, grad, input, rois, offset, mask,
                                                                   need_input, need_offset, Locate<float>{s});
  for (Tensor& gradient : gradients) {
    if (gradient.scalar_type() != input.scalar_type()) gradient = torch::stable::to(gradient, input.scalar_type());
  }
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace dcn::cpu
