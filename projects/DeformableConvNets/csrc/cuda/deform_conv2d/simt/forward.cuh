// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// deform_conv2d without tensor cores, for every type and size: an implicit matrix product. Samples are gathered into
// shared memory where they are multiplied; no column matrix exists.
#pragma once

#include "cuda/deform_conv2d/simt/samples.cuh"

namespace dcn::cuda {

DCN_HOST_DEVICE int64_t forward_work(const DeformConv2dSizes& s) {
  return position_tiles(s) * s.groups * divide_up(s.group_out_channels(), kTile);
}

// A block multiplies the weights of up to kTile output channels of one conv group by the samples of a tile of
// positions.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    forward_kernel(const OperandsView<T> operands, const T* bias, const PlanesView<T> output) {
  using A = Accumulate<T>;
  struct Shared {
    Operand<A> weights, samples;
    Corners<A> corners[kTile];
  };
  DCN_SHARED(Shared, shared);
  const DeformConv2dSizes& s = operands.sizes;
  const int64_t out_tiles = divide_up(s.group_out_channels(), kTile);

  for (int64_t work = blockIdx.x; work < forward_work(s); work += gridDim.x) {
    const PositionTile tile = position_tile(s, work / out_tiles / s.groups);
    const int64_t group = work / out_tiles % s.groups;
    const int64_t out_begin = group * s.group_out_channels() + work % out_tiles * kTile;
    const int64_t out_end = (group + 1) * s.group_out_channels();
    const T* image = operands.image(tile.image);
    const int64_t group_begin = group * s.group_channels();
    Product<A> product;
    for (int64_t begin = group_begin; begin < group_begin + s.group_channels(); begin += operands.segment) {
      for (int64_t tap = 0; tap < s.taps(); ++tap) {
        locate<T, A>(operands, tile, begin / s.deform_channels(), tap, shared.corners, nullptr);
        __syncthreads();
        for (int64_t c = begin; c < begin + operands.segment; c += kDepth) {
          const int64_t depth = begin + operands.segment - c;
          fill_along_depth(shared.weights, [&](int k, int i) {
            const bool exists = k < depth && out_begin + i < out_end;
            return exists ? static_cast<A>(operands.weights.at(out_begin + i, c - group_begin + k, tap)) : A(0);
          });
          fill_along_depth(shared.samples, [&](int k, int j) {
            return k < depth ? read_sample(image + c + k, s.channels, shared.corners[j]) : A(0);
          });
          __syncthreads();
          product.add(shared.weights, shared.samples);
          __syncthreads();
        }
      }
    }
    for (int i = 0; i < kEach; ++i) {
      const int64_t o = out_begin + Product<A>::row(i);
      for (int j = 0; j < kEach; ++j) {
        if (o >= out_end || Product<A>::column(j) >= tile.count) continue;
        const A value = product.value[i][j] + (bias ? static_cast<A>(bias[o]) : A(0));
        output.at(tile.image, o, tile.begin + Product<A>::column(j)) = static_cast<T>(value);
      }
    }
  }
}

}  // namespace dcn::cuda
