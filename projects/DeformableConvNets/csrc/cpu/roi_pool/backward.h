// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The backward pass of RoI pooling on CPU: see forward.h, whose bins and orders it shares.
#pragma once

#include "cpu/roi_pool/forward.h"

namespace dcn::cpu {

// The gradients of bins as (bins, channels), RoI by RoI.
template <typename T>
class BinGradientTensor {
 public:
  BinGradientTensor(const Tensor& grad, const RoiPoolSizes& s)
      : sizes_(s),
        channels_last_(is_channels_last(grad)),
        tensor_(
            dense(grad, scalar_type_of<T>(), channels_last_ ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous)),
        data_(tensor_.template const_data_ptr<T>()) {}

  // Values of the buffer that rows() needs for that many channels.
  int64_t buffer_size(int64_t width) const { return sizes_.bins() * width; }

  struct Rows {
    const T* first;
    int64_t stride;
  };
  // Those of some channels of RoI r, padded with zeros to `width` of them; they may lie in the buffer.
  Rows rows(int64_t r, Range channels, int64_t width, T* buffer) const {
    const int64_t count = channels.end - channels.begin, bins = sizes_.bins();
    const T* from = data_ + r * sizes_.channels * bins;
    if (channels_last_ && count == width) return {from + channels.begin, sizes_.channels};
    if (count < width) std::fill_n(buffer, bins * width, T(0));
    if (channels_last_) {
      for (int64_t b = 0; b < bins; ++b) {
        std::copy_n(from + b * sizes_.channels + channels.begin, count, buffer + b * width);
      }
    } else {
      kernels<T>().transpose(from + channels.begin * bins, bins, count, bins, buffer, width);
    }
    return {buffer, width};
  }

 private:
  RoiPoolSizes sizes_;
  bool channels_last_;
  Tensor tensor_;
  const T* data_;
};

// What both passes below read, and what they add to. A share of the work is some of the channels. For each
// share, `sums` has what RoiPoolKernels::backward adds up for every RoI, channel set and bin; it is empty where that is
// not needed.
template <typename T>
struct RoiPoolBackward {
  const RoiPoolOperandTensors<T>& operands;
  const std::vector<RoiBins<T>>& bins;
  const BinGradientTensor<T>& gradients;
  T* grad_image;  // in the memory format of the operands' image, or null
  std::vector<T>& sums;

  T* sums_of(int64_t share, int64_t r, int64_t set) const {
    const RoiPoolSizes& s = operands.sizes;
    return sums.empty() ? nullptr : sums.data() + ((share * s.rois + r) * s.channel_sets + set) * s.bins() * 3;
  }
  T* grad_image_of(int64_t n) const { return grad_image ? grad_image + n * operands.image_size() : nullptr; }
};

// Threads share out the channels, so each adds to pixels of its own and the order of all sums is fixed.
template <typename T>
void pool_backward_channels_last(const RoiPoolBackward<T>& pass, int64_t shares) {
  const RoiPoolSizes& s = pass.operands.sizes;
  const std::vector<int64_t> order = neighbouring_order(pass.operands.rows);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    const Scratch<T> buffer = scratch<T>(pass.gradients.buffer_size(s.set_channels()));
    for (int64_t share = first; share < last; ++share) {
      const Range mine = share_of(s.channels, shares, share);
      for (const int64_t r : order) {
        const int64_t n = pass.operands.rows.image(r);
        for (int64_t set = mine.begin / s.set_channels(); set * s.set_channels() < mine.end; ++set) {
          const Range channels{std::max(mine.begin, set * s.set_channels()),
                               std::min(mine.end, (set + 1) * s.set_channels())};
          const int64_t count = channels.end - channels.begin;
          const auto gradient = pass.gradients.rows(r, channels, count, buffer.get());
          const T* image = pass.operands.image(n);
          T* grad_image = pass.grad_image_of(n);
          kernels<T>().roi_pool.backward(pass.operands.pixels(pass.bins[r], set, s.channels, channels, count),
                                         image ? image + channels.begin : nullptr, gradient.first, gradient.stride,
                                         grad_image ? grad_image + channels.begin : nullptr,
                                         pass.sums_of(share, r, set));
        }
      }
    }
  });
}

