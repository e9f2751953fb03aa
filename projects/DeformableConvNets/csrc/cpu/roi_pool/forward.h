// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CPU, for every operator whose bins sample an axis-aligned grid: the sum of a bin's samples factors
// into row weights times column weights, so every pixel under a bin is read once, however many samples fall on it.
//
// A channels_last map is read where it is, RoI by RoI. Of any other one a few channels at a time are brought into that
// order, row by row as the RoIs need them, for all RoIs in turns.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/memory_format.h"
#include "cpu/roi_pool/bins.h"
#include "cpu/roi_pool/channel_block.h"

namespace dcn::cpu {

// The operands of one call, dense, in the dtype of the computation.
template <typename T>
struct RoiPoolOperands {
  RoiPoolSizes sizes;
  bool channels_last;
  std::optional<Tensor> image_tensor, roi_tensor, offset_tensor, mask_tensor;
  const T* images = nullptr;
  RoiRows<T> rows;

  RoiPoolOperands(const char* op, const RoiPoolSizes& s, const Tensor& input, const Tensor& rois,
                  const std::optional<Tensor>& offset, const std::optional<Tensor>& mask, bool need_image)
      : sizes(s), channels_last(is_channels_last(input) && s.cells == 1) {
    if (need_image) {
      images = data_of(image_tensor, input, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    }
    rows = {s, data_of(roi_tensor, rois), offset ? data_of(offset_tensor, *offset) : nullptr,
            mask ? data_of(mask_tensor, *mask) : nullptr};
    for (int64_t r = 0; r < s.rois; ++r) {
      const T image = rows.rois[5 * r];
      DCN_CHECK(image >= T(0) && image < static_cast<T>(s.batch) && image == std::floor(image), op, ": rois[", r,
                "] names image ", image, ", but input has ", s.batch, " images");
    }
  }

  int64_t image_size() const { return sizes.input_channels() * sizes.pixels(); }
  const T* image(int64_t n) const { return images ? images + n * image_size() : nullptr; }

  // Block `block` of the bins of a RoI, of which `channels` are looked at, in a map with that many values per pixel.
  RoiPixels<T> pixels(const RoiBins<T>& bins, int64_t block, int64_t pixel_stride, Range channels,
                      int64_t readable) const {
    return {bins.entries(),
            bins.bins() + block * sizes.bins(),
            sizes.bins(),
            sizes.width * pixel_stride,
            pixel_stride,
            pixel_stride / sizes.cells,
            channels.end - channels.begin,
            readable};
  }

  static const T* data_of(std::optional<Tensor>& holder, const Tensor& tensor,
                          MemoryFormat format = MemoryFormat::Contiguous) {
    holder = dense(tensor, scalar_type_of<T>(), format);
    return holder->template const_data_ptr<T>();
  }
};

template <typename T, typename Geometry>
std::vector<RoiBins<T>> find_all_bins(const RoiRows<T>& rows, const Geometry& geometry) {
  std::vector<RoiBins<T>> bins(rows.sizes.rois);
  torch::stable::parallel_for(0, rows.sizes.rois, 16, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) bins[r].find(geometry, rows, r);
  });
  return bins;
}

// Whether the output is so large that writing it past the caches costs its reader nothing.
constexpr int64_t kMostCachedBytes = 8 << 20;
template <typename T>
bool past_caches(const RoiPoolSizes& s) {
  return s.rois * s.channels * s.bins() * static_cast<int64_t>(sizeof(T)) > kMostCachedBytes;
}

// What a thread wrote past the caches, others see after this.
inline void finish_writes() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T, typename Geometry>
void pool_channels_last(const RoiPoolOperands<T>& operands, const Geometry& geometry, T* out) {
  const RoiPoolSizes& s = operands.sizes;
  const std::vector<int64_t> order = neighbouring_order(operands.rows);
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t first, int64_t last) {
    RoiBins<T> bins;
    const Scratch<T> buffer = scratch<T>(s.bins() * kernels<T>().roi_pool.buffer_size);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = order[i];
      bins.find(geometry, operands.rows, r);
      for (int64_t block = 0; block < s.blocks; ++block) {
        const Range channels{block * s.block_channels(), (block + 1) * s.block_channels()};
        const RoiPixels<T> roi = operands.pixels(bins, block, s.channels, channels, s.block_channels());
        kernels<T>().roi_pool.forward(roi, operands.image(operands.rows.image(r)) + channels.begin, buffer.get(),
                                      out + (r * s.channels + channels.begin) * s.bins(), past_caches<T>(s));
      }
    }
    finish_writes();
  });
}

