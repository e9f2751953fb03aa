// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The order in which the tensor-core kernels sum over taps and channels, and the weights in that order.
#pragma once

#include "arithmetic.cuh"
#include "deform_conv2d_operands.cuh"

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
  bool permuted = false;  // columns as permuted_column says
  int outer_taps = 1;  // if not 1, all segments are packed for one tap after the other, and the Reduction has one tap

  DCN_HOST_DEVICE int64_t step_units() const { return int64_t{padded} * kRowUnits; }
  DCN_HOST_DEVICE int64_t segment_units() const { return step_units() * reduction.steps(); }
  DCN_HOST_DEVICE int64_t weight_units() const { return segment_units() * segments * outer_taps; }
  // Behind the weights lie the Pairs of all steps.
  DCN_HOST_DEVICE int64_t total_units() const { return weight_units() + 2 * int64_t{reduction.steps()}; }
};

// Which column of every 32 a packed row has, so that the sums that a lane gets in four neighbouring fragments, two in
// each, are those of eight neighbouring columns.
DCN_HOST_DEVICE int permuted_column(int row) { return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2; }

template <Kind kKind>
__global__ void pack_kernel(const Packing packing, const Weights<const Element<kKind>> weights, Unit* packed) {
  const int steps = packing.reduction.steps();
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < packing.weight_units();
       at += int64_t{gridDim.x} * blockDim.x) {
    const int row = static_cast<int>(at / kRowUnits % packing.padded);
    const int slot = static_cast<int>(at % kRowUnits), column = slot ^ row % kRowUnits;
    const int segment = static_cast<int>(at / packing.segment_units());
    const Step step(packing.reduction, static_cast<int>(at / packing.step_units() % steps));
    const int local = packing.permuted ? permuted_column(row) : row;
    const int n = segment % packing.segments * packing.columns + local;
    const int tap = segment / packing.segments + step.tap + step.tap_of(column);
    const int unit = step.segment * packing.reduction.units + step.unit_of(column);
    const int first = n / packing.group_columns * packing.group_channels + unit * kUnitElements<kKind>;
    const bool exists = local < packing.columns && step.tap_of(column) < step.taps;
    float values[kUnitElements<kKind>];
#pragma unroll
    for (int e = 0; e < kUnitElements<kKind>; ++e) {
      const int output = packing.outputs ? n : first + e, channel = packing.outputs ? first + e : n;
      const bool same_group = output / packing.conv_outputs == channel / packing.conv_channels;
      values[e] =
          exists && same_group ? static_cast<float>(weights.at(output, channel % packing.conv_channels, tap)) : 0.0f;
    }
    packed[at] = to_unit<kKind>(values);
    if (segment == 0 && row == 0) {
      const int64_t index = at / packing.step_units() * kRowUnits + column;
      reinterpret_cast<Pair*>(packed + packing.weight_units())[index] = Pair(packing.reduction, step, column);
    }
  }
}

// Weights packed for one kernel.
class PackedWeights {
 public:
  template <Kind kKind>
  PackedWeights(std::integral_constant<Kind, kKind>, const DeviceScope& device, const Tensor& like,
                const Packing& packing, const Weights<const Element<kKind>>& weights)
      : tensor_(torch::stable::empty(std::array<int64_t, 1>{packing.total_units() * kUnitBytes}, ScalarType::Byte,
                                     std::nullopt, like.device())) {
    DCN_LAUNCH(pack_kernel<kKind>, std::min(divide_up(packing.weight_units(), 256), kMaxBlocks), 256, device.stream(),
               packing, weights, static_cast<Unit*>(tensor_.mutable_data_ptr()));
  }
  const Unit* units() const { return static_cast<const Unit*>(tensor_.const_data_ptr()); }

 private:
  Tensor tensor_;
};

template <Kind kKind>
using KindConstant = std::integral_constant<Kind, kKind>;

}  // namespace dcn::cuda
