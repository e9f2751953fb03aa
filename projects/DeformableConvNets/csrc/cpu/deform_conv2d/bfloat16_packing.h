// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The factors of the products that amx_kernels.h computes: how weights and output gradients are packed.
#pragma once

#include "cpu/deform_conv2d/bfloat16_operands.h"

namespace dcn::cpu {

// The weight as right factors: for every group (panels of output channels; taps, panels of the
// group's input channels; register tiles).
struct Bfloat16Weight {
  Scratch<Bfloat16> data;
  std::vector<int64_t> begin;  // of a group
  int64_t tiles;               // register tiles of a group's output channels

  int64_t panels() const { return divide_up(tiles, 2); }
  int64_t tiles_of_panel(int64_t panel) const { return std::min<int64_t>(tiles - 2 * panel, 2); }

  Bfloat16Weight(const DeformConv2dSizes& s, const ChannelPanels& channels, const Bfloat16* weight)
      : begin(s.groups + 1, 0), tiles(register_tiles_of(s.group_out_channels())) {
    for (int64_t g = 0; g < s.groups; ++g) {
      begin[g + 1] = begin[g] + s.taps() * channels.of_group(g) * tiles * kRegisterTileValues;
    }
    data = scratch<Bfloat16>(begin.back());
    const auto segments = static_cast<int64_t>(channels.segments().size());
    torch::stable::parallel_for(0, segments * panels(), 1, [&](int64_t first, int64_t last) {
      const Scratch<Bfloat16> memory = scratch<Bfloat16>((s.taps() * kPanelColumns + 1) * kPanelColumns);
      for (int64_t i = first; i < last; ++i) pack(s, channels, weight, i / panels(), i % panels(), memory.get());
    });
  }

 private:
  // One panel of the channels of one segment.
  void pack(const DeformConv2dSizes& s, const ChannelPanels& channels, const Bfloat16* weight, int64_t index,
            int64_t panel, Bfloat16* memory) const {
    const Segment& segment = channels.segments()[index];
    const int64_t taps = s.taps(), row = s.group_channels() * taps, group = segment.group,
                  tiles = tiles_of_panel(panel);
    const int64_t out = panel * 2 * kRegisterTileRows,
                  outs = std::min(s.group_out_channels() - out, tiles * kRegisterTileRows);
    const int64_t group_panels = channels.of_group(group), depth_step = tiles * kRegisterTileValues;
    const Bfloat16* from =
        weight + (group * s.group_out_channels() + out) * row + segment.begin % s.group_channels() * taps;
    Bfloat16* to = data.get() + begin[group] + panel * 2 * taps * group_panels * kRegisterTileValues;
    to += (channels.first_panel(index) - channels.first_of_group(group)) * depth_step;
    std::fill_n(memory, (taps * kPanelColumns + 1) * kPanelColumns, Bfloat16{0});
    Bfloat16* const of_channels = memory + kPanelColumns;  // (channels, taps, output channels); before it, zeros
    for (int64_t c = 0; c < segment.count; c += kPanelColumns, from += kPanelColumns * taps, to += depth_step) {
      const int64_t count = std::min(kPanelColumns, segment.count - c);
      amx_kernels()->transpose(from, row, outs, count * taps, of_channels, kPanelColumns);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Bfloat16* rows[kPanelColumns];
        for (int64_t k = 0; k < kPanelColumns; ++k) {
          rows[k] = k < count ? of_channels + (k * taps + tap) * kPanelColumns : memory;
        }
        amx_kernels()->pack_right(rows, tiles, to + tap * group_panels * depth_step);
      }
    }
  }
};

// The weight of a segment of channels as right factors that make gradient columns: (taps, panels of channels, panels of
// output channels, the register tile of the even channels and that of the odd ones).
inline Scratch<Bfloat16> pack_backward_weight(const DeformConv2dSizes& s, const Segment& segment,
                                              const Bfloat16* weight) {
  const int64_t taps = s.taps(), row = s.group_channels() * taps, group_out = s.group_out_channels();
  const int64_t channel_panels = panels_of(segment.count), out_panels = panels_of(group_out);
  Scratch<Bfloat16> packed = scratch<Bfloat16>(taps * channel_panels * out_panels * 2 * kRegisterTileValues);
  const int64_t size = taps * kPanelColumns * kPanelColumns;
  const Scratch<Bfloat16> of_channels = scratch<Bfloat16>(size);  // (channels, taps, output channels)
  for (int64_t o = 0; o < group_out; o += kPanelColumns) {
    const int64_t outs = std::min(kPanelColumns, group_out - o);
    for (int64_t c = 0; c < segment.count; c += kPanelColumns) {
      const int64_t count = std::min(kPanelColumns, segment.count - c);
      if (outs < kPanelColumns || count < kPanelColumns) std::fill_n(of_channels.get(), size, Bfloat16{0});
      amx_kernels()->transpose(
          weight + (segment.group * group_out + o) * row + (segment.begin % s.group_channels() + c) * taps, row, outs,
          count * taps, of_channels.get(), kPanelColumns);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t panel = (tap * channel_panels + c / kPanelColumns) * out_panels + o / kPanelColumns;
        for (int64_t odd = 0; odd < 2; ++odd) {
          amx_kernels()->transpose_pairs(of_channels.get() + (odd * taps + tap) * kPanelColumns,
                                         2 * taps * kPanelColumns,
                                         packed.get() + (2 * panel + odd) * kRegisterTileValues);
        }
      }
    }
  }
  return packed;
}

