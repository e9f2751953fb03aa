// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradients by offset and mask on tensor cores. The gradient by a sample is the product of output gradients and
// weights; offset and mask get their gradients from its four products with the pixels that the sample reads.
#pragma once

#include "cuda/deform_conv2d/tensor_cores/sample_gather.cuh"

namespace dcn::cuda {

constexpr int kOffsetColumns = 64;  // channels of a tile
constexpr int kOffsetStages = 3;
// How many chunks of samples a thread has under way, and how many of these it loads while the tensor cores are busy: as
// many as registers allow.
template <Kind kKind>
constexpr int kOffsetAhead = kKind == Kind::kTF32 ? 1 : 2;
template <Kind kKind>
constexpr int kOffsetEarly = kKind == Kind::kTF32 ? 0 : 1;
constexpr int kOffsetStageBytes = kOperandBytes + kOffsetColumns * kRowBytes;

struct OffsetGradientSizes {
  Packing packing;      // columns are input channels; a stripe lies in one conv group and in one deform group
  int rows, positions;  // positions of all images, and of one
  int deform_stripes;   // stripes of a deform group
  int stripe_tiles;

  DCN_HOST_DEVICE int row_tiles() const { return (rows + kProductRows - 1) / kProductRows; }
};

struct OffsetGradientShared {
  unsigned char stages[kOffsetStages][kOffsetStageBytes];  // each holds output gradients, then weights
  PackedSample samples[kProductRows];
  float dots[2][kProductRows][4];  // products with each corner, for either half of the channels
};

// Blocks that a multiprocessor must hold at least: 12.0 has shared memory for one.
template <Kind kKind>
constexpr int kOffsetBlocks = kKind == Kind::kFloat32 || kCompiledCapability >= 120 ? 1 : 2;

// What a block owns: a tile of positions, a tap and a deform group.
struct OffsetGradientShare {
  int tap, deform_group, row;  // the first one

