// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The functions of the table in roi_pool_kernels.h, for all_impl.h. A pass handles as many channels as fill about half
// of the registers: the weight of a pixel is computed once for all of them.

namespace dcn::cpu::DCN_ISA {
namespace {

constexpr int kPoolVectors = DCN_VECTOR_BYTES == 64 ? 8 : 4;

// Calls run(integral constant of vectors, first channel) for whole vectors of channels, most of them kV at a time, and
// returns the first channel that is left.
template <typename T, int kV, typename Run>
[[gnu::always_inline]] inline int64_t for_channel_groups(int64_t c, int64_t channels, int64_t readable,
                                                         const Run& run) {
  constexpr int64_t width = kV * kLanes<T>;
  for (; c < channels && c + width <= readable; c += width) run(std::integral_constant<int, kV>(), c);
  if constexpr (kV > 1) {
    return for_channel_groups<T, kV / 2>(c, channels, readable, run);
  } else {
    return c;
  }
}

template <typename T>
[[gnu::always_inline]] inline int64_t pixel_at(const RoiPixels<T>& roi, const BinPixels<T>& bin,
                                               const AxisEntry<T>& row, const AxisEntry<T>& column) {
  return row.pixel * roi.row_stride + column.pixel * roi.pixel_stride + bin.cell * roi.cell_stride;
}

// The sum of a bin with kColumns columns; their weights stay in registers.
template <typename T, int kV, int kColumns>
[[gnu::always_inline]] inline void pool_columns(const RoiPixels<T>& roi, const BinPixels<T>& bin, const T* image,
                                                Vector<T> (&total)[kV]) {
  constexpr int64_t lanes = kLanes<T>;
  const AxisEntry<T>*rows = roi.entries + bin.rows, *columns = roi.entries + bin.columns;
  Vector<T> weight[kColumns];
  int64_t at[kColumns];
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
    weight[j] = Vector<T>{} + bin.scale * columns[j].weight;
    at[j] = columns[j].pixel * roi.pixel_stride;
  }
  for (int32_t i = 0; i < bin.row_count; ++i) {
    const T* row = image + rows[i].pixel * roi.row_stride;
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const T* pixel = row + at[j];
      const Vector<T> factor = rows[i].weight * weight[j];
#pragma GCC unroll 16
      for (int v = 0; v < kV; ++v) total[v] += factor * load(pixel + v * lanes);
    }
  }
}

template <typename T, int kV>
[[gnu::always_inline]] inline void pool_bin(const RoiPixels<T>& roi, const BinPixels<T>& bin, const T* image, T* sum) {
  constexpr int64_t lanes = kLanes<T>;
  Vector<T> total[kV] = {};
  image += bin.cell * roi.cell_stride;
  switch (bin.column_count) {
    case 2:
      pool_columns<T, kV, 2>(roi, bin, image, total);
      break;
    case 3:
      pool_columns<T, kV, 3>(roi, bin, image, total);
      break;
    case 4:
      pool_columns<T, kV, 4>(roi, bin, image, total);
      break;
    default:
      for (BinPixels<T> one = bin; one.columns < bin.columns + bin.column_count; ++one.columns) {
        pool_columns<T, kV, 1>(roi, one, image, total);
      }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kV; ++v) store(sum + v * lanes, total[v]);
}

// Copies values that are not needed soon to where a vector may be aligned: past the caches, so that the lines need not
// be read before. Other threads see them after a store fence.
template <typename T>
[[gnu::always_inline]] inline void stream(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
#if defined(__clang__)
    __builtin_nontemporal_store(load(from + i), reinterpret_cast<Vector<T>*>(to + i));
#elif defined(__x86_64__)
    Vector<float> values;
    __builtin_memcpy(&values, from + i, sizeof(values));
    auto* place = reinterpret_cast<float*>(to + i);
#if DCN_VECTOR_BYTES == 64
    __builtin_ia32_movntps512(place, values);
#elif DCN_VECTOR_BYTES == 32
    __builtin_ia32_movntps256(place, values);
#else
    __builtin_ia32_movntps(place, values);
#endif
#else
    store(to + i, load(from + i));
#endif
  }
}

template <typename T>
void pool(const RoiPixels<T>& from, const T* image, T* buffer, T* out, bool past_caches) {
  constexpr int64_t lanes = kLanes<T>;
  const RoiPixels<T> roi = from;  // a copy: what is stored below cannot be part of it
  T* const sums = buffer + roi.count * lanes;
  const int64_t rest = for_channel_groups<T, kPoolVectors>(0, roi.channels, roi.readable, [&](auto vectors, int64_t c) {
    constexpr int64_t width = vectors * lanes;
    for (int64_t b = 0; b < roi.count; ++b) pool_bin<T, vectors>(roi, roi.bins[b], image + c, sums + b * width);
    // The output's rows begin anywhere in a cache line: it is put together in the buffer and written in one go.
    for (int64_t k = c; k < std::min(c + width, roi.channels); k += lanes) {
      const int64_t channels = std::min(lanes, roi.channels - k);
      transpose(sums + (k - c), width, roi.count, channels, buffer, roi.count);
      T* to = out + k * roi.count;
      if (past_caches && channels == lanes && reinterpret_cast<uintptr_t>(to) % sizeof(Vector<T>) == 0) {
        stream(to, buffer, lanes * roi.count);
      } else {
        std::copy_n(buffer, channels * roi.count, to);
      }
    }
  });
  for (int64_t c = rest; c < roi.channels; ++c) {
    for (int64_t b = 0; b < roi.count; ++b) {
      const BinPixels<T>& bin = roi.bins[b];
      const AxisEntry<T>*rows = roi.entries + bin.rows, *columns = roi.entries + bin.columns;
      T total = 0;
      for (int32_t i = 0; i < bin.row_count; ++i) {
        for (int32_t j = 0; j < bin.column_count; ++j) {
          const int64_t at = pixel_at(roi, bin, rows[i], columns[j]);
          total += bin.scale * rows[i].weight * columns[j].weight * image[at + c];
        }
      }
      out[c * roi.count + b] = total;
    }
  }
}

