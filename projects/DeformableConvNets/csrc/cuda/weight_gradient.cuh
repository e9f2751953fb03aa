// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradient by the weight on tensor cores: output gradients by samples, which are gathered again, summed over
// positions. Positions are rows in shared memory, so that operands are read transposed.
#pragma once

#include "sample_gather.cuh"

namespace dcn::cuda {

constexpr int kWeightOutputs = 128;  // of a block's tile
constexpr int kWeightChannels = 64;
constexpr int kWeightStages = 3;

// Positions that are summed over in one step: four fragments.
template <Kind kKind>
constexpr int kWeightPositions = 8 * kUnitElements<kKind>;

// A row of units is cut into parts of 128 bytes, each of which lies in a block of its own. Its units are permuted so
// that both the gather and the transposed reading meet all banks.
template <Kind kKind>
DCN_HOST_DEVICE unsigned position_unit(unsigned position, unsigned unit) {
  const unsigned key = kUnitElements<kKind> == 8 ? position % 8 : position % 4 * 2;
  return (unit / kRowUnits * kWeightPositions<kKind> + position) * kRowBytes + (unit % kRowUnits ^ key) * kUnitBytes;
}

struct WeightGradientSizes {
  Reduction reduction;  // of one group: its segments and units of channels
  int groups, group_channels, group_outputs;
  int conv_channels, conv_outputs;  // of the convolution's groups, of which several may be one group here
  int rows, positions;              // of all images, of one
  int deform_channels;
  int segment_tiles, output_tiles;
  int splits;

  DCN_HOST_DEVICE int channel_tiles() const { return groups * reduction.segments * segment_tiles; }
  DCN_HOST_DEVICE int64_t work() const { return int64_t{channel_tiles()} * reduction.taps * output_tiles * splits; }
};

template <Kind kKind>
struct WeightGradientShared {
  static constexpr int kGradBytes = kWeightPositions<kKind> * kWeightOutputs / kUnitElements<kKind> * kUnitBytes;
  static constexpr int kSampleBytes = kWeightPositions<kKind> * kWeightChannels / kUnitElements<kKind> * kUnitBytes;

  unsigned char grads[kWeightStages][kGradBytes];
  unsigned char samples[2][kSampleBytes];
  KeptSample<kKind> places[2][kWeightPositions<kKind>];
};

// Reads fragments of both operands of 16-bit elements.
template <Kind kKind>
__device__ __forceinline__ void load_transposed(uint32_t (&left)[2][4], uint32_t (&right)[4][2],
                                                const unsigned char* grads, int output, const unsigned char* samples,
                                                int channel, int slice) {
  const unsigned lane = threadIdx.x % kWarp;
  if constexpr (kUnitElements<kKind> == 8) {
    SharedAddress rows[4];
    uint32_t all[4][4];
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned position = slice * 16 + lane % 8 + lane / 16 * 8, unit = output / 8 + 2 * i + lane / 8 % 2;
      rows[i] = shared_address(const_cast<unsigned char*>(grads + position_unit<kKind>(position, unit)));
    }
#pragma unroll
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned position = slice * 16 + lane % 16, unit = channel / 8 + 2 * j + lane / 16;
      rows[2 + j] = shared_address(const_cast<unsigned char*>(samples + position_unit<kKind>(position, unit)));
    }
    load_matrices<4, true>(all, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (i < 2) {
          left[i][k] = all[i][k];
        } else {
          right[2 * (i - 2) + k / 2][k % 2] = all[i][k];
        }
      }
    }
  } else {
    // Elements of 32 bits are read one by one.
    const auto element = [](const unsigned char* rows, unsigned position, unsigned column) {
      return *reinterpret_cast<const uint32_t*>(rows + position_unit<kKind>(position, column / 4) + column % 4 * 4);
    };
    const unsigned g = lane / 4, t = slice * 8 + lane % 4;
#pragma unroll
    for (unsigned i = 0; i < 2; ++i) {
#pragma unroll
      for (unsigned k = 0; k < 4; ++k) left[i][k] = element(grads, t + k / 2 * 4, output + 16 * i + g + k % 2 * 8);
    }
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
#pragma unroll
      for (unsigned k = 0; k < 2; ++k) right[j][k] = element(samples, t + k * 4, channel + 8 * j + g);
    }
  }
}

