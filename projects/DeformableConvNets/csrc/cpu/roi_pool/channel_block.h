// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// A few channels at a time of a contiguous batch in channels_last order, for RoI pooling. Such a cache block is small
// enough to stay in the caches, and there is never a second copy of the whole map.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/memory.h"
#include "roi_pool_sizes.h"

namespace dcn::cpu {

// Bytes of a cache block that are in use at a time: about half of a second-level cache.
constexpr int64_t kCacheBlockBytes = 5 << 18;
// About how many rows of a map the RoIs of one place read.
constexpr int64_t kCacheBlockRows = 32;

// How many channels a cache block has: the values of one or several vectors.
template <typename T>
int64_t cache_block_width(const RoiPoolSizes& s) {
  const int64_t lanes = kernels<T>().lanes, most = kernels<T>().roi_pool.group;
  const int64_t row_bytes = s.width * s.cells * static_cast<int64_t>(sizeof(T));
  int64_t width = lanes;
  while (2 * width <= most && width < s.set_channels() &&
         std::min(s.height, kCacheBlockRows) * row_bytes * 2 * width <= kCacheBlockBytes) {
    width *= 2;
  }
  return width;
}

// The channels [0, channels) cut into ranges of at most `width`. No range lies in two channel sets.
inline std::vector<Range> channel_ranges(const RoiPoolSizes& s, int64_t width) {
  std::vector<Range> ranges;
  for (int64_t set = 0; set < s.channel_sets; ++set) {
    const int64_t end = (set + 1) * s.set_channels();
    for (int64_t c = set * s.set_channels(); c < end; c += width) ranges.push_back({c, std::min(c + width, end)});
  }
  return ranges;
}

// Rows of some channels of one image, as (height, width, cells, channels padded to `width`).
template <typename T>
class ChannelCacheBlock {
 public:
  ChannelCacheBlock(const RoiPoolSizes& s, int64_t width)
      : sizes_(s), width_(width), values_(scratch<T>(s.pixels() * s.cells * width)) {}

  T* data() { return values_.get(); }
  int64_t pixel_stride() const { return sizes_.cells * width_; }

  // Starts with other channels or another image; the first row that will be asked for is `row`.
  void begin(Range channels, int64_t row) {
    channels_ = channels;
    next_ = written_ = row;
  }

  // Makes sure that the rows before `end` are those of `image`, (channels * cells, height, width).
  void read(const T* image, int64_t end) {
    if (end <= next_) return;
    if (padded()) clear_rows(next_, end);
    for (int64_t cell = 0; cell < sizes_.cells; ++cell) {
      kernels<T>().transpose(plane(image, cell) + next_ * sizes_.width, sizes_.cells * sizes_.pixels(), count(),
                             (end - next_) * sizes_.width, row(next_) + cell * width_, pixel_stride());
    }
    next_ = end;
  }

  // Makes sure that the rows before `end` have begun as zeros.
  void clear(int64_t end) {
    if (end <= next_) return;
    clear_rows(next_, end);
    next_ = end;
  }

  // Writes the rows before `end` that are not written yet to `image`, zeros for those that no one asked for.
  void write(T* image, int64_t end) {
    const int64_t known = std::min(end, next_);
    for (int64_t cell = 0; cell < sizes_.cells && written_ < known; ++cell) {
      kernels<T>().transpose(row(written_) + cell * width_, pixel_stride(), (known - written_) * sizes_.width, count(),
                             plane(image, cell) + written_ * sizes_.width, sizes_.cells * sizes_.pixels());
    }
    written_ = std::max(written_, known);
    if (written_ < end) fill_zeros(image, written_, end);
    written_ = std::max(written_, end);
  }

  // Writes zeros to rows of `image`.
  void fill_zeros(T* image, int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < count() * sizes_.cells; ++c) {
      std::fill_n(plane(image, 0) + c * sizes_.pixels() + begin * sizes_.width, (end - begin) * sizes_.width, T(0));
    }
  }

 private:
  int64_t count() const { return channels_.end - channels_.begin; }
  bool padded() const { return count() < width_; }
  T* row(int64_t y) { return data() + y * sizes_.width * pixel_stride(); }
  void clear_rows(int64_t begin, int64_t end) { std::fill(row(begin), row(end), T(0)); }

  template <typename Pointer>
  Pointer plane(Pointer image, int64_t cell) const {
    return image + (channels_.begin * sizes_.cells + cell) * sizes_.pixels();
  }

  RoiPoolSizes sizes_;
  int64_t width_;
  Scratch<T> values_;
  Range channels_{0, 0};
  int64_t next_ = 0, written_ = 0;  // rows before them are there, and written
};

}  // namespace dcn::cpu