template <typename T>
void pool_backward_contiguous(const RoiPoolBackward<T>& pass, int64_t shares, int64_t width,
                              const std::vector<Range>& ranges) {
  const RoiPoolSizes& s = pass.operands.sizes;
  const std::vector<Visit> visits = visits_by_row(pass.operands.rows, pass.bins);
  const bool reads = pass.operands.images != nullptr, writes = pass.grad_image != nullptr;
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    std::optional<ChannelCacheBlock<T>> map, grad_map;
    if (reads) map.emplace(s, width);
    if (writes) grad_map.emplace(s, width);
    const Scratch<T> buffer = scratch<T>(pass.gradients.buffer_size(width));
    const auto run_range = [&](int64_t share, Range channels) {
      int64_t done = 0;  // images whose gradient is written
      const auto fill_until = [&](int64_t n) {
        for (; writes && done < n; ++done) grad_map->fill_zeros(pass.grad_image_of(done), 0, s.height);
      };
      for (size_t v = 0; v < visits.size(); ++v) {
        const Visit& visit = visits[v];
        const bool begins = v == 0 || visits[v - 1].image != visit.image;
        const bool ends = v + 1 == visits.size() || visits[v + 1].image != visit.image;
        if (reads) {
          if (begins) map->begin(channels, visit.first_row);
          map->read(pass.operands.image(visit.image), visit.rows.end);
        }
        if (writes) {
          if (begins) {
            grad_map->begin(channels, visit.first_row);
            fill_until(visit.image);
            grad_map->fill_zeros(pass.grad_image_of(visit.image), 0, visit.first_row);
          }
          grad_map->clear(visit.rows.end);
        }
        const int64_t set = channels.begin / s.set_channels();
        const auto gradient = pass.gradients.rows(visit.roi, channels, width, buffer.get());
        kernels<T>().roi_pool.backward(
            pass.operands.pixels(pass.bins[visit.roi], set, s.cells * width, channels, width),
            reads ? map->data() : nullptr, gradient.first, gradient.stride, writes ? grad_map->data() : nullptr,
            pass.sums_of(share, visit.roi, set));
        // Rows that no RoI reads any more are done.
        if (writes) grad_map->write(pass.grad_image_of(visit.image), ends ? s.height : visits[v + 1].first_row);
        if (ends) done = visit.image + 1;
      }
      if (writes) grad_map->begin(channels, 0);
      fill_until(s.batch);
    };
    for (int64_t share = first; share < last; ++share) {
      const Range mine = share_of(static_cast<int64_t>(ranges.size()), shares, share);
      for (int64_t i = mine.begin; i < mine.end; ++i) run_range(share, ranges[i]);
    }
  });
}

// Gradients of offset and mask, from the sums.
template <typename T, typename Geometry>
void add_shift_gradients(const RoiPoolBackward<T>& pass, const Geometry& geometry, int64_t shares, T* grad_offset,
                         T* grad_mask) {
  const RoiPoolSizes& s = pass.operands.sizes;
  for (int64_t r = 0; r < s.rois; ++r) {
    for (int64_t set = 0; set < s.channel_sets; ++set) {
      const BinPixels<T>* bins = pass.bins[r].bins() + set * s.bins();
      const BinShift<T>* shifts = pass.bins[r].shifts() + set * s.bins();
      for (int64_t b = 0; b < s.bins(); ++b) {
        T sums[3] = {0, 0, 0};
        for (int64_t share = 0; share < shares; ++share) {
          for (int k = 0; k < 3; ++k) sums[k] += pass.sums_of(share, r, set)[3 * b + k];
        }
        if (grad_offset) {
          T* out =
              grad_offset + pass.operands.rows.offset_index(r, set, geometry.offset_cell(b / s.out_w, b % s.out_w));
          out[0] += sums[0] * shifts[b].unit_x * bins[b].scale;
          out[s.offset_cells] += sums[1] * shifts[b].unit_y * bins[b].scale;
        }
        if (grad_mask) grad_mask[r * s.bins() + b] += sums[2] * shifts[b].average;
      }
    }
  }
}

