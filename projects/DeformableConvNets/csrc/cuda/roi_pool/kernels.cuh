// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CUDA: the kernels. A warp pools one bin after the other, see bins.cuh.
#pragma once

#include "cuda/roi_pool/bins.cuh"

namespace dcn::cuda {

// How many channels a pass has that begins with channel `pass` of a channel set.
__device__ __forceinline__ int pass_channels(const RoiPoolSizes& s, int64_t pass) {
  return static_cast<int>(s.set_channels() - pass < kPassChannels ? s.set_channels() - pass : kPassChannels);
}

// Blocks that a multiprocessor must hold at least. The compiler may use as many registers as that leaves, and then
// spills none.
template <typename T>
constexpr int kPoolBlocks = sizeof(T) == 8 ? 3 : 5;
template <typename T>
constexpr int kPoolGradientBlocks = sizeof(T) == 8 ? 3 : 4;

// `output` is (rois, channels, bins). A tile of it goes through shared memory, so that a channel's bins are written
// together.
template <typename T, template <typename> class Geometry, int kVector>
__global__ void __launch_bounds__(kRoiThreads, kPoolBlocks<T>)
    roi_pool_kernel(const RoiPoolOperandsView<T> operands, const Geometry<Accumulate<T>> geometry, T* output) {
  using A = Accumulate<T>;
  using Lane = LaneChannels<kVector>;
  struct Shared {
    BinLists<A> lists[kBinTile];
    A sums[kBinTile][kPassChannels + 4];  // the padding puts neighbouring bins into different banks
  };
  DCN_SHARED(Shared, shared);
  const RoiPoolSizes& s = operands.sizes;
  for (int64_t work = blockIdx.x; work < bin_tiles(s); work += gridDim.x) {
    const BinTile tile(s, work);
    const bool valid = operands.on_image(tile.roi);
    for (int64_t pass = 0; pass < s.set_channels(); pass += kPassChannels) {
      const int channels = pass_channels(s, pass);
      bool more = valid;
      for (int64_t pair = 0; more; ++pair) {
        more = list_bins<T, Geometry>(operands, geometry, tile, pair, shared.lists);
        for (int b = threadIdx.x / kWarp; b < tile.count; b += kRoiWarps) {
          const T* image = operands.images + shared.lists[b].image + pass;
          A sum[Lane::kVectors][kVector] = {};
          for_each_pixel<(Lane::kVectors > 1 ? 1 : 2)>(
              shared.lists[b], [&](const PixelLine<A>& row, const PixelLine<A>& column) {
                const T* pixel = image + row.at + column.at;
                const A weight = row.weight * column.weight;
#pragma unroll
                for (int v = 0; v < Lane::kVectors; ++v) {
                  const int c = Lane::channel(v);
                  if (c >= channels) continue;
                  const auto read = *reinterpret_cast<const Vector<T, kVector>*>(pixel + c);
#pragma unroll
                  for (int i = 0; i < kVector; ++i) sum[v][i] += weight * static_cast<A>(read.value[i]);
                }
              });
#pragma unroll
          for (int v = 0; v < Lane::kVectors; ++v) {
            A* to = shared.sums[b] + Lane::channel(v);
#pragma unroll
            for (int i = 0; i < kVector; ++i) to[i] = pair ? to[i] + sum[v][i] : sum[v][i];
          }
        }
      }
      __syncthreads();
      const int b = threadIdx.x % kBinTile;
      if (b < tile.count) {
        const int64_t bin = tile.begin + b;
        const A scale = valid ? shared.lists[b].scale() : static_cast<A>(NAN);
        T* to = output + (tile.roi * s.channels + tile.channel_set * s.set_channels() + pass) * s.bins() + bin;
#pragma unroll 4
        for (int c = threadIdx.x / kBinTile; c < channels; c += kRoiThreads / kBinTile) {
          to[c * s.bins()] = static_cast<T>(valid ? shared.sums[b][c] * scale : scale);
        }
      }
      __syncthreads();
    }
  }
}

// The gradient by the output. Either its channels or its bins have stride 1.
template <typename T>
struct RoiPoolGradView {
  const T* values;
  int64_t channel_stride, bin_stride;  // a RoI has channels * bins values
};

// Where gradients go. Pointers are null where gradients are not needed.
template <typename T>
struct RoiPoolGradientsView {
  using A = Accumulate<T>;
  Sums<A> images;    // shaped as the operands' images
  const int* codes;  // exponents of the output's gradient and of the masks, where images are summed in fixed point
  int log2_terms;
  T* offsets;  // shaped as the offsets, where every bin has an offset of its own
  T* masks;    // shaped as the masks, where there is one channel set
  A* bins;     // (rois, channel_sets, 3, bins), by x, y and mask, where gradients of bins are summed later

