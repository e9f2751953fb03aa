// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Offsets and mask as the caller holds them: contiguous, channels_last, or views of a larger tensor. They are never
// copied as a whole. Where needed, those of one tile are put in order, in the cache.
#pragma once

#include <algorithm>

#include "cpu/isa/kernels.h"
#include "cpu/memory.h"

namespace dcn::cpu {

// A (batch, planes, out_h, out_w) tensor in the dtype of the computation, or bfloat16 for float32, in which a plane's
// values or a position's values lie side by side.
template <typename T>
class PlanesTensor {
 public:
  explicit PlanesTensor(const Tensor& tensor) : tensor_(legible(tensor)), values_(tensor_.const_data_ptr()) {
    image_ = tensor_.stride(0), plane_ = tensor_.stride(1), position_ = position_stride(tensor_);
  }

  int64_t planes() const { return tensor_.size(1); }
  bool in_order() const { return position_ == 1 && !is_bfloat16(tensor_); }
  int64_t plane_stride() const { return plane_; }
  const T* at(int64_t n, int64_t position) const { return static_cast<const T*>(values_) + place(n, position); }

  // Writes positions [begin, begin + count) of image n, plane by plane.
  void put_in_order(int64_t n, int64_t begin, int64_t count, T* to, int64_t to_stride) const {
    if (is_bfloat16(tensor_)) return widen(n, begin, count, to, to_stride);
    const T* from = at(n, begin);
    if (!in_order()) return kernels<T>().transpose(from, position_, count, planes(), to, to_stride);
    for (int64_t plane = 0; plane < planes(); ++plane) {
      std::copy_n(from + plane * plane_, count, to + plane * to_stride);
    }
  }

 private:
  // Only float32 is computed from bfloat16, which is its upper half.
  static bool is_bfloat16(const Tensor& tensor) {
    return sizeof(T) == sizeof(float) && tensor.scalar_type() == ScalarType::BFloat16;
  }
  static void widen(const uint16_t* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(__builtin_bit_cast(float, uint32_t{from[i]} << 16));
  }
  void widen(int64_t n, int64_t begin, int64_t count, T* to, int64_t to_stride) const {
    const uint16_t* from = static_cast<const uint16_t*>(values_) + place(n, begin);
    if (position_ == 1) {
      for (int64_t plane = 0; plane < planes(); ++plane) widen(from + plane * plane_, count, to + plane * to_stride);
      return;
    }
    const Scratch<T> rows = scratch<T>(count * planes());
    for (int64_t p = 0; p < count; ++p) widen(from + p * position_, planes(), rows.get() + p * planes());
    kernels<T>().transpose(rows.get(), planes(), count, planes(), to, to_stride);
  }

  int64_t place(int64_t n, int64_t position) const { return n * image_ + position * position_; }
  // The distance of neighbouring positions, 0 where it is not the same everywhere.
  static int64_t position_stride(const Tensor& tensor) {
    const int64_t height = tensor.size(2), width = tensor.size(3);
    if (width == 1) return height == 1 ? 1 : tensor.stride(2);
    return height == 1 || tensor.stride(2) == width * tensor.stride(3) ? tensor.stride(3) : 0;
  }
  static Tensor legible(const Tensor& tensor) {
    const bool as_is = tensor.scalar_type() == scalar_type_of<T>() || is_bfloat16(tensor);
    const Tensor cast = as_is ? tensor : torch::stable::to(tensor, scalar_type_of<T>());
    const int64_t position = position_stride(cast);
    return position == 1 || (position > 0 && cast.stride(1) == 1) ? cast : torch::stable::contiguous(cast);
  }

  Tensor tensor_;
  const void* values_;
  int64_t image_, plane_, position_;
};

template <typename T>
struct OffsetTensors {
  DeformConv2dSizes sizes;
  PlanesTensor<T> offset;
  std::optional<PlanesTensor<T>> mask;
  bool logits;

  OffsetTensors(const DeformConv2dSizes& s, const SamplingInputs& given)
      : sizes(s), offset(given.offset), logits(given.branch_output.has_value()) {
    if (given.mask) mask.emplace(*given.mask);
  }
  bool mask_as_given() const { return !mask || (mask->in_order() && !logits); }
};

// The offsets and the modulation of a tile of output positions.
template <typename T>
class TileOffsets {
 public:
  TileOffsets(const OffsetTensors<T>& offsets, int64_t tile)
      : given_(offsets),
        stride_(divide_up(tile, kMostLanes) * kMostLanes + 8),  // not a power of two, or planes would share cache sets
        start_(scratch<T>(2 * stride_)),
        offset_buffer_(scratch<T>(offsets.offset.in_order() ? 0 : offsets.offset.planes() * stride_)),
        mask_buffer_(scratch<T>(offsets.mask_as_given() ? 0 : offsets.mask->planes() * stride_)) {}

  // Goes to positions [begin, begin + count) of image n.
  void load(int64_t n, int64_t begin, int64_t count) {
    const DeformConv2dSizes& s = given_.sizes;
    for (int64_t p = 0, h = begin / s.out_w, w = begin % s.out_w; p < stride_; ++p) {
      start_[p] = p < count ? tap_y<T>(s, h, 0) : T(0);
      start_[stride_ + p] = p < count ? tap_x<T>(s, w, 0) : T(0);
      if (++w == s.out_w) w = 0, ++h;
    }
    offset_ = given_.offset.in_order() ? given_.offset.at(n, begin)
                                       : put_in_order(given_.offset, n, begin, count, offset_buffer_.get());
    if (!given_.mask) return;
    mask_ = given_.mask_as_given() ? given_.mask->at(n, begin)
                                   : put_in_order(*given_.mask, n, begin, count, mask_buffer_.get());
    for (int64_t plane = 0; given_.logits && plane < given_.mask->planes(); ++plane) {
      kernels<T>().sigmoid(mask_buffer_.get() + plane * stride_, count);
    }
  }

  // Samples of one tap for the first samples.count positions of the tile.
  void locate(int64_t deform_group, int64_t tap, const TapSamples<T>& samples) const {
    const int64_t plane = deform_group * given_.sizes.taps() + tap;
    const int64_t offset_stride = given_.offset.in_order() ? given_.offset.plane_stride() : stride_;
    const T* y = offset_ + 2 * plane * offset_stride;
    TapOffsets<T> of_tap{y, y + offset_stride, nullptr};
    if (mask_) of_tap.mask = mask_ + plane * (given_.mask_as_given() ? given_.mask->plane_stride() : stride_);
    kernels<T>().locate(given_.sizes, {start_.get(), start_.get() + stride_}, of_tap, tap, samples);
  }

 private:
  const T* put_in_order(const PlanesTensor<T>& planes, int64_t n, int64_t begin, int64_t count, T* to) const {
    planes.put_in_order(n, begin, count, to, stride_);
    return to;
  }

  const OffsetTensors<T>& given_;
  int64_t stride_;
  Scratch<T> start_, offset_buffer_, mask_buffer_;
  const T *offset_ = nullptr, *mask_ = nullptr;
};

}  // namespace dcn::cpu
