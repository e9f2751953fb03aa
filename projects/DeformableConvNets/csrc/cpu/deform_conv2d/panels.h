// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Packing for TileProduct: matrices cut into panels of a few vectors' width, padded with zeros.
#pragma once

#include <algorithm>

#include "cpu/isa/kernels.h"
#include "cpu/memory.h"

namespace dcn::cpu {

// How a matrix of `columns` columns is cut: the narrowest panel that takes all of them, or else the widest there is.
template <typename T>
class PanelShape {
 public:
  explicit PanelShape(int64_t columns) : columns_(columns), vectors_(1) {
    while (vectors_ < kernels<T>().panel_vectors && width() < columns) vectors_ *= 2;
  }

  int64_t columns() const { return columns_; }
  int64_t vectors() const { return vectors_; }
  int64_t width() const { return vectors_ * kernels<T>().lanes; }
  int64_t panels() const { return divide_up(columns_, width()); }
  int64_t size(int64_t rows) const { return panels() * rows * width(); }
  // As the left factor of a product, the panels are chunks of that many columns; the last one may end with zeros.
  int64_t depth() const { return panels() == 1 ? columns_ : width(); }
  int64_t padded() const { return panels() * depth(); }

  // Packs rows whose values lie side by side.
  void pack_rows(const T* from, int64_t row_stride, int64_t rows, T* to) const {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int64_t first = panel * width(), count = std::min(width(), columns_ - first);
      for (int64_t r = 0; r < rows; ++r, to += width()) {
        std::copy_n(from + r * row_stride + first, count, to);
        std::fill_n(to + count, width() - count, T(0));
      }
    }
  }

  // Packs columns whose values lie side by side.
  void pack_columns(const T* from, int64_t column_stride, int64_t rows, T* to) const {
    for (int64_t panel = 0; panel < panels(); ++panel, to += rows * width()) {
      const int64_t first = panel * width(), count = std::min(width(), columns_ - first);
      kernels<T>().transpose(from + first * column_stride, column_stride, count, rows, to, width());
      for (int64_t r = 0; count < width() && r < rows; ++r)
        std::fill_n(to + r * width() + count, width() - count, T(0));
    }
  }

 private:
  int64_t columns_, vectors_;
};

// A packed right factor.
template <typename T>
struct Panels {
  Scratch<T> data;
  int64_t panel_size = 0, vectors = 0;

  void set_right(TileProduct<T>& product) const {
    product.b = data.get();
    product.b_panel = panel_size;
    product.panel_vectors = vectors;
  }
};

// A packed right factor for every conv group.
template <typename T>
struct GroupedPanels {
  Scratch<T> data;
  PanelShape<T> shape;
  int64_t depth;  // rows of a panel

  void set_right(TileProduct<T>& product, int64_t group, int64_t first_row) const {
    product.b = data.get() + group * shape.size(depth) + first_row * shape.width();
    product.b_panel = depth * shape.width();
    product.panel_vectors = shape.vectors();
  }
};

// Channels that the packing of weights handles at a time, so that what it reads and writes stays in the first-level
// cache.
constexpr int64_t kPackedChannels = 16;

// A weight (out_channels, group_channels, taps), or (out_channels, taps, group_channels) where channels_last.
template <typename T>
struct WeightView {
  T* data;
  bool channels_last;
};

