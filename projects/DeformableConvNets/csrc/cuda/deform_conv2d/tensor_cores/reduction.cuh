// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The order in which the tensor-core kernels sum over taps and channels, and the weights in that order.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/deform_conv2d/sampling/operands.cuh"

namespace dcn::cuda {

constexpr int kMostTaps = 9;  // whose samples a block locates at a time

// The channels of one group in `segments` equal segments of `units` units each. Summed over: blocks of up to kMostTaps
// taps, therein segments, therein blocks of up to eight units, therein taps (a tile's neighbouring taps read the same
// pixels), therein units. Eight pairs of tap and unit make a step; a block's last step may have fewer.
struct Reduction {
  int taps, segments, units;

  DCN_HOST_DEVICE int steps_of(int block_taps) const {
    const int rest = (block_taps * (units % kRowUnits) + kRowUnits - 1) / kRowUnits;
    return segments * (units / kRowUnits * block_taps + rest);
  }
  DCN_HOST_DEVICE int steps() const {
    return taps / kMostTaps * steps_of(kMostTaps) + (taps % kMostTaps ? steps_of(taps % kMostTaps) : 0);
  }
  // The blocks of taps and units that steps go through one after the other, and the first step of each.
  DCN_HOST_DEVICE int unit_blocks() const { return (units + kRowUnits - 1) / kRowUnits; }
  DCN_HOST_DEVICE int blocks() const { return (taps + kMostTaps - 1) / kMostTaps * segments * unit_blocks(); }
  DCN_HOST_DEVICE int first_step(int block) const {
    const int unit_block = block % unit_blocks(), segment = block / unit_blocks() % segments;
    const int tap = block / unit_blocks() / segments * kMostTaps;
    const int block_taps = taps - tap < kMostTaps ? taps - tap : kMostTaps;
    return tap / kMostTaps * steps_of(kMostTaps) + segment * (steps_of(block_taps) / segments) +
           unit_block * block_taps;
  }
};

// One step of a Reduction.
struct Step {
  int tap, taps;      // of the block: the first and how many
  int segment;        //
  int unit, units;    // of the block: the first, counted in the segment, and how many
  int index, length;  // of the step in the block, and the block's steps

  DCN_HOST_DEVICE Step(const Reduction& r, int step) {
    tap = segment = unit = 0, index = step;
    start_block(r);
    while (index >= length) {
      index -= length;
      next_block(r);
    }
  }

  DCN_HOST_DEVICE void advance(const Reduction& r) {
    if (++index < length) return;
    index = 0;
    next_block(r);
  }

  // Whether it is the first for its taps and segment.
  DCN_HOST_DEVICE bool starts_segment() const { return index == 0 && unit == 0; }

  // Of the pair in column `column` of this step, the tap, counted in the block: none if that is not below `taps`.
  DCN_HOST_DEVICE int tap_of(int column) const { return (index * kRowUnits + column) / units; }
  // and the unit, counted in the segment.
  DCN_HOST_DEVICE int unit_of(int column) const { return unit + (index * kRowUnits + column) % units; }

 private:
  DCN_HOST_DEVICE void start_block(const Reduction& r) {
    taps = r.taps - tap < kMostTaps ? r.taps - tap : kMostTaps;
    units = r.units - unit < kRowUnits ? r.units - unit : kRowUnits;
    length = (taps * units + kRowUnits - 1) / kRowUnits;
  }
  DCN_HOST_DEVICE void next_block(const Reduction& r) {
    unit += kRowUnits;
    if (unit >= r.units) unit = 0, ++segment;
    if (segment == r.segments) segment = 0, tap += kMostTaps;
    start_block(r);
  }
};

// One pair of tap and unit of a step, in 4 bytes: kernels read from a table what would cost them registers to compute.
struct Pair {
  uint32_t bits;

  DCN_HOST_DEVICE Pair(const Reduction& r, const Step& step, int column) {
    const int tap = step.tap_of(column);
    const bool exists = tap < step.taps;
    const int unit = exists ? step.segment * r.units + step.unit_of(column) : 0;
    bits = static_cast<uint32_t>(unit) << 6 | static_cast<uint32_t>(exists ? tap : 0) << 2 |
           static_cast<uint32_t>(step.starts_segment()) << 1 | static_cast<uint32_t>(exists);
  }

