// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradients of deform_conv2d without tensor cores, for every type and size: implicit matrix products, as in
// forward.cuh.
#pragma once

#include "cuda/deform_conv2d/sampling/sample_lists.cuh"
#include "cuda/deform_conv2d/simt/samples.cuh"

namespace dcn::cuda {

// A block computes the gradients of up to kTile pixels of one image by up to kTile channels of a segment.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    input_gradient_kernel(const OperandsView<T> operands, const SampleListsView<Accumulate<T>> lists,
                          const PlanesView<const T> grad_output, const PlanesView<T> grad_input) {
  using A = Accumulate<T>;
  struct Shared {
    Operand<A> weights, grads;
  };
  DCN_SHARED(Shared, shared);
  const DeformConv2dSizes& s = operands.sizes;
  const int64_t pixel_tiles = divide_up(s.pixels(), kTile), segment_tiles = divide_up(operands.segment, kTile);
  const int64_t channel_tiles = s.channels / operands.segment * segment_tiles;

  for (int64_t work = blockIdx.x; work < lists.images * pixel_tiles * channel_tiles; work += gridDim.x) {
    const int64_t tile = work % channel_tiles, image = work / channel_tiles / pixel_tiles;
    const int64_t pixel_begin = work / channel_tiles % pixel_tiles * kTile;
    const int64_t segment = tile / segment_tiles * operands.segment, end = segment + operands.segment;
    const int64_t begin = segment + tile % segment_tiles * kTile, group = begin / s.group_channels();
    const int64_t out_begin = group * s.group_out_channels(), out_end = out_begin + s.group_out_channels();
    Product<A> product;
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      for (int64_t o = out_begin; o < out_end; o += kDepth) {
        fill_along_tile(shared.weights, [&](int k, int i) {
          return o + k < out_end && begin + i < end
                     ? static_cast<A>(operands.weights.at(o + k, begin - group * s.group_channels() + i, tap))
                     : A(0);
        });
        fill_along_depth(shared.grads, [&](int k, int j) {
          A sum = 0;
          if (o + k >= out_end || pixel_begin + j >= s.pixels()) return sum;
          const auto pixel = static_cast<int32_t>(pixel_begin + j), width = static_cast<int32_t>(s.width);
          const PixelSamples<A> samples =
              lists.of_pixel(s, static_cast<int32_t>(image), static_cast<int32_t>(begin / s.deform_channels()),
                             static_cast<int32_t>(tap), pixel / width, pixel % width);
          for (int32_t at = 0; at < samples.count(); ++at) {
            const ListEntry<A> entry = samples.entry(lists.samples, at);
            sum += entry.weight * static_cast<A>(grad_output.at(lists.first_image + entry.position / s.positions(),
                                                                o + k, entry.position % s.positions()));
          }
          return sum;
        });
        __syncthreads();
        product.add(shared.weights, shared.grads);
        __syncthreads();
      }
    }
    for (int i = 0; i < kEach; ++i) {
      const int64_t c = begin + Product<A>::row(i);
      for (int j = 0; j < kEach; ++j) {
        const int64_t pixel = pixel_begin + Product<A>::column(j);
        if (c < end && pixel < s.pixels()) {
          grad_input.at(lists.first_image + image, c, pixel) = static_cast<T>(product.value[i][j]);
        }
      }
    }
  }
}

DCN_HOST_DEVICE int64_t input_gradient_work(const DeformConv2dSizes& s, int64_t segment, int64_t images) {
  return images * divide_up(s.pixels(), kTile) * s.channels / segment * divide_up(segment, kTile);
}

DCN_HOST_DEVICE int64_t sample_gradient_work(const DeformConv2dSizes& s) {
  return position_tiles(s) * s.deform_groups * s.taps();
}