// A block sums one tap of up to 128 output channels by up to 64 input channels over one part of the positions.
template <Kind kKind>
__global__ void __launch_bounds__(kProductThreads, kKind == Kind::kFloat32 ? 1 : 2)
    weight_gradient_tensor_kernel(const WeightGradientSizes sizes, const Operands<Element<kKind>> operands,
                                  const Element<kKind>* grads, float* partials) {
  using T = Element<kKind>;
  using Shared = WeightGradientShared<kKind>;
  constexpr int kUnit = kUnitElements<kKind>, kPositions = kWeightPositions<kKind>;
  constexpr int kSampleUnits = kWeightChannels / kUnit, kGradUnits = kWeightOutputs / kUnit;
  constexpr int kGathers = kPositions * kSampleUnits / kProductThreads;
  DCN_DYNAMIC_SHARED(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const DeformConv2dSizes& s = operands.sizes;
  const int channels = static_cast<int>(s.channels), width = static_cast<int>(s.width);
  const int out_channels = static_cast<int>(s.out_channels), taps = sizes.reduction.taps;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int warp_output = warp / 2 * 32, warp_channel = warp % 2 * 32;

  // What this block computes.
  int index = static_cast<int>(blockIdx.x);
  const int output_begin = index % sizes.output_tiles * kWeightOutputs;  // in its group
  index /= sizes.output_tiles;
  const int channel_tile = index % sizes.channel_tiles();
  index /= sizes.channel_tiles();
  const int tap = index % taps, split = index / taps;
  const int segment = channel_tile / sizes.segment_tiles;  // counted over all groups
  const int segment_channels = sizes.reduction.units * kUnit;
  const int local = channel_tile % sizes.segment_tiles * kWeightChannels;  // in its segment
  const int channel_begin = segment * segment_channels + local, group = channel_begin / sizes.group_channels;
  const int deform_group = channel_begin / sizes.deform_channels;
  const int steps = (sizes.rows + kPositions - 1) / kPositions;
  const int begin = static_cast<int>(int64_t{steps} * split / sizes.splits);
  const int end = static_cast<int>(int64_t{steps} * (split + 1) / sizes.splits);

  int next_stage = 0;
  const auto copy_grads = [&](int step) {
    if (step < end) {
      const SharedAddress stage = shared_address(shared.grads[next_stage]);
      const int unit = thread % kGradUnits, output = output_begin + unit * kUnit;
#pragma unroll
      for (int i = 0; i < kPositions; i += kProductThreads / kGradUnits) {
        const int position = thread / kGradUnits + i, row = step * kPositions + position;
        const bool exists = row < sizes.rows && output < sizes.group_outputs;
        const T* from = grads + (exists ? int64_t{row} * out_channels + group * sizes.group_outputs + output : 0);
        copy_async(stage + position_unit<kKind>(position, unit), from, exists);
      }
    }
    commit_copies();
    next_stage = next_stage + 1 < kWeightStages ? next_stage + 1 : 0;
  };
  const auto locate = [&](int step) {
    if (thread >= kPositions || step >= end) return;
    KeptSample<kKind> place{};
    const int row = step * kPositions + thread, image = row / sizes.positions;
    if (row < sizes.rows) {
      place =
          keep_sample<kKind>(place_sample<float>(operands, image, row % sizes.positions, deform_group, tap), image, s);
    }
    shared.places[step % 2][thread] = place;
  };
  Interpolation<kKind> interpolation[kGathers];
  const int gather_unit = thread % kSampleUnits, gather_position = thread / kSampleUnits;
  const auto start = [&](int step) {
#pragma unroll
    for (int i = 0; i < kGathers; ++i) {
      const KeptSample<kKind>* place = &shared.places[step % 2][gather_position + i * (kProductThreads / kSampleUnits)];
      interpolation[i].start(place, local + gather_unit * kUnit < segment_channels, operands.images,
                             channel_begin / kUnit + gather_unit, channels / kUnit, width);
    }
  };
  const auto finish = [&](int step) {
#pragma unroll
    for (int i = 0; i < kGathers; ++i) {
      const int position = gather_position + i * (kProductThreads / kSampleUnits);
      store_unit(shared.samples[step % 2] + position_unit<kKind>(position, gather_unit), interpolation[i].finish());
    }
  };

#pragma unroll
  for (int i = 0; i < kWeightStages - 1; ++i) copy_grads(begin + i);
  locate(begin), locate(begin + 1);
  __syncthreads();
  start(begin), finish(begin);

  WarpProduct<kKind, 2, 4, true> product;
  int stage = 0;
  for (int step = begin; step < end; ++step) {
    wait_copies<kWeightStages - 2>();
    __syncthreads();
    copy_grads(step + kWeightStages - 1);
    const bool more = step + 1 < end;
    if (more) start(step + 1);
#pragma unroll kUnrolledSlices < kKind>
    for (int slice = 0; slice < 4; ++slice) {
      uint32_t left[2][4], right[4][2];
      load_transposed<kKind>(left, right, shared.grads[stage], warp_output, shared.samples[step % 2], warp_channel,
                             slice);
      product.add_fragments(left, right);
    }
    product.end_step();
    if (more) finish(step + 1);
    locate(step + 2);
    stage = stage + 1 < kWeightStages ? stage + 1 : 0;
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int output = output_begin + warp_output + product.row(i, e);
      const int out_channel = group * sizes.group_outputs + output;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = warp_channel + product.column(j, e), channel = channel_begin + column;
        if (output >= sizes.group_outputs || local + column >= segment_channels) continue;
        if (out_channel / sizes.conv_outputs != channel / sizes.conv_channels) continue;
        partials[((int64_t{split} * out_channels + out_channel) * taps + tap) * sizes.conv_channels +
                 channel % sizes.conv_channels] = product.value[i][j][e];
      }
    }
  }
}

// Adds up partial gradients (splits, out_channels, taps, channels) in their order, to the same without splits if
// `channels_last`, or else to (out_channels, channels, taps).
template <typename T>
__global__ void __launch_bounds__(256, 1)
    finish_weight_gradient_kernel(const Accumulate<T>* partials, const int64_t splits, const int64_t out_channels,
                                  const int64_t taps, const int64_t channels, const bool channels_last, T* gradient) {
  const int64_t count = out_channels * taps * channels;
  for (int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x; at < count; at += int64_t{gridDim.x} * 256) {
    const int64_t channel = at % channels, tap = at / channels % taps, output = at / channels / taps;
    Accumulate<T> sum = 0;
    for (int64_t k = 0; k < splits; ++k) sum += partials[k * count + at];
    gradient[channels_last ? at : (output * channels + channel) * taps + tap] = static_cast<T>(sum);
  }
}

}  // namespace dcn::cuda