  DCN_HOST_DEVICE bool exists() const { return bits & 1; }
  DCN_HOST_DEVICE bool starts_segment() const { return bits & 2; }
  DCN_HOST_DEVICE int tap() const { return static_cast<int>(bits >> 2 & 15); }  // counted in the block of taps
  DCN_HOST_DEVICE int unit() const { return static_cast<int>(bits >> 6); }      // counted in the group
};
static_assert(kMostTaps <= 16);

// Weights as the second operand of a product: for every segment of columns and every step, `padded` rows of 128 bytes,
// one for each column, swizzled. What does not exist is zero.
struct Packing {
  Reduction reduction;
  int segments;         // of the columns
  int columns, padded;  // of a segment
  int group_columns;    // neighbouring columns that are multiplied with the same channels
  int group_channels;   // how many channels that are
  bool outputs;         // columns are output channels, summed over are input channels; or the other way round
  // Of the convolution: output and input channels of a group.
  int conv_outputs, conv_channels;
  bool permuted = false;  // rows are as permuted_row says
  int outer_taps = 1;  // if not 1, all segments are packed for one tap after the other, and the Reduction has one tap

  DCN_HOST_DEVICE int64_t step_units() const { return int64_t{padded} * kRowUnits; }
  DCN_HOST_DEVICE int64_t segment_units() const { return step_units() * reduction.steps(); }
  DCN_HOST_DEVICE int64_t weight_units() const { return segment_units() * segments * outer_taps; }
  // Behind the weights lie the Pairs of all steps.
  DCN_HOST_DEVICE int64_t total_units() const { return weight_units() + 2 * int64_t{reduction.steps()}; }
};

// Which row of every 32 a packed column has, so that the sums that a lane gets in four neighbouring fragments, two in
// each, are those of eight neighbouring columns.
DCN_HOST_DEVICE int permuted_row(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

constexpr int kPackThreads = 256;
constexpr int kPackColumns = 8;  // of a block

// Whether a block packs all outer taps: each alone would read the same memory again.
DCN_HOST_DEVICE bool packs_outer_taps(const Packing& packing) {
  return packing.outer_taps > 1 && packing.outer_taps <= kMostTaps;
}

inline int64_t pack_blocks(const Packing& packing) {
  const int64_t outer_taps = packs_outer_taps(packing) ? 1 : packing.outer_taps;
  return packing.segments * outer_taps * (packing.padded / kPackColumns) * packing.reduction.blocks();
}

// A block packs what a block of the Reduction sums over, for some columns. Through shared memory: weights are read in
// the order in which they lie in memory, by lines of one output channel's weights for several input channels and taps.
template <Kind kKind>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const Packing packing, const WeightsView<const Element<kKind>> weights, Unit* packed) {
  constexpr int kUnit = kUnitElements<kKind>;
  // The bits of an element, which take no arithmetic.
  using Bits = std::conditional_t<kUnit == 8, uint16_t, uint32_t>;
  struct Shared {
    alignas(kUnitBytes) Bits weights[kPackColumns * kRowUnits * kUnit * kMostTaps];
  };
  DCN_SHARED(Shared, shared);
  const Reduction& reduction = packing.reduction;
  const int thread = static_cast<int>(threadIdx.x);
  const int column_tiles = packing.padded / kPackColumns;
  int index = static_cast<int>(blockIdx.x);
  const int column_begin = index % column_tiles * kPackColumns;  // in its segment
  index /= column_tiles;
  const int block = index % reduction.blocks(), outer = index / reduction.blocks();
  const int outer_tap = outer / packing.segments, segment_begin = outer % packing.segments * packing.columns;
  const int first_step = reduction.first_step(block);
  const Step step(reduction, first_step);
  const bool all_outer = packs_outer_taps(packing);
  const int tap_begin = outer_tap + step.tap, taps = all_outer ? packing.outer_taps : step.taps;  // that are read
  const int elements = step.units * kUnit;

  // Columns are counted from `n` on, what is summed over from `m` on, over all conv groups.
  const int group = segment_begin / packing.group_columns, n = segment_begin + column_begin;
  const int m = group * packing.group_channels + (step.segment * reduction.units + step.unit) * kUnit;
  const int columns = packing.columns - column_begin < kPackColumns ? packing.columns - column_begin : kPackColumns;
  const int lines = packing.outputs ? kPackColumns : elements, length = packing.outputs ? elements : kPackColumns;
  const int first_output = packing.outputs ? n : m, first_channel = packing.outputs ? m : n;
  const bool merged = packing.group_columns != (packing.outputs ? packing.conv_outputs : packing.conv_channels);

  // In shared memory a line is as in memory: of taps of channels, or of channels of taps.
  const bool taps_first = weights.tap_stride <= weights.channel_stride;
  const int line_elements = length * taps;
  const int runs = taps_first ? 1 : taps, run = line_elements / runs;  // what follows each other in memory
  const int run_units = run / kUnit;
  const auto* base = reinterpret_cast<const Bits*>(&weights.at(0, 0, tap_begin));
  const int64_t channel_begin = first_channel - group * packing.conv_channels;
  const bool dense =
      taps_first ? weights.tap_stride == 1 && weights.channel_stride == taps : weights.channel_stride == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % kUnitBytes == 0 && run % kUnit == 0 &&
                       weights.output_stride % kUnit == 0 && channel_begin * weights.channel_stride % kUnit == 0 &&
                       (taps_first || weights.tap_stride % kUnit == 0);
  if (dense && aligned && !merged && columns == kPackColumns) {
#pragma unroll 3
    for (int at = thread; at < lines * runs * run_units; at += kPackThreads) {
      const int line = at / (runs * run_units), tap = at / run_units % runs, unit = at % run_units;
      const Bits* from = base + (first_output + line) * weights.output_stride + channel_begin * weights.channel_stride +
                         tap * weights.tap_stride + unit * kUnit;
      store_unit(shared.weights + line * line_elements + tap * run + unit * kUnit, load_unit(from));
    }
  } else {
    for (int at = thread; at < lines * line_elements; at += kPackThreads) {
      const int line = at / line_elements, rest = at % line_elements;
      const int tap = taps_first ? rest % taps : rest / length;
      const int channel = first_channel + (taps_first ? rest / taps : rest % length), output = first_output + line;
      const int conv_group = merged ? output / packing.conv_outputs : group;
      const bool exists = (packing.outputs ? line : channel - n) < columns &&
                          (!merged || channel / packing.conv_channels == conv_group);
      Bits bits = 0;
      if (exists) {
        bits = base[output * weights.output_stride +
                    (channel - conv_group * packing.conv_channels) * weights.channel_stride + tap * weights.tap_stride];
      }
      shared.weights[at] = bits;
    }
  }
  __syncthreads();

  // Of the outer taps, each has all segments.
  const int written = all_outer ? packing.outer_taps : 1, step_units = step.length * kPackColumns * kRowUnits;
  const int element_stride = !packing.outputs ? line_elements : taps_first ? taps : 1;
  const int column_stride = packing.outputs ? line_elements : taps_first ? taps : 1;
  const int tap_stride = taps_first ? 1 : length;
  for (int index_in_block = thread; index_in_block < written * step_units; index_in_block += kPackThreads) {
    const int moved = index_in_block / step_units, at = index_in_block % step_units;  // by outer taps
    const int slot = at % kRowUnits, column = at / kRowUnits % kPackColumns, place = at / (kPackColumns * kRowUnits);
    const int pair = place * kRowUnits + slot, tap = pair / step.units, unit = pair % step.units;
    Unit result{{0, 0, 0, 0}};
    if (tap < step.taps) {
      const Bits* from =
          shared.weights + column * column_stride + unit * kUnit * element_stride + (moved + tap) * tap_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kUnit == 8) {
          result.word[i] = from[2 * i * element_stride] | uint32_t{from[(2 * i + 1) * element_stride]} << 16;
        } else {
          const uint32_t bits = from[i * element_stride];
          result.word[i] = kKind == Kind::kTF32 ? round_to_tf32(bits_to_float(bits)) : bits;
        }
      }
    }
    const int local = column_begin + column, row = packing.permuted ? permuted_row(local) : local;
    Unit* to = packed + (int64_t{moved} * packing.segments + outer) * packing.segment_units() +
               (first_step + place) * packing.step_units();
    to[row * kRowUnits + (slot ^ row % kRowUnits)] = result;
    if (moved == 0 && outer == 0 && local == 0) {
      Step here = step;
      here.index = place;
      reinterpret_cast<Pair*>(packed + packing.weight_units())[first_step * kRowUnits + pair] =
          Pair(reduction, here, slot);
    }
  }
}

// Weights packed for one kernel.
class PackedWeightTensor {
 public:
  template <Kind kKind>
  PackedWeightTensor(std::integral_constant<Kind, kKind>, const DeviceScope& device, const Tensor& like,
                     const Packing& packing, const WeightsView<const Element<kKind>>& weights)
      : tensor_(torch::stable::empty(std::array<int64_t, 1>{packing.total_units() * kUnitBytes}, ScalarType::Byte,
                                     std::nullopt, like.device())) {
    DCN_LAUNCH(pack_kernel<kKind>, pack_blocks(packing), kPackThreads, device.stream(), packing, weights,
               static_cast<Unit*>(tensor_.mutable_data_ptr()));
  }
  const Unit* units() const { return static_cast<const Unit*>(tensor_.const_data_ptr()); }

 private:
  Tensor tensor_;
};

template <Kind kKind>
using KindConstant = std::integral_constant<Kind, kKind>;

}  // namespace dcn::cuda