template <typename T, typename Geometry>
void pool_contiguous(const RoiPoolOperands<T>& operands, const Geometry& geometry, T* out) {
  const RoiPoolSizes& s = operands.sizes;
  const std::vector<RoiBins<T>> bins = find_all_bins(operands.rows, geometry);
  const std::vector<Visit> visits = visits_by_row(operands.rows, bins);
  const int64_t width = block_width<T>(s);
  const std::vector<Range> ranges = block_ranges(s, width);
  // Where there are more threads than ranges of channels, they share out the RoIs too.
  const auto range_count = static_cast<int64_t>(ranges.size());
  const int64_t shares = std::min(s.rois, divide_up(torch::stable::get_num_threads(), range_count));
  torch::stable::parallel_for(0, range_count * shares, 1, [&](int64_t first, int64_t last) {
    ChannelBlock<T> map(s, width);
    const Scratch<T> buffer = scratch<T>(s.bins() * kernels<T>().roi_pool.buffer_size);
    for (int64_t i = first; i < last; ++i) {
      const Range channels = ranges[i / shares], mine = part_of(s.rois, shares, i % shares);
      for (int64_t v = mine.begin; v < mine.end; ++v) {
        const Visit& visit = visits[v];
        if (v == mine.begin || visit.image != visits[v - 1].image) map.begin(channels, visit.first_row);
        map.read(operands.image(visit.image), visit.rows.end);
        const int64_t block = channels.begin / s.block_channels();
        const RoiPixels<T> roi = operands.pixels(bins[visit.roi], block, map.pixel_stride(), channels, width);
        kernels<T>().roi_pool.forward(roi, map.data(), buffer.get(),
                                      out + (visit.roi * s.channels + channels.begin) * s.bins(), past_caches<T>(s));
      }
    }
    finish_writes();
  });
}

// `geometry` is all that an operator adds; see roi_pool_sizes.h.
template <typename T, typename Geometry>
Tensor roi_pool_forward(const char* op, const RoiPoolSizes& s, const Tensor& input, const Tensor& rois,
                        const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                        const Geometry& geometry) {
  const RoiPoolOperands<T> operands(op, s, input, rois, offset, mask, true);
  Tensor output = empty_4d(input, {s.rois, s.channels, s.out_h, s.out_w}, scalar_type_of<T>(), false);
  if (output.numel() == 0) return output;
  T* out = output.template mutable_data_ptr<T>();
  if (operands.channels_last) {
    pool_channels_last(operands, geometry, out);
  } else {
    pool_contiguous(operands, geometry, out);
  }
  return output;
}

// The gradients of bins as (bins, channels), RoI by RoI.
template <typename T>
class BinGradients {
 public:
  BinGradients(const Tensor& grad, const RoiPoolSizes& s)
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

// What both passes below read, and what they add to. A part of the work is some channels; `sums` has, for each part,
// what RoiPoolKernels::backward adds up for every RoI, block and bin, or is empty where that is not needed.
template <typename T>
struct RoiPoolBackward {
  const RoiPoolOperands<T>& operands;
  const std::vector<RoiBins<T>>& bins;
  const BinGradients<T>& gradients;
  T* grad_image;  // in the memory format of the operands' image, or null
  std::vector<T>& sums;

