// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Which pixels the bins of a RoI read, with which weights, and in which order RoIs are worked on. Where bins sample is
// the operator's geometry: roi_pool_sizes.h says what that is.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/isa/kernels.h"
#include "cpu/memory.h"
#include "roi_pool_sizes.h"

namespace dcn::cpu {

// Samples for which room is made at a time: a bin usually has fewer.
constexpr int64_t kSamplesAtOnce = 16;

// The pixels that a bin's samples touch along one axis: a range of entries.
struct AxisRange {
  int32_t first, count;
  int32_t samples;  // those on the map
};

// The sum of a bin's samples along one axis: the pixels that they touch, each once.
template <typename T>
class AxisSum {
 public:
  // The sum so far is at `begin`, and behind it there is room for the entries to come.
  void append_to(AxisEntry<T>* begin) {
    end_ = begin + count();
    begin_ = begin;
  }

  void add(const AxisSample<T>& sample) {
    if (!sample.exists[0] && !sample.exists[1]) return;
    ++samples_;
    // Positions rise from sample to sample, so a pixel that is met again is one of the last two.
    AxisEntry<T>* low = end_;
    if (end_ - begin_ > 0 && end_[-1].pixel == sample.low) low = end_ - 1;
    if (end_ - begin_ > 1 && end_[-2].pixel == sample.low) low = end_ - 2;
    add(low, 0, sample);
    if (sample.exists[1]) add(low + 1, 1, sample);
  }

  int32_t count() const { return static_cast<int32_t>(end_ - begin_); }
  int32_t samples() const { return samples_; }  // those on the map

 private:
  void add(AxisEntry<T>* to, int side, const AxisSample<T>& sample) {
    if (to == end_) *end_++ = {sample.low + side, T(0), T(0)};
    to->weight += sample.weight[side];
    to->slope += sample.slope[side];
  }

  AxisEntry<T>*begin_ = nullptr, *end_ = nullptr;
  int32_t samples_ = 0;
};

// What the gradient of a bin's offset needs.
template <typename T>
struct BinShift {
  T average;         // factor of the sum, without the modulation
  T unit_y, unit_x;  // pixels that an offset of 1 moves the bin by
};

// Where the operands of a call are that say where bins lie.
template <typename T>
struct RoiRowsView {
  RoiPoolSizes sizes;
  const T *rois, *offsets, *masks;  // offsets and masks may be null

  int64_t image(int64_t r) const { return static_cast<int64_t>(rois[5 * r]); }
  // Index in the offsets of the x of an offset cell. Its y is `offset_cells` values behind.
  int64_t offset_index(int64_t r, int64_t set, int64_t offset_cell) const {
    return (r * sizes.channel_sets + set) * 2 * sizes.offset_cells + offset_cell;
  }
  T modulation(int64_t r, int64_t b) const { return masks ? masks[r * sizes.bins() + b] : T(1); }
};

// All bins of one RoI, for each channel set.
template <typename T>
class RoiBins {
 public:
  template <typename Geometry>
  void find(const Geometry& geometry, const RoiRowsView<T>& from, int64_t r) {
    const RoiPoolSizes& s = from.sizes;
    used_ = 0;
    bins_.clear();
    shifts_.clear();
    const T* row = from.rois + 5 * r;
    const auto y = geometry.axis(row, false), x = geometry.axis(row, true);
    // Without offsets all bins of a row read the same rows of pixels, and likewise for columns.
    std::vector<AxisRange> rows, columns;
    for (int64_t h = 0; !from.offsets && h < s.out_h; ++h) rows.push_back(sum_of(y, h, T(0)));
    for (int64_t w = 0; !from.offsets && w < s.out_w; ++w) columns.push_back(sum_of(x, w, T(0)));
    for (int64_t set = 0; set < s.channel_sets; ++set) {
      for (int64_t b = 0; b < s.bins(); ++b) {
        const int64_t h = b / s.out_w, w = b % s.out_w;
        AxisRange bin_rows, bin_columns;
        if (from.offsets) {
          const T* offset = from.offsets + from.offset_index(r, set, geometry.offset_cell(h, w));
          bin_rows = sum_of(y, h, offset[s.offset_cells]), bin_columns = sum_of(x, w, offset[0]);
        } else {
          bin_rows = rows[h], bin_columns = columns[w];
        }
        const T average = geometry.average(divisor(y, bin_rows) * divisor(x, bin_columns));
        bins_.push_back({bin_rows.first, bin_columns.first, bin_rows.count, bin_columns.count,
                         static_cast<int32_t>(geometry.cell(h, w)), average * from.modulation(r, b)});
        // A bin without samples has no shift to differentiate by; that of a RoI that is not finite would be NaN.
        const bool sampled = bin_rows.samples > 0 && bin_columns.samples > 0;
        shifts_.push_back({average, sampled ? y.unit : T(0), sampled ? x.unit : T(0)});
      }
    }
  }