// Where weight gradients go, (out_channels, group_channels, taps): rounded, or as
// float32 where those of several shares are added.
struct WeightGradientView {
  Bfloat16* rounded;
  float* share;

  explicit operator bool() const { return rounded || share; }
};

// Writes a segment's weight gradient, (taps, output channels, channels in the order of Bfloat16Backward), to its place.
inline void unpack_weight_gradient(const DeformConv2dSizes& s, const Segment& segment, const float* from,
                                   const WeightGradientView& to) {
  const int64_t taps = s.taps(), row = s.group_channels() * taps, group_out = s.group_out_channels();
  const int64_t from_row = panels_of(segment.count) * kPanelColumns;
  const int64_t from_tap = register_tiles_of(group_out) * kRegisterTileRows * from_row;
  const int64_t panel_row = kPanelColumns * taps;
  const Scratch<float> gathered = scratch<float>(panel_row * kRegisterTileRows);    // (channels, taps, output channels)
  const Scratch<float> transposed = scratch<float>(panel_row * kRegisterTileRows);  // (output channels, channels, taps)
  for (int64_t o = 0; o < group_out; o += kRegisterTileRows) {
    const int64_t outs = std::min(kRegisterTileRows, group_out - o);
    for (int64_t c = 0; c < segment.count; c += kPanelColumns) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          kernels<float>().transpose(
              from + tap * from_tap + o * from_row + c + odd * kRegisterTileRows, from_row, kRegisterTileRows,
              kRegisterTileRows, gathered.get() + (odd * taps + tap) * kRegisterTileRows, 2 * taps * kRegisterTileRows);
        }
      }
      const int64_t columns = std::min(kPanelColumns, segment.count - c) * taps;
      const int64_t place = (segment.group * group_out + o) * row + (segment.begin % s.group_channels() + c) * taps;
      if (to.share) {
        kernels<float>().transpose(gathered.get(), kRegisterTileRows, columns, outs, to.share + place, row);
      } else {
        kernels<float>().transpose(gathered.get(), kRegisterTileRows, columns, outs, transposed.get(), panel_row);
        amx_kernels()->round_rows(transposed.get(), panel_row, nullptr, outs, columns, to.rounded + place, row);
      }
    }
  }
}

// Output gradients of a tile of positions and the channels of a group, as left factors: rows are positions in one and
// output channels in the other.
class Bfloat16GradOutput {
 public:
  Bfloat16GradOutput(const DeformConv2dSizes& s, const Bfloat16* grad, bool channels_last, int64_t tile)
      : sizes_(s),
        grad_(grad),
        channels_last_(channels_last),
        tile_(tile),
        rows_(scratch<Bfloat16>(panels_of(s.group_out_channels()) * position_panel())),
        columns_(scratch<Bfloat16>(panels_of(tile) * out_panel())) {}

  // Values from one panel to the next: of output channels in rows(), of positions in columns().
  int64_t position_panel() const { return tile_ * kPanelColumns; }
  int64_t out_panel() const { return register_tiles_of(sizes_.group_out_channels()) * kRegisterTileValues; }
  const Bfloat16* rows() const { return rows_.get(); }
  const Bfloat16* columns() const { return columns_.get(); }

  void pack_rows(int64_t n, int64_t begin, int64_t count, int64_t group) {
    const int64_t outs = sizes_.group_out_channels();
    for (int64_t o = 0; o < outs; o += kPanelColumns) {
      const int64_t some = std::min(kPanelColumns, outs - o);
      pack(at(n, begin, group) + o * out_stride(), channels_last_, count, some,
           rows_.get() + o / kPanelColumns * position_panel());
    }
  }
  void pack_columns(int64_t n, int64_t begin, int64_t count, int64_t group) {
    for (int64_t p = 0; p < count; p += kPanelColumns) {
      const int64_t some = std::min(kPanelColumns, count - p);
      pack(at(n, begin, group) + p * position_stride(), !channels_last_, sizes_.group_out_channels(), some,
           columns_.get() + p / kPanelColumns * out_panel());
    }
  }

 private:
  int64_t out_stride() const { return channels_last_ ? 1 : sizes_.positions(); }
  int64_t position_stride() const { return channels_last_ ? sizes_.out_channels : 1; }
  const Bfloat16* at(int64_t n, int64_t begin, int64_t group) const {
    return grad_ + n * sizes_.out_channels * sizes_.positions() + group * sizes_.group_out_channels() * out_stride() +
           begin * position_stride();
  }

  // A panel of `columns` columns, whose values lie side by side if `in_rows`, or else those of a column do.
  void pack(const Bfloat16* from, bool in_rows, int64_t rows, int64_t columns, Bfloat16* to) const {
    const int64_t stride = channels_last_ ? sizes_.out_channels : sizes_.positions();
    if (columns < kPanelColumns) std::fill_n(to, rows * kPanelColumns, Bfloat16{0});
    if (!in_rows) return amx_kernels()->transpose(from, stride, columns, rows, to, kPanelColumns);
    for (int64_t r = 0; r < rows; ++r, from += stride, to += kPanelColumns) {
      // The size of a whole panel is known to the compiler.
      columns == kPanelColumns ? std::copy_n(from, kPanelColumns, to) : std::copy_n(from, columns, to);
    }
  }

  const DeformConv2dSizes& sizes_;
  const Bfloat16* grad_;
  bool channels_last_;
  int64_t tile_;
  Scratch<Bfloat16> rows_, columns_;
};

}  // namespace dcn::cpu