  T* sums_of(int64_t part, int64_t r, int64_t block) const {
    const RoiPoolSizes& s = operands.sizes;
    return sums.empty() ? nullptr : sums.data() + ((part * s.rois + r) * s.blocks + block) * s.bins() * 3;
  }
  T* grad_image_of(int64_t n) const { return grad_image ? grad_image + n * operands.image_size() : nullptr; }
};

// Threads share out the channels, so each adds to pixels of its own and the order of all sums is fixed.
template <typename T>
void pool_backward_channels_last(const RoiPoolBackward<T>& pass, int64_t parts) {
  const RoiPoolSizes& s = pass.operands.sizes;
  const std::vector<int64_t> order = neighbouring_order(pass.operands.rows);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const Scratch<T> buffer = scratch<T>(pass.gradients.buffer_size(s.block_channels()));
    for (int64_t part = first; part < last; ++part) {
      const Range mine = part_of(s.channels, parts, part);
      for (const int64_t r : order) {
        const int64_t n = pass.operands.rows.image(r);
        for (int64_t block = mine.begin / s.block_channels(); block * s.block_channels() < mine.end; ++block) {
          const Range channels{std::max(mine.begin, block * s.block_channels()),
                               std::min(mine.end, (block + 1) * s.block_channels())};
          const int64_t count = channels.end - channels.begin;
          const auto gradient = pass.gradients.rows(r, channels, count, buffer.get());
          const T* image = pass.operands.image(n);
          T* grad_image = pass.grad_image_of(n);
          kernels<T>().roi_pool.backward(pass.operands.pixels(pass.bins[r], block, s.channels, channels, count),
                                         image ? image + channels.begin : nullptr, gradient.first, gradient.stride,
                                         grad_image ? grad_image + channels.begin : nullptr,
                                         pass.sums_of(part, r, block));
        }
      }
    }
  });
}

template <typename T>
void pool_backward_contiguous(const RoiPoolBackward<T>& pass, int64_t parts, int64_t width,
                              const std::vector<Range>& ranges) {
  const RoiPoolSizes& s = pass.operands.sizes;
  const std::vector<Visit> visits = visits_by_row(pass.operands.rows, pass.bins);
  const bool reads = pass.operands.images != nullptr, writes = pass.grad_image != nullptr;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    std::optional<ChannelBlock<T>> map, grad_map;
    if (reads) map.emplace(s, width);
    if (writes) grad_map.emplace(s, width);
    const Scratch<T> buffer = scratch<T>(pass.gradients.buffer_size(width));
    const auto run_range = [&](int64_t part, Range channels) {
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
        const int64_t block = channels.begin / s.block_channels();
        const auto gradient = pass.gradients.rows(visit.roi, channels, width, buffer.get());
        kernels<T>().roi_pool.backward(
            pass.operands.pixels(pass.bins[visit.roi], block, s.cells * width, channels, width),
            reads ? map->data() : nullptr, gradient.first, gradient.stride, writes ? grad_map->data() : nullptr,
            pass.sums_of(part, visit.roi, block));
        // Rows that no RoI reads any more are done.
        if (writes) grad_map->write(pass.grad_image_of(visit.image), ends ? s.height : visits[v + 1].first_row);
        if (ends) done = visit.image + 1;
      }
      if (writes) grad_map->begin(channels, 0);
      fill_until(s.batch);
    };
    for (int64_t part = first; part < last; ++part) {
      const Range mine = part_of(static_cast<int64_t>(ranges.size()), parts, part);
      for (int64_t i = mine.begin; i < mine.end; ++i) run_range(part, ranges[i]);
    }
  });
}

// Gradients of offset and mask, from the sums.
template <typename T, typename Geometry>
void add_shift_gradients(const RoiPoolBackward<T>& pass, const Geometry& geometry, int64_t parts, T* grad_offset,
                         T* grad_mask) {
  const RoiPoolSizes& s = pass.operands.sizes;
  for (int64_t r = 0; r < s.rois; ++r) {
    for (int64_t block = 0; block < s.blocks; ++block) {
      const BinPixels<T>* bins = pass.bins[r].bins() + block * s.bins();
      const BinShift<T>* shifts = pass.bins[r].shifts() + block * s.bins();
      for (int64_t b = 0; b < s.bins(); ++b) {
        T sums[3] = {0, 0, 0};
        for (int64_t part = 0; part < parts; ++part) {
          for (int k = 0; k < 3; ++k) sums[k] += pass.sums_of(part, r, block)[3 * b + k];
        }
        if (grad_offset) {
          T* out =
              grad_offset + pass.operands.rows.offset_index(r, block, geometry.offset_cell(b / s.out_w, b % s.out_w));
          out[0] += sums[0] * shifts[b].unit_x * bins[b].scale;
          out[s.parts] += sums[1] * shifts[b].unit_y * bins[b].scale;
        }
        if (grad_mask) grad_mask[r * s.bins() + b] += sums[2] * shifts[b].average;
      }
    }
  }
}