template <typename T, int kV, bool kInput, bool kOffset>
[[gnu::always_inline]] inline void pool_backward_bin(const RoiPixels<T>& roi, const BinPixels<T>& bin, const T* image,
                                                     const T* gradient, T* grad_image, T* sums) {
  constexpr int64_t lanes = kLanes<T>;
  const AxisEntry<T>*rows = roi.entries + bin.rows, *columns = roi.entries + bin.columns;
  Vector<T> value[kV], by_x = {}, by_y = {}, whole = {};
#pragma GCC unroll 16
  for (int v = 0; v < kV; ++v) value[v] = load(gradient + v * lanes);
  for (int32_t i = 0; i < bin.row_count; ++i) {
    const int64_t row = rows[i].pixel * roi.row_stride + bin.cell * roi.cell_stride;
    const T row_weight = bin.scale * rows[i].weight;
    Vector<T> weighted = {}, slope = {};  // sums over the row of the gradient's products with the pixels
    for (int32_t j = 0; j < bin.column_count; ++j) {
      const int64_t at = row + columns[j].pixel * roi.pixel_stride;
      if (kInput) {
        const T factor = row_weight * columns[j].weight;
        T* to = grad_image + at;
#pragma GCC unroll 16
        for (int v = 0; v < kV; ++v) store(to + v * lanes, load(to + v * lanes) + factor * value[v]);
      }
      if (kOffset) {
        const T* pixel = image + at;
        Vector<T> even = value[0] * load(pixel), odd = {};
#pragma GCC unroll 16
        for (int v = 1; v < kV; ++v) (v % 2 ? odd : even) += value[v] * load(pixel + v * lanes);
        const Vector<T> product = even + odd;
        weighted += columns[j].weight * product;
        slope += columns[j].slope * product;
      }
    }
    if (kOffset) {
      by_x += rows[i].weight * slope;
      by_y += rows[i].slope * weighted;
      whole += rows[i].weight * weighted;
    }
  }
  if (kOffset) {
    sums[0] += lane_sum<T>(by_x);
    sums[1] += lane_sum<T>(by_y);
    sums[2] += lane_sum<T>(whole);
  }
}

// What pool_backward_bin does, for one channel.
template <typename T, bool kInput, bool kOffset>
void pool_backward_channel(const RoiPixels<T>& roi, const BinPixels<T>& bin, const T* image, T gradient, T* grad_image,
                           T* sums) {
  const AxisEntry<T>*rows = roi.entries + bin.rows, *columns = roi.entries + bin.columns;
  for (int32_t i = 0; i < bin.row_count; ++i) {
    for (int32_t j = 0; j < bin.column_count; ++j) {
      const int64_t at = pixel_at(roi, bin, rows[i], columns[j]);
      const T weight = rows[i].weight * columns[j].weight;
      if (kInput) grad_image[at] += bin.scale * weight * gradient;
      if (kOffset) {
        const T product = gradient * image[at];
        sums[0] += rows[i].weight * columns[j].slope * product;
        sums[1] += rows[i].slope * columns[j].weight * product;
        sums[2] += weight * product;
      }
    }
  }
}

template <typename T, bool kInput, bool kOffset>
void pool_backward_pass(const RoiPixels<T>& from, const T* image, const T* gradient, int64_t gradient_stride,
                        T* grad_image, T* sums) {
  const RoiPixels<T> roi = from;
  const auto at = [](auto* pointer, int64_t c) { return pointer ? pointer + c : nullptr; };
  const int64_t rest = for_channel_groups<T, kPoolVectors>(0, roi.channels, roi.readable, [&](auto vectors, int64_t c) {
    for (int64_t b = 0; b < roi.count; ++b) {
      pool_backward_bin<T, vectors, kInput, kOffset>(roi, roi.bins[b], at(image, c), gradient + b * gradient_stride + c,
                                                     at(grad_image, c), at(sums, 3 * b));
    }
  });
  for (int64_t c = rest; c < roi.channels; ++c) {
    for (int64_t b = 0; b < roi.count; ++b) {
      pool_backward_channel<T, kInput, kOffset>(roi, roi.bins[b], at(image, c), gradient[b * gradient_stride + c],
                                                at(grad_image, c), at(sums, 3 * b));
    }
  }
}

template <typename T>
void pool_backward(const RoiPixels<T>& roi, const T* image, const T* gradient, int64_t gradient_stride, T* grad_image,
                   T* sums) {
  if (grad_image && sums) {
    pool_backward_pass<T, true, true>(roi, image, gradient, gradient_stride, grad_image, sums);
  } else if (grad_image) {
    pool_backward_pass<T, true, false>(roi, image, gradient, gradient_stride, grad_image, sums);
  } else if (sums) {
    pool_backward_pass<T, false, true>(roi, image, gradient, gradient_stride, grad_image, sums);
  }
}

template <typename T>
constexpr RoiPoolKernels<T> roi_pool_kernels() {
  return {kPoolVectors * kLanes<T>, (kPoolVectors + 1) * kLanes<T>, pool<T>, pool_backward<T>};
}

}  // namespace
}  // namespace dcn::cpu::DCN_ISA