// A block owns one tap of a deform group for a tile of positions, with all of that group's channels: it alone computes
// their offset and mask gradients. For up to kTile channels at a time, the gradient by the samples is the product of
// grad_output and weights; it is dotted with the pixels.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    sample_gradient_kernel(const OperandsView<T> operands, const PlanesView<const T> grad_output,
                           const SampleGradientsView<T> gradients) {
  using A = Accumulate<T>;
  struct Shared {
    Operand<A> grads, weights;
    Corners<A> corners[kTile];
    CornerDerivatives<A> derivatives[kTile];
  };
  DCN_SHARED(Shared, shared);
  const DeformConv2dSizes& s = operands.sizes;

  for (int64_t work = blockIdx.x; work < sample_gradient_work(s); work += gridDim.x) {
    const int64_t tap = work % s.taps(), deform_group = work / s.taps() % s.deform_groups;
    const PositionTile tile = position_tile(s, work / s.taps() / s.deform_groups);
    const T* image = operands.image(tile.image);
    // The barriers below lie between this and the first use.
    locate(operands, tile, deform_group, tap, shared.corners, shared.derivatives);

    A by_y[kEach] = {}, by_x[kEach] = {}, by_mask[kEach] = {};
    const int64_t last = (deform_group + 1) * s.deform_channels();
    for (int64_t segment = deform_group * s.deform_channels(); segment < last; segment += operands.segment) {
      const int64_t group = segment / s.group_channels(), group_begin = group * s.group_channels();
      const int64_t end = segment + operands.segment;
      const int64_t out_begin = group * s.group_out_channels(), out_end = out_begin + s.group_out_channels();
      for (int64_t begin = segment; begin < end; begin += kTile) {
        Product<A> product;
        for (int64_t o = out_begin; o < out_end; o += kDepth) {
          fill_along_tile(shared.grads, [&](int k, int i) {
            const bool exists = o + k < out_end && i < tile.count;
            return exists ? static_cast<A>(grad_output.at(tile.image, o + k, tile.begin + i)) : A(0);
          });
          fill_along_tile(shared.weights, [&](int k, int j) {
            const bool exists = o + k < out_end && begin + j < end;
            return exists ? static_cast<A>(operands.weights.at(o + k, begin - group_begin + j, tap)) : A(0);
          });
          __syncthreads();
          product.add(shared.grads, shared.weights);
          __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const Corners<A>& corners = shared.corners[Product<A>::row(i)];
          const CornerDerivatives<A>& derivatives = shared.derivatives[Product<A>::row(i)];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int64_t pixel = corners.pixel[k];
            if (pixel < 0) continue;
            A dot = 0;
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
              const int64_t c = begin + Product<A>::column(j);
              if (c < end) dot += product.value[i][j] * static_cast<A>(image[pixel * s.channels + c]);
            }
            by_y[i] += dot * derivatives.by_y[k];
            by_x[i] += dot * derivatives.by_x[k];
            by_mask[i] += dot * derivatives.by_mask[k];
          }
        }
      }
    }

    const int64_t channel = deform_group * s.taps() + tap;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const A sum_y = sum_lanes(by_y[i], kSide), sum_x = sum_lanes(by_x[i], kSide);
      const A sum_mask = sum_lanes(by_mask[i], kSide);
      if (Product<A>::row(i) >= tile.count || Product<A>::column(0) != 0) continue;
      const int64_t position = tile.begin + Product<A>::row(i);
      gradients.offsets.at(tile.image, 2 * channel, position) = static_cast<T>(sum_y);
      gradients.offsets.at(tile.image, 2 * channel + 1, position) = static_cast<T>(sum_x);
      if (gradients.masks.data) gradients.masks.at(tile.image, channel, position) = static_cast<T>(sum_mask);
    }
    __syncthreads();
  }
}

// The work of one split of the positions: tiles of the weight.
template <typename T>
DCN_HOST_DEVICE int64_t weight_tiles(const OperandsView<T>& operands) {
  const DeformConv2dSizes& s = operands.sizes;
  const int64_t channel_tiles = s.channels / operands.segment * divide_up(operands.segment, kTile);
  return channel_tiles * s.taps() * divide_up(s.group_out_channels(), kTile);
}

// A block sums one tap of up to kTile output channels by up to kTile input channels over one of `splits` splits of the
// positions, into `partials` (splits, out_channels, taps, group_channels).
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<T>)
    weight_gradient_kernel(const OperandsView<T> operands, const PlanesView<const T> grad_output, const int64_t splits,
                           Accumulate<T>* partials) {
  using A = Accumulate<T>;
  struct Shared {
    Operand<A> grads, samples;
    Corners<A> corners[kTile];
  };
  DCN_SHARED(Shared, shared);
  const DeformConv2dSizes& s = operands.sizes;
  const int64_t out_tiles = divide_up(s.group_out_channels(), kTile);
  const int64_t segment_tiles = divide_up(operands.segment, kTile);

  for (int64_t work = blockIdx.x; work < weight_tiles(operands) * splits; work += gridDim.x) {
    const int64_t split = work / weight_tiles(operands), weight_tile = work % weight_tiles(operands);
    const int64_t tap = weight_tile / out_tiles % s.taps(), channel_tile = weight_tile / out_tiles / s.taps();
    const int64_t segment = channel_tile / segment_tiles * operands.segment, end = segment + operands.segment;
    const int64_t begin = segment + channel_tile % segment_tiles * kTile;
    const int64_t group = begin / s.group_channels();
    const int64_t out_begin = group * s.group_out_channels() + weight_tile % out_tiles * kTile;
    const int64_t out_end = (group + 1) * s.group_out_channels();

    Product<A> product;
    for (int64_t t = position_tiles(s) * split / splits; t < position_tiles(s) * (split + 1) / splits; ++t) {
      const PositionTile tile = position_tile(s, t);
      const T* image = operands.image(tile.image);
      locate<T, A>(operands, tile, begin / s.deform_channels(), tap, shared.corners, nullptr);
      __syncthreads();
      for (int p = 0; p < tile.count; p += kDepth) {
        fill_along_depth(shared.grads, [&](int k, int i) {
          const bool exists = p + k < tile.count && out_begin + i < out_end;
          return exists ? static_cast<A>(grad_output.at(tile.image, out_begin + i, tile.begin + p + k)) : A(0);
        });
        fill_along_tile(shared.samples, [&](int k, int j) {
          return begin + j < end ? read_sample(image + begin + j, s.channels, shared.corners[p + k]) : A(0);
        });
        __syncthreads();
        product.add(shared.grads, shared.samples);
        __syncthreads();
      }
    }
    for (int i = 0; i < kEach; ++i) {
      const int64_t o = out_begin + Product<A>::row(i);
      for (int j = 0; j < kEach; ++j) {
        const int64_t c = begin + Product<A>::column(j);
        if (o >= out_end || c >= end) continue;
        partials[((split * s.out_channels + o) * s.taps() + tap) * s.group_channels() + c -
                 group * s.group_channels()] = product.value[i][j];
      }
    }
  }
}

}  // namespace dcn::cuda
