// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The factors of the products that amx_kernels.h computes: how weights and output gradients are packed.
#pragma once

#include "cpu/deform_conv2d/bfloat16_operands.h"

namespace dcn::cpu {

// The weight as right factors: for every group (panels of output channels; taps, blocks of the group; tiles).
struct Bfloat16Weight {
  Scratch<Bfloat16> data;
  std::vector<int64_t> begin;  // of a group
  int64_t tiles;               // of a group's output channels

  int64_t panels() const { return divide_up(tiles, 2); }
  int64_t tiles_of_panel(int64_t panel) const { return std::min<int64_t>(tiles - 2 * panel, 2); }

  Bfloat16Weight(const DeformConv2dSizes& s, const ChannelBlocks& blocks, const Bfloat16* weight)
      : begin(s.groups + 1, 0), tiles(tiles_of(s.group_out_channels())) {
    for (int64_t g = 0; g < s.groups; ++g) {
      begin[g + 1] = begin[g] + s.taps() * blocks.of_group(g) * tiles * kTileValues;
    }
    data = scratch<Bfloat16>(begin.back());
    const auto segments = static_cast<int64_t>(blocks.segments().size());
    torch::stable::parallel_for(0, segments * panels(), 1, [&](int64_t first, int64_t last) {
      const Scratch<Bfloat16> memory = scratch<Bfloat16>((s.taps() * kBlockColumns + 1) * kBlockColumns);
      for (int64_t i = first; i < last; ++i) pack(s, blocks, weight, i / panels(), i % panels(), memory.get());
    });
  }

 private:
  // One panel of the channels of one segment.
  void pack(const DeformConv2dSizes& s, const ChannelBlocks& blocks, const Bfloat16* weight, int64_t index,
            int64_t panel, Bfloat16* memory) const {
    const Segment& segment = blocks.segments()[index];
    const int64_t taps = s.taps(), row = s.group_channels() * taps, group = segment.group,
                  tiles = tiles_of_panel(panel);
    const int64_t out = panel * 2 * kTileRows, outs = std::min(s.group_out_channels() - out, tiles * kTileRows);
    const int64_t group_blocks = blocks.of_group(group), block_size = tiles * kTileValues;
    const Bfloat16* from =
        weight + (group * s.group_out_channels() + out) * row + segment.begin % s.group_channels() * taps;
    Bfloat16* to = data.get() + begin[group] + panel * 2 * taps * group_blocks * kTileValues;
    to += (blocks.first_block(index) - blocks.first_of_group(group)) * block_size;
    std::fill_n(memory, (taps * kBlockColumns + 1) * kBlockColumns, Bfloat16{0});
    Bfloat16* const of_channels = memory + kBlockColumns;  // (channels, taps, output channels); before it, zeros
    for (int64_t c = 0; c < segment.count; c += kBlockColumns, from += kBlockColumns * taps, to += block_size) {
      const int64_t count = std::min(kBlockColumns, segment.count - c);
      amx_kernels()->transpose(from, row, outs, count * taps, of_channels, kBlockColumns);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Bfloat16* rows[kBlockColumns];
        for (int64_t k = 0; k < kBlockColumns; ++k) {
          rows[k] = k < count ? of_channels + (k * taps + tap) * kBlockColumns : memory;
        }
        amx_kernels()->pack_right(rows, tiles, to + tap * group_blocks * block_size);
      }
    }
  }
};

// The weight of a segment of channels as right factors that make gradient columns: (taps, blocks of channels, blocks of
// output channels, the tile of the even channels and that of the odd ones).
inline Scratch<Bfloat16> pack_backward_weight(const DeformConv2dSizes& s, const Segment& segment,
                                              const Bfloat16* weight) {
  const int64_t taps = s.taps(), row = s.group_channels() * taps, group_out = s.group_out_channels();
  const int64_t channel_blocks = blocks_of(segment.count), out_blocks = blocks_of(group_out);
  Scratch<Bfloat16> packed = scratch<Bfloat16>(taps * channel_blocks * out_blocks * 2 * kTileValues);
  const int64_t size = taps * kBlockColumns * kBlockColumns;
  const Scratch<Bfloat16> of_channels = scratch<Bfloat16>(size);  // (channels, taps, output channels)
  for (int64_t o = 0; o < group_out; o += kBlockColumns) {
    const int64_t outs = std::min(kBlockColumns, group_out - o);
    for (int64_t c = 0; c < segment.count; c += kBlockColumns) {
      const int64_t count = std::min(kBlockColumns, segment.count - c);
      if (outs < kBlockColumns || count < kBlockColumns) std::fill_n(of_channels.get(), size, Bfloat16{0});
      amx_kernels()->transpose(
          weight + (segment.group * group_out + o) * row + (segment.begin % s.group_channels() + c) * taps, row, outs,
          count * taps, of_channels.get(), kBlockColumns);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t block = (tap * channel_blocks + c / kBlockColumns) * out_blocks + o / kBlockColumns;
        for (int64_t odd = 0; odd < 2; ++odd) {
          amx_kernels()->transpose_pairs(of_channels.get() + (odd * taps + tap) * kBlockColumns,
                                         2 * taps * kBlockColumns, packed.get() + (2 * block + odd) * kTileValues);
        }
      }
    }
  }
  return packed;
}