  // Rows of pixels that it reads; {0, 0} where it reads none.
  Range rows() const {
    Range range{std::numeric_limits<int64_t>::max(), 0};
    for (const BinPixels<T>& bin : bins_) {
      for (int32_t i = 0; bin.column_count > 0 && i < bin.row_count; ++i) {
        const int64_t pixel = entries_[bin.rows + i].pixel;
        range = {std::min(range.begin, pixel), std::max(range.end, pixel + 1)};
      }
    }
    return range.end ? range : Range{0, 0};
  }

  const AxisEntry<T>* entries() const { return entries_.data(); }
  const BinPixels<T>* bins() const { return bins_.data(); }
  const BinShift<T>* shifts() const { return shifts_.data(); }

 private:
  template <typename Axis>
  AxisRange sum_of(const Axis& axis, int64_t bin, T offset) {
    const auto samples = axis.samples(bin, offset);
    const size_t first = used_;
    AxisSum<T> sum;
    for (int64_t k = samples.range.begin; k < samples.range.end;) {
      const size_t needed = first + sum.count() + 2 * kSamplesAtOnce;
      if (entries_.size() < needed) entries_.resize(2 * needed);
      sum.append_to(entries_.data() + first);
      const int64_t end = std::min(k + kSamplesAtOnce, samples.range.end);
      for (; k < end; ++k) sum.add(samples(k));
    }
    used_ += sum.count();
    return {static_cast<int32_t>(first), sum.count(), sum.samples()};
  }

  template <typename Axis>
  static T divisor(const Axis& axis, const AxisRange& found) {
    return static_cast<T>(axis.divisor([&] { return found.samples; }));
  }

  std::vector<AxisEntry<T>> entries_;  // the first used_ of them
  size_t used_ = 0;
  std::vector<BinPixels<T>> bins_;
  std::vector<BinShift<T>> shifts_;
};

// RoIs in an order in which neighbours on the map follow each other, image by image: along a Z-shaped curve through
// their centres.
template <typename T>
std::vector<int64_t> neighbouring_order(const RoiRowsView<T>& from) {
  const int64_t count = from.sizes.rois;
  const auto centre = [&](int64_t r, int axis) { return from.rois[5 * r + 1 + axis] + from.rois[5 * r + 3 + axis]; };
  T low[2], high[2];
  for (int axis = 0; axis < 2; ++axis) {
    low[axis] = std::numeric_limits<T>::max();
    high[axis] = std::numeric_limits<T>::lowest();
    for (int64_t r = 0; r < count; ++r) {
      if (!std::isfinite(centre(r, axis))) continue;
      low[axis] = std::min(low[axis], centre(r, axis));
      high[axis] = std::max(high[axis], centre(r, axis));
    }
  }
  std::vector<uint64_t> key(count);
  for (int64_t r = 0; r < count; ++r) {
    key[r] = static_cast<uint64_t>(from.image(r)) << 16;
    for (int axis = 0; axis < 2; ++axis) {
      const T place = (centre(r, axis) - low[axis]) / (high[axis] - low[axis]) * T(255);
      const uint64_t step = place >= T(0) && place <= T(255) ? static_cast<uint64_t>(place) : 0;  // NaN is 0
      for (int bit = 0; bit < 8; ++bit) key[r] |= (step >> bit & 1) << (2 * bit + axis);
    }
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] < key[b]; });
  return order;
}

// A RoI whose turn it is, and rows of its image: those that it reads, and the first one that it or any RoI after it
// reads.
struct Visit {
  int64_t roi, image;
  Range rows;
  int64_t first_row;
};

// RoIs image by image in the order in which the last of the rows that they read comes, so that an image can be worked
// through from top to bottom.
template <typename T>
std::vector<Visit> visits_by_row(const RoiRowsView<T>& from, const std::vector<RoiBins<T>>& bins) {
  std::vector<Visit> visits;
  for (int64_t r = 0; r < from.sizes.rois; ++r) visits.push_back({r, from.image(r), bins[r].rows(), 0});
  std::stable_sort(visits.begin(), visits.end(), [](const Visit& a, const Visit& b) {
    return a.image != b.image ? a.image < b.image : a.rows.end < b.rows.end;
  });
  for (size_t i = visits.size(); i-- > 0;) {
    const bool last = i + 1 == visits.size() || visits[i + 1].image != visits[i].image;
    const bool reads = visits[i].rows.end > 0;
    const int64_t after = last ? from.sizes.height : visits[i + 1].first_row;
    visits[i].first_row = reads ? std::min(visits[i].rows.begin, after) : after;
  }
  return visits;
}

}  // namespace dcn::cpu
