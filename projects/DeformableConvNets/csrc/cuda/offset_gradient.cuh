// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradients by offset and mask on tensor cores. The gradient by a sample is the product of output gradients and
// weights; offset and mask get their gradients from its four products with the pixels that the sample reads.
#pragma once

#include "sample_gather.cuh"

namespace dcn::cuda {

constexpr int kOffsetColumns = 64;  // channels at a time
constexpr int kOffsetStages = 3;
constexpr int kOffsetStageBytes = kOperandBytes + kOffsetColumns * kRowBytes;

struct OffsetGradientSizes {
  Packing packing;      // columns are input channels, of segments that lie in one conv group and one deform group
  int rows, positions;  // of all images, of one
  int deform_segments;  // of a deform group
  int segment_tiles;

  DCN_HOST_DEVICE int row_tiles() const { return (rows + kProductRows - 1) / kProductRows; }
};

struct OffsetGradientShared {
  unsigned char stages[kOffsetStages][kOffsetStageBytes];  // of output gradients, then of weights
  PackedSample samples[kProductRows];
  float dots[2][kProductRows][4];  // of either half of the channels, with each corner
};

// A block owns a tile of positions, a tap and a deform group.
template <Kind kKind>
__global__ void __launch_bounds__(kProductThreads, kKind == Kind::kFloat32 ? 1 : 2)
    offset_gradient_kernel(const OffsetGradientSizes sizes, const Operands<Element<kKind>> operands,
                           const Element<kKind>* grads, const Unit* packed,
                           const SampleGradients<Element<kKind>> gradients) {
  using T = Element<kKind>;
  constexpr int kUnit = kUnitElements<kKind>;
  DCN_DYNAMIC_SHARED(dynamic);
  auto& shared = *reinterpret_cast<OffsetGradientShared*>(dynamic);
  const DeformConv2dSizes& s = operands.sizes;
  const Packing& packing = sizes.packing;
  const int channels = static_cast<int>(s.channels), width = static_cast<int>(s.width);
  const int out_channels = static_cast<int>(s.out_channels), taps = static_cast<int>(s.taps());

  const int tap = static_cast<int>(blockIdx.x) % taps, rest = static_cast<int>(blockIdx.x) / taps;
  const int deform_group = rest % static_cast<int>(s.deform_groups);
  const int row_begin = rest / static_cast<int>(s.deform_groups) * kProductRows;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;

  if (thread < kProductRows) {
    PackedSample sample{0, 0, 0, 0};
    const int row = row_begin + thread, image = row / sizes.positions;
    if (row < sizes.rows) {
      const auto place = place_sample<float>(operands, image, row % sizes.positions, deform_group, tap);
      sample = pack_sample(place, image, s.pixels(), s.width);
    }
    shared.samples[thread] = sample;
  }

  // Steps of all tiles of channels follow each other.
  const int steps = packing.reduction.steps(), all_steps = steps * sizes.deform_segments * sizes.segment_tiles;
  const auto segment_of = [&](int tile) { return deform_group * sizes.deform_segments + tile / sizes.segment_tiles; };
  int next_tile = 0, next_step = 0, next_stage = 0;
  const auto copy_operands = [&] {
    if (next_tile * steps + next_step < all_steps) {
      const SharedAddress stage = shared_address(shared.stages[next_stage]);
      const int segment = segment_of(next_tile);
      const int group = segment * packing.columns / packing.group_columns;
      const int column = thread % kRowUnits, unit = next_step * kRowUnits + column;
#pragma unroll
      for (int i = 0; i < kProductRows; i += kProductThreads / kRowUnits) {
        const int row = thread / kRowUnits + i;
        const bool exists = row_begin + row < sizes.rows && unit < packing.reduction.units;
        const T* from =
            grads +
            (exists ? int64_t{row_begin + row} * out_channels + group * packing.group_channels + unit * kUnit : 0);
        copy_async(stage + swizzled(row, column), from, exists);
      }
      const Unit* weights = packed + (int64_t{tap} * packing.segments + segment) * packing.segment_units() +
                            next_step * packing.step_units() +
                            next_tile % sizes.segment_tiles * kOffsetColumns * kRowUnits + thread;
      const SharedAddress to = stage + kOperandBytes + thread * kUnitBytes;
#pragma unroll
      for (int i = 0; i < kOffsetColumns * kRowUnits; i += kProductThreads) {
        copy_async(to + i * kUnitBytes, weights + i);
      }
      if (++next_step == steps) next_step = 0, ++next_tile;
      next_stage = next_stage + 1 < kOffsetStages ? next_stage + 1 : 0;
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kOffsetStages - 1; ++i) copy_operands();

  using Product = WarpProduct<kKind, 2, 4, true>;
  float dots[2][2][4] = {};  // of a lane's rows with each corner
  int stage = 0;
  for (int tile = 0; tile < sizes.deform_segments * sizes.segment_tiles; ++tile) {
    Product product;
    for (int step = 0; step < steps; ++step) {
      wait_copies<kOffsetStages - 2>();
      __syncthreads();
      copy_operands();
      const SharedAddress rows = shared_address(shared.stages[stage]);
#pragma unroll kUnrolledSlices < kKind>
      for (int slice = 0; slice < 4; ++slice)
        product.add_slice(rows, warp_row, rows + kOperandBytes, warp_column, slice);
      product.end_step();
      stage = stage + 1 < kOffsetStages ? stage + 1 : 0;
    }
    const int local = tile % sizes.segment_tiles * kOffsetColumns + warp_column + thread % 4 * 8;
    const T* first = operands.images + segment_of(tile) * packing.columns + local;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const PackedSample sample = shared.samples[warp_row + Product::row(i, 2 * half)];
        const T* pixel = first + int64_t{sample.pixel(width)} * channels;
#pragma unroll
        for (int u = 0; u < 8 / kUnit; ++u) {
          if (local + u * kUnit >= packing.columns) continue;
          Unit corner[4];  // loaded together: none waits for another
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const T* from = pixel + (k / 2 * width + k % 2) * channels + u * kUnit;
            corner[k] = sample.exists(k) ? load_unit(from) : Unit{{0, 0, 0, 0}};
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (!sample.exists(k)) continue;
            float values[kUnit];
            to_floats<kKind>(corner[k], values);
#pragma unroll
            for (int e = 0; e < kUnit; ++e) {
              const int c = u * kUnit + e;
              dots[i][half][k] += product.value[i][c / 2][2 * half + c % 2] * values[e];
            }
          }
        }
      }
    }
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sum = sum_lanes(dots[i][half][k], 4);
        if (thread % 4 == 0) shared.dots[warp % 2][warp_row + Product::row(i, 2 * half)][k] = sum;
      }
    }
  }
  __syncthreads();
  if (thread >= kProductRows || row_begin + thread >= sizes.rows) return;
  float dot[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) dot[k] = shared.dots[0][thread][k] + shared.dots[1][thread][k];
  const PackedSample sample = shared.samples[thread];
  const float y = sample.y, x = sample.x;
  const int image = (row_begin + thread) / sizes.positions, position = (row_begin + thread) % sizes.positions;
  const int channel = deform_group * taps + tap;
  gradients.offsets.at(image, 2 * int64_t{channel}, position) =
      static_cast<T>(((1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1])) * sample.modulation);
  gradients.offsets.at(image, 2 * int64_t{channel} + 1, position) =
      static_cast<T>(((1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2])) * sample.modulation);
  if (gradients.masks.data) {
    gradients.masks.at(image, channel, position) =
        static_cast<T>(((1 - y) * ((1 - x) * dot[0] + x * dot[1]) + y * ((1 - x) * dot[2] + x * dot[3])) *
                       modulation_slope(operands, sample.modulation));
  }
}

}  // namespace dcn::cuda