// Gradients of input, offset and mask in the dtype of the computation; empty where not needed.
template <typename T, typename Geometry>
std::array<Tensor, 3> roi_pool_backward(const char* op, const RoiPoolSizes& s, const Tensor& grad, const Tensor& input,
                                        const Tensor& rois, const std::optional<Tensor>& offset,
                                        const std::optional<Tensor>& mask, bool need_input, bool need_offset,
                                        const Geometry& geometry) {
  need_offset = need_offset && (offset || mask);
  const RoiPoolOperands<T> operands(op, s, input, rois, offset, mask, need_offset);
  const BinGradients<T> gradients(grad, s);
  const std::vector<RoiBins<T>> bins = find_all_bins(operands.rows, geometry);
  const int64_t width = block_width<T>(s);
  const std::vector<Range> ranges = block_ranges(s, width);
  const int64_t most = operands.channels_last ? s.channels / kernels<T>().lanes : static_cast<int64_t>(ranges.size());
  const int64_t parts = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(most, 1));

  const Tensor none = empty_result(grad);
  const auto zeros_like = [&](const std::optional<Tensor>& tensor) {
    return need_offset && tensor ? torch::stable::new_zeros(grad, tensor->sizes(), scalar_type_of<T>()) : none;
  };
  std::array<Tensor, 3> results{none, zeros_like(offset), zeros_like(mask)};
  if (need_input) {
    results[0] = operands.channels_last
                     ? torch::stable::new_zeros(input, {s.batch, s.height, s.width, s.channels}, scalar_type_of<T>())
                     : empty_4d(input, {s.batch, s.input_channels(), s.height, s.width}, scalar_type_of<T>(), false);
  }
  const auto data_of = [](const Tensor& tensor) {
    return tensor.numel() ? tensor.template mutable_data_ptr<T>() : nullptr;
  };
  std::vector<T> sums(need_offset ? parts * s.rois * s.blocks * s.bins() * 3 : 0);
  const RoiPoolBackward<T> pass{operands, bins, gradients, need_input ? data_of(results[0]) : nullptr, sums};
  if (s.channels > 0) {
    if (operands.channels_last) {
      pool_backward_channels_last(pass, parts);
    } else {
      pool_backward_contiguous(pass, parts, width, ranges);
    }
  }
  if (!sums.empty()) {
    add_shift_gradients(pass, geometry, parts, data_of(results[1]), data_of(results[2]));
  }
  if (need_input) {
    if (operands.channels_last) results[0] = torch::stable::transpose(torch::stable::transpose(results[0], 2, 3), 1, 2);
    results[0] = like_input<T>(results[0], input);
  }
  return results;
}

// The operator `op`, whose bins Geometry<T> finds, for every dtype.
template <template <typename> class Geometry, typename Sizes>
Tensor roi_pool(const char* op, const Sizes& s, const Tensor& input, const Tensor& rois,
                const std::optional<Tensor>& offset, const std::optional<Tensor>& mask) {
  const ScalarType dtype = input.scalar_type();
  const Tensor output = dtype == ScalarType::Double
                            ? roi_pool_forward<double>(op, sizes_of(s), input, rois, offset, mask, Geometry<double>{s})
                            : roi_pool_forward<float>(op, sizes_of(s), input, rois, offset, mask, Geometry<float>{s});
  return as_result(output, dtype, false);
}

// Its gradients by input, offset and mask; empty where not needed.
template <template <typename> class Geometry, typename Sizes>
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
                                                                    need_input, need_offset, Geometry<double>{s})
                                        : roi_pool_backward<float>(op, sizes, grad, input, rois, offset, mask,
                                                                   need_input, need_offset, Geometry<float>{s});
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