  __device__ __forceinline__ static OffsetGradientShare of_block(const DeformConv2dSizes& s) {
    const int block = static_cast<int>(block_index()), taps = static_cast<int>(s.taps()), rest = block / taps;
    const int deform_groups = static_cast<int>(s.deform_groups);
    return {block % taps, rest % deform_groups, rest / deform_groups * kProductRows};
  }
};

template <Kind kKind>
__global__ void __launch_bounds__(kProductThreads, kOffsetBlocks<kKind>)
    offset_gradient_kernel(const OffsetGradientSizes sizes, const OperandsView<Element<kKind>> operands,
                           const Element<kKind>* grads, const Chunk* packed,
                           const SampleGradientsView<Element<kKind>> gradients) {
  using T = Element<kKind>;
  constexpr int kChunk = kChunkElements<kKind>;
  DCN_DYNAMIC_SHARED(dynamic);
  auto& shared = *reinterpret_cast<OffsetGradientShared*>(dynamic);
  const DeformConv2dSizes& s = operands.sizes;
  const Packing& packing = sizes.packing;
  const int channels = static_cast<int>(s.channels), width = static_cast<int>(s.width);
  const int out_channels = static_cast<int>(s.out_channels);

  const OffsetGradientShare share = OffsetGradientShare::of_block(s);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp_row = static_cast<int>(threadIdx.x / (2 * kWarp) * 32);
  const int warp_column = static_cast<int>(threadIdx.x / kWarp % 2 * 32);

  if (thread < kProductRows) {
    PackedSample sample{0, 0, 0, 0};
    const int row = share.row + thread, image = row / sizes.positions;
    if (row < sizes.rows) {
      const auto place = place_sample<float>(operands, image, row % sizes.positions, share.deform_group, share.tap);
      sample = pack_sample(place, image, s.pixels(), s.width);
    }
    shared.samples[thread] = sample;
  }

  // The steps go through all stripes, and in each through its tiles of channels.
  const int steps = packing.reduction.steps(), first_stripe = share.deform_group * sizes.deform_stripes;
  const int end_stripe = first_stripe + sizes.deform_stripes;
  int next_stripe = first_stripe, next_column = 0, next_step = 0;
  const int copy_row = static_cast<int>(threadIdx.x / kRowChunks),
            copy_chunk = static_cast<int>(threadIdx.x % kRowChunks);
  const int copy_rows = sizes.rows - share.row - copy_row;
  const Chunk* next_weights =
      packed + (int64_t{share.tap} * packing.stripes + first_stripe) * packing.stripe_chunks() + thread;
  const auto first_output = [&](int stripe) {
    return stripe * packing.columns / packing.group_columns * packing.group_channels;
  };
  const T* next_grads =
      grads + (int64_t{share.row} + copy_row) * out_channels + first_output(first_stripe) + copy_chunk * kChunk;
  const auto copy_operands = [&](int stage) {
    if (next_stripe < end_stripe) {
      const SharedAddress rows = shared_address(shared.stages[stage]) + swizzled(copy_row, copy_chunk);
      const bool chunk_exists = next_step * kRowChunks + copy_chunk < packing.reduction.chunks;
      const T* from = next_grads;
#pragma unroll
      for (int i = 0; i < kProductRows; i += kProductThreads / kRowChunks) {
        const bool exists = chunk_exists && i < copy_rows;
        copy_async(rows + i * kRowBytes, exists ? from : grads, exists);
        from += int64_t{out_channels} * (kProductThreads / kRowChunks);
      }
      const SharedAddress weights = shared_address(shared.stages[stage]) + kOperandBytes + thread * kChunkBytes;
#pragma unroll
      for (int i = 0; i < kOffsetColumns * kRowChunks; i += kProductThreads) {
        copy_async(weights + i * kChunkBytes, next_weights + i);
      }
      next_grads += kRowChunks * kChunk, next_weights += packing.step_chunks();
      if (++next_step == steps) {
        next_step = 0, next_column += kOffsetColumns;
        next_grads -= steps * kRowChunks * kChunk;
        next_weights += kOffsetColumns * kRowChunks;
        if (next_column < packing.padded) {
          next_weights -= packing.stripe_chunks();
        } else {
          next_column = 0, ++next_stripe;
          next_weights -= packing.step_chunks();
          next_grads += first_output(next_stripe) - first_output(next_stripe - 1);
        }
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kOffsetStages - 1; ++i) copy_operands(i);

  using Product = WarpProduct<kKind, 2, 4, true>;
  // A lane has four rows of a tile, and eight channels of each row, in kChunks chunks.
  constexpr int kChunks = 8 / kChunk, kLoads = 4 * kChunks;
  float dots[4][4] = {};  // products of a lane's rows with each corner
  Chunk corner[kOffsetAhead<kKind>][4];
  int stripe = first_stripe, column = 0;  // the tile that is multiplied
  const int lane_column = warp_column + static_cast<int>(threadIdx.x % 4 * 8);
  // Loads the corners of one chunk of one row.
  const auto load = [&](int index) {
    const int local = column + lane_column, row = index / kChunks, skipped = index % kChunks * kChunk;
    PackedSample sample{shared.samples[warp_row + Product::row(row / 2, row % 2 * 2)].place, 0, 0, 0};
    if (local + skipped >= packing.columns) sample.place = 0;
    const T* pixel = operands.images + (int64_t{sample.pixel(width)} * channels + stripe * packing.columns + local);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      corner[index % kOffsetAhead<kKind>][k] =
          sample.exists(k) ? load_chunk(pixel + (k / 2 * width + k % 2) * channels + skipped) : Chunk{{0, 0, 0, 0}};
    }
  };

  int stage = 0;
  while (stripe < end_stripe) {
    Product product;
    for (int step = 0; step < steps; ++step) {
      wait_copies<kOffsetStages - 2>();
      __syncthreads();
      copy_operands(stage > 0 ? stage - 1 : kOffsetStages - 1);
      if (kOffsetEarly<kKind> == 1 && step + 1 == steps) load(0);
      const SharedAddress rows = shared_address(shared.stages[stage]);
#pragma unroll kUnrolledSlices < kKind>
      for (int slice = 0; slice < 4; ++slice)
        product.add_slice(rows, warp_row, rows + kOperandBytes, warp_column, slice);
      product.end_step();
      stage = stage + 1 < kOffsetStages ? stage + 1 : 0;
    }
#pragma unroll
    for (int index = kOffsetEarly<kKind>; index < kOffsetAhead<kKind>; ++index) load(index);
#pragma unroll
    for (int index = 0; index < kLoads; ++index) {
      const int row = index / kChunks, i = row / 2, half = row % 2;
      const PackedSample& sample = shared.samples[warp_row + Product::row(i, 2 * half)];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float values[kChunk], dot = 0;
        to_floats<kKind>(corner[index % kOffsetAhead<kKind>][k], values);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          const int c = index % kChunks * kChunk + e;
          dot += product.value[i][c / 2][2 * half + c % 2] * values[e];
        }
        // An infinite product must not meet what does not exist.
        if (sample.exists(k) && column + lane_column + index % kChunks * kChunk < packing.columns) dots[row][k] += dot;
      }
      if (index + kOffsetAhead<kKind> < kLoads) load(index + kOffsetAhead<kKind>);
    }
    column += kOffsetColumns;
    if (column >= packing.padded) column = 0, ++stripe;
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sum = sum_lanes(dots[2 * i + half][k], 4);
        if (thread % 4 == 0) shared.dots[warp_column / 32][warp_row + Product::row(i, 2 * half)][k] = sum;
      }
    }
  }
  __syncthreads();
  // Computed again, so that the loop need not keep it in registers.
  const OffsetGradientShare result = OffsetGradientShare::of_block(s);
  const int row = result.row + thread;
  if (thread >= kProductRows || row >= sizes.rows) return;
  float dot[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) dot[k] = shared.dots[0][thread][k] + shared.dots[1][thread][k];
  const PackedSample sample = shared.samples[thread];
  const float y = sample.y, x = sample.x;
  const int image = row / sizes.positions, position = row % sizes.positions;
  const int sample_channel = result.deform_group * static_cast<int>(s.taps()) + result.tap;
  gradients.offsets.at(image, 2 * int64_t{sample_channel}, position) =
      static_cast<T>(((1 - x) * (dot[2] - dot[0]) + x * (dot[3] - dot[1])) * sample.modulation);
  gradients.offsets.at(image, 2 * int64_t{sample_channel} + 1, position) =
      static_cast<T>(((1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2])) * sample.modulation);
  if (gradients.masks.data) {
    gradients.masks.at(image, sample_channel, position) =
        static_cast<T>(((1 - y) * ((1 - x) * dot[0] + x * dot[1]) + y * ((1 - x) * dot[2] + x * dot[3])) *
                       modulation_slope(operands, sample.modulation));
  }
}

}  // namespace dcn::cuda
