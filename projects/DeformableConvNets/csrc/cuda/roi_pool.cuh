// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// RoI pooling on CUDA, for every operator whose bins sample an axis-aligned grid: a warp pools one bin of one RoI, its
// lanes share out the channels.
//
// An operator adds a struct Bins<A> that says where a bin samples:
//   part(h, w) is the index of the bin's offset in a plane of the offset tensor;
//   bin(roi, h, w, offset_y, offset_x) is the bin of one row of rois. It has `rows` and `columns`, ranges of samples;
//     row(k) and column(k), the AxisSample of one; `average`, the factor of their sum; `unit_y` and `unit_x`, the
//     pixels that an offset of 1 moves it by; and `cell`, which of the groups of input channels it reads.
#pragma once

#include "launch.cuh"
#include "roi_pool_sizes.h"

namespace dcn::cuda {

constexpr int kBinsPerBlock = 4;
constexpr int kRoiThreads = kBinsPerBlock * kWarp;

// The operands of one call, dense.
template <typename T>
struct RoiPoolOperands {
  RoiPoolSizes sizes;
  const T* images;            // (batch, pixels, input_channels)
  const Accumulate<T>* rois;  // (rois, 5)
  const T* offsets;           // (rois, blocks, 2, parts), or null
  const T* masks;             // (rois, bins), or null
};

// What a warp works on: one bin of one RoI for the channels of one block.
struct RoiPoolWork {
  int64_t roi, block, h, w;

  __device__ __forceinline__ RoiPoolWork(const RoiPoolSizes& s, int64_t index)
      : roi(index / s.bins() / s.blocks),
        block(index / s.bins() % s.blocks),
        h(index % s.bins() / s.out_w),
        w(index % s.out_w) {}

  __device__ __forceinline__ int64_t offset_index(const RoiPoolSizes& s, int64_t part) const {
    return (roi * s.blocks + block) * 2 * s.parts + part;
  }
  __device__ __forceinline__ int64_t mask_index(const RoiPoolSizes& s) const {
    return roi * s.bins() + h * s.out_w + w;
  }
  // Of the block's c-th channel.
  __device__ __forceinline__ int64_t output_index(const RoiPoolSizes& s, int64_t c) const {
    return (roi * s.channels + block * s.block_channels() + c) * s.bins() + h * s.out_w + w;
  }
};

// Index of the first warp, and how many there are.
__device__ __forceinline__ int64_t first_warp() { return int64_t{blockIdx.x} * kBinsPerBlock + threadIdx.x / kWarp; }
__device__ __forceinline__ int64_t warps() { return int64_t{gridDim.x} * kBinsPerBlock; }

template <typename T, template <typename> class Bins>
__device__ __forceinline__ auto read_bin(const RoiPoolOperands<T>& operands, const Bins<Accumulate<T>>& bins,
                                         const RoiPoolWork& work) {
  using A = Accumulate<T>;
  A offset_y = 0, offset_x = 0;
  if (operands.offsets) {
    const T* offset = operands.offsets + work.offset_index(operands.sizes, bins.part(work.h, work.w));
    offset_x = static_cast<A>(offset[0]), offset_y = static_cast<A>(offset[operands.sizes.parts]);
  }
  return bins.bin(operands.rois + 5 * work.roi, work.h, work.w, offset_y, offset_x);
}

// Whether a RoI names an image of the batch. On CUDA an error could not be raised without stopping the device: such a
// RoI gives NaN, and no gradients.
template <typename T>
__device__ __forceinline__ bool on_image(const RoiPoolOperands<T>& operands, int64_t roi) {
  using A = Accumulate<T>;
  const A image = operands.rois[5 * roi];
  return image >= A(0) && image < static_cast<A>(operands.sizes.batch);
}

// Calls visit(index, weight, by_y, by_x) for every neighbour of every sample of the bin, for the block's c-th channel:
// `index` in images, `weight` of the neighbour, and its derivatives by the bin's position.
template <typename T, typename Bin, typename Visit>
__device__ __forceinline__ void for_each_neighbour(const RoiPoolOperands<T>& operands, const RoiPoolWork& work,
                                                   const Bin& bin, int64_t c, const Visit& visit) {
  const RoiPoolSizes& s = operands.sizes;
  const int64_t image = static_cast<int64_t>(operands.rois[5 * work.roi]) * s.pixels();
  const int64_t channel = (work.block * s.block_channels() + c) * s.cells + bin.cell;
  for (int64_t row = bin.rows.begin; row < bin.rows.end; ++row) {
    const auto y = bin.row(row);
    if (!y.exists[0] && !y.exists[1]) continue;
    for (int64_t column = bin.columns.begin; column < bin.columns.end; ++column) {
      const auto x = bin.column(column);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = k / 2, j = k % 2;
        if (!y.exists[i] || !x.exists[j]) continue;
        const int64_t pixel = image + (y.low + i) * s.width + x.low + j;
        visit(pixel * s.input_channels() + channel, y.weight[i] * x.weight[j], y.slope[i] * x.weight[j],
              y.weight[i] * x.slope[j]);
      }
    }
  }
}