// Where weight gradients go, (out_channels, group_channels, taps): rounded, or as float32 where more are added.
struct WeightGradient {
  Bfloat16* rounded;
  float* part;

  explicit operator bool() const { return rounded || part; }
};

// Writes a segment's weight gradient, (taps, output channels, channels in the order of Bfloat16Backward), to its place.
inline void unpack_weight_gradient(const DeformConv2dSizes& s, const Segment& segment, const float* from,
                                   const WeightGradient& to) {
  const int64_t taps = s.taps(), row = s.group_channels() * taps, group_out = s.group_out_channels();
  const int64_t from_row = blocks_of(segment.count) * kBlockColumns;
  const int64_t from_tap = tiles_of(group_out) * kTileRows * from_row;
  const int64_t block_row = kBlockColumns * taps;
  const Scratch<float> block = scratch<float>(block_row * kTileRows);       // (channels, taps, output channels)
  const Scratch<float> transposed = scratch<float>(block_row * kTileRows);  // (output channels, channels, taps)
  for (int64_t o = 0; o < group_out; o += kTileRows) {
    const int64_t outs = std::min(kTileRows, group_out - o);
    for (int64_t c = 0; c < segment.count; c += kBlockColumns) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t odd = 0; odd < 2; ++odd) {
          kernels<float>().transpose(from + tap * from_tap + o * from_row + c + odd * kTileRows, from_row, kTileRows,
                                     kTileRows, block.get() + (odd * taps + tap) * kTileRows, 2 * taps * kTileRows);
        }
      }
      const int64_t columns = std::min(kBlockColumns, segment.count - c) * taps;
      const int64_t place = (segment.group * group_out + o) * row + (segment.begin % s.group_channels() + c) * taps;
      if (to.part) {
        kernels<float>().transpose(block.get(), kTileRows, columns, outs, to.part + place, row);
      } else {
        kernels<float>().transpose(block.get(), kTileRows, columns, outs, transposed.get(), block_row);
        amx_kernels()->round_rows(transposed.get(), block_row, nullptr, outs, columns, to.rounded + place, row);
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
        rows_(scratch<Bfloat16>(blocks_of(s.group_out_channels()) * position_block())),
        columns_(scratch<Bfloat16>(blocks_of(tile) * out_block())) {}

  // From one block to the next: of output channels in rows(), of positions in columns().
  int64_t position_block() const { return tile_ * kBlockColumns; }
  int64_t out_block() const { return tiles_of(sizes_.group_out_channels()) * kTileValues; }
  const Bfloat16* rows() const { return rows_.get(); }
  const Bfloat16* columns() const { return columns_.get(); }

  void pack_rows(int64_t n, int64_t begin, int64_t count, int64_t group) {
    const int64_t outs = sizes_.group_out_channels();
    for (int64_t o = 0; o < outs; o += kBlockColumns) {
      const int64_t some = std::min(kBlockColumns, outs - o);
      pack(at(n, begin, group) + o * out_stride(), channels_last_, count, some,
           rows_.get() + o / kBlockColumns * position_block());
    }
  }
  void pack_columns(int64_t n, int64_t begin, int64_t count, int64_t group) {
    for (int64_t p = 0; p < count; p += kBlockColumns) {
      const int64_t some = std::min(kBlockColumns, count - p);
      pack(at(n, begin, group) + p * position_stride(), !channels_last_, sizes_.group_out_channels(), some,
           columns_.get() + p / kBlockColumns * out_block());
    }
  }

 private:
  int64_t out_stride() const { return channels_last_ ? 1 : sizes_.positions(); }
  int64_t position_stride() const { return channels_last_ ? sizes_.out_channels : 1; }
  const Bfloat16* at(int64_t n, int64_t begin, int64_t group) const {
    return grad_ + n * sizes_.out_channels * sizes_.positions() + group * sizes_.group_out_channels() * out_stride() +
           begin * position_stride();
  }

  // A block of `columns` columns, whose values lie side by side if `in_rows`, or else those of a column do.
  void pack(const Bfloat16* from, bool in_rows, int64_t rows, int64_t columns, Bfloat16* to) const {
    const int64_t stride = channels_last_ ? sizes_.out_channels : sizes_.positions();
    if (columns < kBlockColumns) std::fill_n(to, rows * kBlockColumns, Bfloat16{0});
    if (!in_rows) return amx_kernels()->transpose(from, stride, columns, rows, to, kBlockColumns);
    for (int64_t r = 0; r < rows; ++r, from += stride, to += kBlockColumns) {
      // A whole block's size is known to the compiler.
      columns == kBlockColumns ? std::copy_n(from, kBlockColumns, to) : std::copy_n(from, columns, to);
    }
  }

  const DeformConv2dSizes& sizes_;
  const Bfloat16* grad_;
  bool channels_last_;
  int64_t tile_;
  Scratch<Bfloat16> rows_, columns_;
};

}  // namespace dcn::cpu