// A weight as the right factor of the forward product: for every group (taps, group_channels, out channels of the
// group).
template <typename T>
GroupedPanels<T> pack_forward_weight(const DeformConv2dSizes& s, const WeightView<const T>& weight) {
  const int64_t channels = s.group_channels(), taps = s.taps(), group_out = s.group_out_channels();
  GroupedPanels<T> packed{nullptr, PanelShape<T>(group_out), taps * channels};
  const PanelShape<T>& shape = packed.shape;
  packed.data = scratch<T>(s.groups * shape.size(packed.depth));
  const int64_t panels = shape.panels(), width = shape.width();
  std::vector<int64_t> places(kPackedChannels * taps);  // where the taps of some channels go
  for (int64_t i = 0; i < kPackedChannels * taps; ++i) places[i] = (i % taps * channels + i / taps) * width;
  torch::stable::parallel_for(0, s.groups * panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T* to = packed.data.get() + i * packed.depth * width;
      const int64_t out = i % panels * width, count = std::min(width, group_out - out);
      const T* from = weight.data + (i / panels * group_out + out) * channels * taps;
      if (count < width) std::fill_n(to, packed.depth * width, T(0));
      if (weight.channels_last) {
        kernels<T>().transpose(from, channels * taps, count, taps * channels, to, width);
        continue;
      }
      for (int64_t c = 0; c < channels; c += kPackedChannels) {
        const int64_t some = std::min(kPackedChannels, channels - c);
        kernels<T>().transpose_to_places(from + c * taps, channels * taps, count, some * taps, to + c * width,
                                         places.data());
      }
    }
  });
  return packed;
}

// Channels [begin, begin + count) of a group's weight as the right factor that makes gradient columns: (out channels of
// the group, padded as the output gradients' panels are; taps; channels).
template <typename T>
Panels<T> pack_backward_weight(const DeformConv2dSizes& s, const WeightView<const T>& weight, int64_t group,
                               int64_t begin, int64_t count, const PanelShape<T>& grad_shape) {
  const int64_t channels = s.group_channels(), taps = s.taps(), group_out = s.group_out_channels();
  const int64_t channel_stride = weight.channels_last ? 1 : taps, tap_stride = weight.channels_last ? channels : 1;
  const PanelShape<T> shape(taps * count);
  const int64_t depth = grad_shape.padded(), width = shape.width();
  Panels<T> packed{scratch<T>(shape.size(depth)), depth * width, shape.vectors()};
  T* to = packed.data.get();
  if (depth != group_out || shape.columns() % width) std::fill_n(to, shape.size(depth), T(0));
  for (int64_t o = 0; o < group_out; ++o) {
    const T* row = weight.data + (group * group_out + o) * channels * taps + begin * channel_stride;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < count;) {
        const int64_t column = tap * count + c, place = column % width;
        const int64_t some = std::min(count - c, width - place);
        T* out = to + column / width * packed.panel_size + o * width + place;
        const T* in = row + tap * tap_stride + c * channel_stride;
        if (channel_stride == 1) {
          std::copy_n(in, some, out);
        } else {
          for (int64_t i = 0; i < some; ++i) out[i] = in[i * channel_stride];
        }
        c += some;
      }
    }
  }
  return packed;
}

// Writes a weight gradient (taps, channels [begin, begin + count), out channels of the group) to its place in `weight`.
template <typename T>
void unpack_weight_gradient(const DeformConv2dSizes& s, const T* from, int64_t group, int64_t begin, int64_t count,
                            const WeightView<T>& weight) {
  const int64_t taps = s.taps(), group_out = s.group_out_channels(), row = s.group_channels() * taps;
  if (weight.channels_last) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      kernels<T>().transpose(from + tap * count * group_out, group_out, count, group_out,
                             weight.data + group * group_out * row + tap * s.group_channels() + begin, row);
    }
    return;
  }
  constexpr int64_t kOut = 64;
  const Scratch<T> gathered = scratch<T>(kPackedChannels * taps * kOut);  // (channels, taps, out channels)
  for (int64_t o = 0; o < group_out; o += kOut) {
    const int64_t outs = std::min(kOut, group_out - o);
    for (int64_t c0 = 0; c0 < count; c0 += kPackedChannels) {
      const int64_t some = std::min(kPackedChannels, count - c0);
      for (int64_t c = 0; c < some; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          std::copy_n(from + (tap * count + c0 + c) * group_out + o, outs, gathered.get() + (c * taps + tap) * kOut);
        }
      }
      kernels<T>().transpose(gathered.get(), kOut, some * taps, outs,
                             weight.data + (group * group_out + o) * row + (begin + c0) * taps, row);
    }
  }
}

}  // namespace dcn::cpu