template <typename T, template <typename> class Bins>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_pool_kernel(const RoiPoolOperands<T> operands, const Bins<Accumulate<T>> bins, T* output) {
  using A = Accumulate<T>;
  const RoiPoolSizes& s = operands.sizes;
  for (int64_t index = first_warp(); index < s.rois * s.blocks * s.bins(); index += warps()) {
    const RoiPoolWork work(s, index);
    const auto bin = read_bin<T, Bins>(operands, bins, work);
    const bool valid = on_image(operands, work.roi);
    const A mask = operands.masks ? static_cast<A>(operands.masks[work.mask_index(s)]) : A(1);
    for (int64_t c = threadIdx.x % kWarp; c < s.block_channels(); c += kWarp) {
      A sum = valid ? A(0) : static_cast<A>(NAN);
      if (valid) {
        for_each_neighbour(operands, work, bin, c,
                           [&](int64_t at, A weight, A, A) { sum += weight * static_cast<A>(operands.images[at]); });
      }
      output[work.output_index(s, c)] = static_cast<T>(sum * bin.average * mask);
    }
  }
}

// Gradients, zeroed. Null where not needed.
template <typename A>
struct RoiPoolGradients {
  A* images;   // as images
  A* offsets;  // as offsets
  A* masks;    // as masks
};

template <typename T, template <typename> class Bins>
__global__ void __launch_bounds__(kRoiThreads, 1)
    roi_pool_gradient_kernel(const RoiPoolOperands<T> operands, const Bins<Accumulate<T>> bins, const T* grad_output,
                             const RoiPoolGradients<Accumulate<T>> gradients) {
  using A = Accumulate<T>;
  const RoiPoolSizes& s = operands.sizes;
  for (int64_t index = first_warp(); index < s.rois * s.blocks * s.bins(); index += warps()) {
    const RoiPoolWork work(s, index);
    if (!on_image(operands, work.roi)) continue;
    const auto bin = read_bin<T, Bins>(operands, bins, work);
    const A mask = operands.masks ? static_cast<A>(operands.masks[work.mask_index(s)]) : A(1);
    A by_y = 0, by_x = 0, by_mask = 0;
    for (int64_t c = threadIdx.x % kWarp; c < s.block_channels(); c += kWarp) {
      const A grad = static_cast<A>(grad_output[work.output_index(s, c)]) * bin.average;
      for_each_neighbour(operands, work, bin, c, [&](int64_t at, A weight, A slope_y, A slope_x) {
        if (gradients.images) atomicAdd(gradients.images + at, grad * mask * weight);
        const A dot = grad * static_cast<A>(operands.images[at]);
        by_y += dot * slope_y, by_x += dot * slope_x, by_mask += dot * weight;
      });
    }
    by_y = sum_lanes(by_y, kWarp), by_x = sum_lanes(by_x, kWarp), by_mask = sum_lanes(by_mask, kWarp);
    if (threadIdx.x % kWarp != 0) continue;
    // Bins may share an offset, and blocks share the mask.
    if (gradients.offsets) {
      A* offset = gradients.offsets + work.offset_index(s, bins.part(work.h, work.w));
      atomicAdd(offset, by_x * mask * bin.unit_x);
      atomicAdd(offset + s.parts, by_y * mask * bin.unit_y);
    }
    if (gradients.masks) atomicAdd(gradients.masks + work.mask_index(s), by_mask);
  }
}