// Gradients of input, offset and mask in the dtype of the computation; empty where not needed.
template <typename T, typename Geometry>
std::array<Tensor, 3> roi_pool_backward(const char* op, const RoiPoolSizes& s, const Tensor& grad,
                                        const RoiPoolInputs& given, const NeededRoiPoolGradients& need,
                                        const Geometry& geometry) {
  const Tensor& input = given.input;
  const bool need_offset = need.offset && (given.offset || given.mask);
  const RoiPoolOperandTensors<T> operands(op, s, given, need_offset);
  const BinGradientTensor<T> gradients(grad, s);
  const std::vector<RoiBins<T>> bins = find_all_bins(operands.rows, geometry);
  const int64_t width = cache_block_width<T>(s);
  const std::vector<Range> ranges = channel_ranges(s, width);
  const int64_t most = operands.channels_last ? s.channels / kernels<T>().lanes : static_cast<int64_t>(ranges.size());
  const int64_t shares = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(most, 1));

  const Tensor none = empty_result(grad);
  const auto zeros_like = [&](const std::optional<Tensor>& tensor) {
    return need_offset && tensor ? torch::stable::new_zeros(grad, tensor->sizes(), scalar_type_of<T>()) : none;
  };
  std::array<Tensor, 3> results{none, zeros_like(given.offset), zeros_like(given.mask)};
  if (need.input) {
    results[0] = operands.channels_last
                     ? torch::stable::new_zeros(input, {s.batch, s.height, s.width, s.channels}, scalar_type_of<T>())
                     : empty_4d(input, {s.batch, s.input_channels(), s.height, s.width}, scalar_type_of<T>(), false);
  }
  const auto data_of = [](const Tensor& tensor) {
    return tensor.numel() ? tensor.template mutable_data_ptr<T>() : nullptr;
  };
  std::vector<T> sums(need_offset ? shares * s.rois * s.channel_sets * s.bins() * 3 : 0);
  const RoiPoolBackward<T> pass{operands, bins, gradients, need.input ? data_of(results[0]) : nullptr, sums};
  if (s.channels > 0) {
    if (operands.channels_last) {
      pool_backward_channels_last(pass, shares);
    } else {
      pool_backward_contiguous(pass, shares, width, ranges);
    }
  }
  if (!sums.empty()) {
    add_shift_gradients(pass, geometry, shares, data_of(results[1]), data_of(results[2]));
  }
  if (need.input) {
    if (operands.channels_last) results[0] = torch::stable::transpose(torch::stable::transpose(results[0], 2, 3), 1, 2);
    results[0] = like_input<T>(results[0], input);
  }
  return results;
}

// The gradients by input, offset and mask of the operator `op`, for every dtype; empty where not needed.
template <template <typename> class Geometry, typename Sizes>
std::tuple<Tensor, Tensor, Tensor> roi_pool_gradients(const char* op, const Sizes& s, const Tensor& grad,
                                                      const RoiPoolInputs& given, const NeededRoiPoolGradients& need) {
  const Tensor& input = given.input;
  const RoiPoolSizes sizes = sizes_of(s);
  const std::string name = std::string(op) + "_backward";
  check_operand(name.c_str(), "grad", grad, input, 4);
  check_shape(name.c_str(), "grad", grad, {sizes.rois, sizes.channels, sizes.out_h, sizes.out_w});
  std::array<Tensor, 3> gradients = input.scalar_type() == ScalarType::Double
                                        ? roi_pool_backward<double>(op, sizes, grad, given, need, Geometry<double>{s})
                                        : roi_pool_backward<float>(op, sizes, grad, given, need, Geometry<float>{s});
  // The input's has its format already, see like_input; those that are not needed have one dimension.
  for (size_t i = 0; i < gradients.size(); ++i) {
    const bool found = gradients[i].dim() == 4;
    gradients[i] = !found   ? empty_result(input)
                   : i == 0 ? gradients[i]
                            : as_result(gradients[i], input.scalar_type(), false);
  }
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace dcn::cpu
