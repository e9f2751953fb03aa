// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CPU, for every operator whose bins sample an axis-aligned grid: the sum of a bin's samples factors
// into row weights times column weights, so every pixel under a bin is read once, however many samples fall on it.
//
// A channels_last map is read where it is, RoI by RoI. Of any other one a few channels at a time are brought into that
// order, row by row as the RoIs need them, for all RoIs one after the other.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/memory_format.h"
#include "cpu/roi_pool/bins.h"
#include "cpu/roi_pool/channel_block.h"

namespace dcn::cpu {

// The tensors of one call, dense, in the dtype of the computation.
template <typename T>
struct RoiPoolOperandTensors {
  RoiPoolSizes sizes;
  bool channels_last;
  std::optional<Tensor> image_tensor, roi_tensor, offset_tensor, mask_tensor;
  const T* images = nullptr;
  RoiRowsView<T> rows;

  RoiPoolOperandTensors(const char* op, const RoiPoolSizes& s, const RoiPoolInputs& given, bool need_image)
      : sizes(s), channels_last(is_channels_last(given.input) && s.cells == 1) {
    const auto& [input, rois, offset, mask] = given;
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

  // The bins of a RoI for channel set `set`, of which `channels` are computed, in a map with that many values per
  // pixel.
  RoiPixels<T> pixels(const RoiBins<T>& bins, int64_t set, int64_t pixel_stride, Range channels,
                      int64_t readable) const {
    return {bins.entries(),
            bins.bins() + set * sizes.bins(),
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
std::vector<RoiBins<T>> find_all_bins(const RoiRowsView<T>& rows, const Geometry& geometry) {
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
void pool_channels_last(const RoiPoolOperandTensors<T>& operands, const Geometry& geometry, T* out) {
  const RoiPoolSizes& s = operands.sizes;
  const std::vector<int64_t> order = neighbouring_order(operands.rows);
  torch::stable::parallel_for(0, s.rois, 1, [&](int64_t first, int64_t last) {
    RoiBins<T> bins;
    const Scratch<T> buffer = scratch<T>(s.bins() * kernels<T>().roi_pool.buffer_size);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = order[i];
      bins.find(geometry, operands.rows, r);
      for (int64_t set = 0; set < s.channel_sets; ++set) {
        const Range channels{set * s.set_channels(), (set + 1) * s.set_channels()};
        const RoiPixels<T> roi = operands.pixels(bins, set, s.channels, channels, s.set_channels());
        kernels<T>().roi_pool.forward(roi, operands.image(operands.rows.image(r)) + channels.begin, buffer.get(),
                                      out + (r * s.channels + channels.begin) * s.bins(), past_caches<T>(s));
      }
    }
    finish_writes();
  });
}

template <typename T, typename Geometry>
void pool_contiguous(const RoiPoolOperandTensors<T>& operands, const Geometry& geometry, T* out) {
  const RoiPoolSizes& s = operands.sizes;
  const std::vector<RoiBins<T>> bins = find_all_bins(operands.rows, geometry);
  const std::vector<Visit> visits = visits_by_row(operands.rows, bins);
  const int64_t width = cache_block_width<T>(s);
  const std::vector<Range> ranges = channel_ranges(s, width);
  // Where there are more threads than ranges of channels, they share out the RoIs too.
  const auto range_count = static_cast<int64_t>(ranges.size());
  const int64_t shares = std::min(s.rois, divide_up(torch::stable::get_num_threads(), range_count));
  torch::stable::parallel_for(0, range_count * shares, 1, [&](int64_t first, int64_t last) {
    ChannelCacheBlock<T> map(s, width);
    const Scratch<T> buffer = scratch<T>(s.bins() * kernels<T>().roi_pool.buffer_size);
    for (int64_t i = first; i < last; ++i) {
      const Range channels = ranges[i / shares], mine = share_of(s.rois, shares, i % shares);
      for (int64_t v = mine.begin; v < mine.end; ++v) {
        const Visit& visit = visits[v];
        if (v == mine.begin || visit.image != visits[v - 1].image) map.begin(channels, visit.first_row);
        map.read(operands.image(visit.image), visit.rows.end);
        const int64_t set = channels.begin / s.set_channels();
        const RoiPixels<T> roi = operands.pixels(bins[visit.roi], set, map.pixel_stride(), channels, width);
        kernels<T>().roi_pool.forward(roi, map.data(), buffer.get(),
                                      out + (visit.roi * s.channels + channels.begin) * s.bins(), past_caches<T>(s));
      }
    }
    finish_writes();
  });
}

// `geometry` is all that an operator adds; see roi_pool_sizes.h.
template <typename T, typename Geometry>
Tensor roi_pool_forward(const char* op, const RoiPoolSizes& s, const RoiPoolInputs& given, const Geometry& geometry) {
  const RoiPoolOperandTensors<T> operands(op, s, given, true);
  Tensor output = empty_4d(given.input, {s.rois, s.channels, s.out_h, s.out_w}, scalar_type_of<T>(), false);
  if (output.numel() == 0) return output;
  T* out = output.template mutable_data_ptr<T>();
  if (operands.channels_last) {
    pool_channels_last(operands, geometry, out);
  } else {
    pool_contiguous(operands, geometry, out);
  }
  return output;
}

// The operator `op`, whose bins Geometry<T> finds, for every dtype.
template <template <typename> class Geometry, typename Sizes>
Tensor roi_pool(const char* op, const Sizes& s, const RoiPoolInputs& given) {
  const ScalarType dtype = given.input.scalar_type();
  const Tensor output = dtype == ScalarType::Double
                            ? roi_pool_forward<double>(op, sizes_of(s), given, Geometry<double>{s})
                            : roi_pool_forward<float>(op, sizes_of(s), given, Geometry<float>{s});
  return as_result(output, dtype, false);
}

}  // namespace dcn::cpu
