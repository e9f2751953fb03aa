// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The factors of the products that amx_kernels.h computes: how channels are cut into blocks, how weights are packed.
#pragma once

#include "amx_kernels.h"
#include "deform_conv2d_operands.h"

namespace dcn::cpu {

inline int64_t tiles_of(int64_t count) { return divide_up(count, kTileRows); }
inline int64_t blocks_of(int64_t count) { return divide_up(count, kBlockColumns); }

inline const Bfloat16* bits_of(const Tensor& tensor) { return static_cast<const Bfloat16*>(tensor.const_data_ptr()); }

// The input channels in blocks: none belongs to two conv groups or two deform groups.
class ChannelBlocks {
 public:
  explicit ChannelBlocks(const DeformConv2dSizes& s) : segments_(segments_of(s, s.channels)), first_(s.groups + 1, 0) {
    for (const Segment& segment : segments_) {
      block_.push_back(total());
      for (int64_t group = segment.group; group < s.groups; ++group) first_[group + 1] += blocks_of(segment.count);
    }
  }

  const std::vector<Segment>& segments() const { return segments_; }
  int64_t first_block(size_t segment) const { return block_[segment]; }
  int64_t first_of_group(int64_t group) const { return first_[group]; }
  int64_t of_group(int64_t group) const { return first_[group + 1] - first_[group]; }
  int64_t total() const { return first_.back(); }

 private:
  std::vector<Segment> segments_;
  std::vector<int64_t> block_, first_;
};

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

}  // namespace dcn::cpu