// Keeps the dense tensors alive that the kernels read.
template <typename T>
struct DenseRoiPoolOperands {
  Tensor input, rois;
  std::optional<Tensor> offset, mask;
  RoiPoolOperands<T> pointers;

  DenseRoiPoolOperands(const RoiPoolSizes& s, const Tensor& given_input, const Tensor& given_rois,
                       const std::optional<Tensor>& given_offset, const std::optional<Tensor>& given_mask)
      : input(dense(given_input, given_input.scalar_type(), MemoryFormat::ChannelsLast)),
        rois(dense(given_rois, accumulate_type(given_input.scalar_type()))) {
    if (given_offset) offset = dense(*given_offset, given_offset->scalar_type());
    if (given_mask) mask = dense(*given_mask, given_mask->scalar_type());
    pointers.sizes = s;
    pointers.images = input.const_data_ptr<T>();
    pointers.rois = rois.const_data_ptr<Accumulate<T>>();
    pointers.offsets = offset ? offset->const_data_ptr<T>() : nullptr;
    pointers.masks = mask ? mask->const_data_ptr<T>() : nullptr;
  }
};

inline int64_t roi_pool_blocks(const RoiPoolSizes& s) {
  return std::min(divide_up(s.rois * s.blocks * s.bins(), kBinsPerBlock), kMaxBlocks);
}

template <typename T, template <typename> class Bins>
Tensor roi_pool_forward(const RoiPoolSizes& s, const Bins<Accumulate<T>>& bins, const Tensor& input, const Tensor& rois,
                        const std::optional<Tensor>& offset, const std::optional<Tensor>& mask) {
  const DeviceScope device(input);
  Tensor output = empty_4d(input, {s.rois, s.channels, s.out_h, s.out_w}, input.scalar_type(), false);
  if (output.numel() == 0) return output;
  const DenseRoiPoolOperands<T> operands(s, input, rois, offset, mask);
  const auto kernel = roi_pool_kernel<T, Bins>;
  DCN_LAUNCH(kernel, roi_pool_blocks(s), kRoiThreads, device.stream(), operands.pointers, bins,
             output.mutable_data_ptr<T>());
  return output;
}

// Gradients of input, offset and mask; empty where not needed.
template <typename T, template <typename> class Bins>
std::tuple<Tensor, Tensor, Tensor> roi_pool_backward(const RoiPoolSizes& s, const Bins<Accumulate<T>>& bins,
                                                     const Tensor& grad, const Tensor& input, const Tensor& rois,
                                                     const std::optional<Tensor>& offset,
                                                     const std::optional<Tensor>& mask, bool need_input,
                                                     bool need_offset) {
  using A = Accumulate<T>;
  const DeviceScope device(input);
  const ScalarType dtype = input.scalar_type();
  Tensor grad_input = empty_result(grad), grad_offset = grad_input, grad_mask = grad_input;
  RoiPoolGradients<A> gradients{};
  if (need_input) {
    grad_input = empty_4d(input, {s.batch, s.input_channels(), s.height, s.width}, accumulate_type(dtype), true);
    torch::stable::zero_(grad_input);
    gradients.images = grad_input.mutable_data_ptr<A>();
  }
  if (need_offset && offset) {
    grad_offset = torch::stable::new_zeros(*offset, offset->sizes(), accumulate_type(dtype));
    gradients.offsets = grad_offset.mutable_data_ptr<A>();
  }
  if (need_offset && mask) {
    grad_mask = torch::stable::new_zeros(*mask, mask->sizes(), accumulate_type(dtype));
    gradients.masks = grad_mask.mutable_data_ptr<A>();
  }
  if (s.rois > 0 && s.channels > 0) {
    const DenseRoiPoolOperands<T> operands(s, input, rois, offset, mask);
    const Tensor grad_output = dense(grad, dtype);
    const auto kernel = roi_pool_gradient_kernel<T, Bins>;
    DCN_LAUNCH(kernel, roi_pool_blocks(s), kRoiThreads, device.stream(), operands.pointers, bins,
               grad_output.const_data_ptr<T>(), gradients);
  }
  return {need_input ? as_dense_as(grad_input, input, dtype) : grad_input, dense(grad_offset, dtype),
          dense(grad_mask, dtype)};
}

}  // namespace dcn::cuda