  __device__ __forceinline__ bool needs_samples() const { return offsets || masks || bins; }
};

// Puts the output gradients of a tile of bins into shared memory, for `channels` channels from `first` on.
template <typename T, int kVector, int kVectors>
__device__ __forceinline__ void read_grad(const RoiPoolGradView<T>& grad_output, const RoiPoolSizes& s,
                                          const BinTile& tile, int64_t first, int channels,
                                          Vector<T, kVector> (&grad)[kBinTile][kVectors]) {
  const bool bins_side_by_side = grad_output.bin_stride == 1;
  const T* from = grad_output.values + tile.roi * s.channels * s.bins() + first * grad_output.channel_stride +
                  tile.begin * grad_output.bin_stride;
  for (int i = threadIdx.x; i < kBinTile * kPassChannels; i += kRoiThreads) {
    const int b = bins_side_by_side ? i % kBinTile : i / kPassChannels;
    const int c = bins_side_by_side ? i / kBinTile : i % kPassChannels;
    if (b >= tile.count || c >= channels) continue;
    grad[b][c / kVector].value[c % kVector] = from[c * grad_output.channel_stride + b * grad_output.bin_stride];
  }
}

// Writes the gradients of a tile's bins by x, y and mask. They are zero for a RoI that names no image.
template <typename T>
__device__ __forceinline__ void write_bins(const RoiPoolGradientsView<T>& gradients, const RoiPoolSizes& s,
                                           const BinTile& tile, const Accumulate<T> (&by)[kBinTile][3]) {
  const int b = threadIdx.x;
  if (b >= tile.count) return;
  const int64_t bin = tile.begin + b, row = tile.roi * s.channel_sets + tile.channel_set;
  if (gradients.offsets) {
    gradients.offsets[row * 2 * s.offset_cells + bin] = static_cast<T>(by[b][0]);
    gradients.offsets[(row * 2 + 1) * s.offset_cells + bin] = static_cast<T>(by[b][1]);
  }
  if (gradients.masks) gradients.masks[tile.roi * s.bins() + bin] = static_cast<T>(by[b][2]);
  if (gradients.bins) {
    for (int i = 0; i < 3; ++i) gradients.bins[(row * 3 + i) * s.bins() + bin] = by[b][i];
  }
}

template <typename T, template <typename> class Geometry, int kVector>
__global__ void __launch_bounds__(kRoiThreads, kPoolGradientBlocks<T>)
    roi_pool_gradient_kernel(const RoiPoolOperandsView<T> operands, const Geometry<Accumulate<T>> geometry,
                             const RoiPoolGradView<T> grad_output, const RoiPoolGradientsView<T> gradients) {
  using A = Accumulate<T>;
  using Lane = LaneChannels<kVector>;
  struct Shared {
    BinLists<A> lists[kBinTile];
    Vector<T, kVector> grad[kBinTile][kPassChannels / kVector + 1];
    A by[kBinTile][3];
  };
  DCN_SHARED(Shared, shared);
  const RoiPoolSizes& s = operands.sizes;
  FixedPoint<A> point;
  if (gradients.images.fixed) point = FixedPoint<A>(gradients.codes, gradients.log2_terms);
  const bool adds = gradients.images.needed() && point.finite;

  for (int64_t work = blockIdx.x; work < bin_tiles(s); work += gridDim.x) {
    const BinTile tile(s, work);
    const bool valid = operands.on_image(tile.roi);
    if (threadIdx.x < kBinTile)
      shared.by[threadIdx.x][0] = shared.by[threadIdx.x][1] = shared.by[threadIdx.x][2] = A(0);
    for (int64_t pass = 0; valid && pass < s.set_channels(); pass += kPassChannels) {
      const int channels = pass_channels(s, pass);
      read_grad(grad_output, s, tile, tile.channel_set * s.set_channels() + pass, channels, shared.grad);
      __syncthreads();
      bool more = true;
      for (int64_t pair = 0; more; ++pair) {
        more = list_bins<T, Geometry>(operands, geometry, tile, pair, shared.lists);
        for (int b = threadIdx.x / kWarp; b < tile.count; b += kRoiWarps) {
          const int64_t image = shared.lists[b].image + pass;
          const A scale = shared.lists[b].scale();
          A grad[Lane::kVectors][kVector] = {};
#pragma unroll
          for (int v = 0; v < Lane::kVectors; ++v) {
            const int c = Lane::channel(v);
            if (c >= channels) continue;
#pragma unroll
            for (int i = 0; i < kVector; ++i) grad[v][i] = static_cast<A>(shared.grad[b][c / kVector].value[i]);
          }
          A by_x = 0, by_y = 0, by_mask = 0;
          for_each_pixel<1>(shared.lists[b], [&](const PixelLine<A>& row, const PixelLine<A>& column) {
            const int64_t pixel = image + row.at + column.at;
            const A weight = row.weight * column.weight;
            A dot = 0;
#pragma unroll
            for (int v = 0; v < Lane::kVectors; ++v) {
              const int c = Lane::channel(v);
              if (c >= channels) continue;
              if (adds) {
                A terms[kVector];
#pragma unroll
                for (int i = 0; i < kVector; ++i) terms[i] = scale * weight * grad[v][i];
                gradients.images.add(pixel + c, terms, point);
              }
              if (gradients.needs_samples()) {
                const auto read = *reinterpret_cast<const Vector<T, kVector>*>(operands.images + pixel + c);
#pragma unroll
                for (int i = 0; i < kVector; ++i) dot += grad[v][i] * static_cast<A>(read.value[i]);
              }
            }
            by_x += row.weight * column.slope * dot;
            by_y += row.slope * column.weight * dot;
            by_mask += weight * dot;
          });
          if (!gradients.needs_samples()) continue;
          by_x = sum_lanes(by_x, kWarp), by_y = sum_lanes(by_y, kWarp), by_mask = sum_lanes(by_mask, kWarp);
          if (threadIdx.x % kWarp != 0) continue;
          shared.by[b][0] += by_x * scale * shared.lists[b].columns.unit;
          shared.by[b][1] += by_y * scale * shared.lists[b].rows.unit;
          shared.by[b][2] += by_mask * shared.lists[b].average();
        }
      }
      __syncthreads();
    }
    write_bins(gradients, s, tile, shared.by);  // a thread reads what it alone clears for the next tile
  }
}

// Sums `by_bin` (rois, channel_sets, 3, bins), in order, where bins share an offset or channel sets share a mask.
// `offsets` and `masks` are null where not needed.
template <typename T, template <typename> class Geometry>
__global__ void __launch_bounds__(kRoiThreads, 1)
    sum_bins_kernel(const RoiPoolSizes s, const Geometry<Accumulate<T>> geometry, const Accumulate<T>* by_bin,
                    T* offsets, T* masks) {
  using A = Accumulate<T>;
  const int64_t threads = int64_t{gridDim.x} * kRoiThreads, thread = int64_t{blockIdx.x} * kRoiThreads + threadIdx.x;
  if (offsets) {
    for (int64_t i = thread; i < s.rois * s.channel_sets * 2 * s.offset_cells; i += threads) {
      const int64_t cell = i % s.offset_cells, axis = i / s.offset_cells % 2, row = i / s.offset_cells / 2;
      const A* plane = by_bin + (row * 3 + axis) * s.bins();
      A sum = 0;
      for (int64_t bin = 0; bin < s.bins(); ++bin) {
        if (geometry.offset_cell(bin / s.out_w, bin % s.out_w) == cell) sum += plane[bin];
      }
      offsets[i] = static_cast<T>(sum);
    }
  }
  if (masks) {
    for (int64_t i = thread; i < s.rois * s.bins(); i += threads) {
      const int64_t bin = i % s.bins(), roi = i / s.bins();
      A sum = 0;
      for (int64_t set = 0; set < s.channel_sets; ++set) {
        sum += by_bin[((roi * s.channel_sets + set) * 3 + 2) * s.bins() + bin];
      }
      masks[i] = static_cast<T>(sum);
    }
  }
}

}  // namespace dcn::cuda
