// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Bodies of the kernels in kernels.h. Each kernels_<isa>.cpp sets DCN_ISA and the compiler's target, then includes
// this; everything below is in a namespace of that name, so no function of one target is linked into another.

namespace dcn::cpu::DCN_ISA {
namespace {

template <typename T>
void locate(const DeformConv2dSizes& sizes, const T* offset, const T* mask, int64_t group, int64_t begin, int64_t end,
            Neighbours<T>* samples, Derivatives<T>* derivatives) {
  const int64_t taps = sizes.taps(), positions = sizes.positions();
  const auto height = static_cast<int32_t>(sizes.height), width = static_cast<int32_t>(sizes.width);
  offset += group * taps * 2 * positions;
  if (mask) mask += group * taps * positions;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t h = p / sizes.out_w, w = p % sizes.out_w;
    for (int64_t i = 0, tap = 0; i < sizes.kernel_h; ++i) {
      for (int64_t j = 0; j < sizes.kernel_w; ++j, ++tap) {
        const T* shift = offset + 2 * tap * positions + p;
        const AxisSample<T> y = sample_axis_zeros(tap_y<T>(sizes, h, i) + shift[0], height);
        const AxisSample<T> x = sample_axis_zeros(tap_x<T>(sizes, w, j) + shift[positions], width);
        const T modulation = mask ? mask[tap * positions + p] : T(1);
        for (int k = 0; k < 4; ++k) {
          const int a = k / 2, b = k % 2;
          const bool exists = y.exists[a] && x.exists[b];
          samples->pixel[k] = exists ? (y.low + a) * width + x.low + b : kNoPixel;
          samples->weight[k] = modulation * y.weight[a] * x.weight[b];
          if (derivatives) {
            derivatives->by_mask[k] = y.weight[a] * x.weight[b];
            derivatives->by_y[k] = modulation * y.slope[a] * x.weight[b];
            derivatives->by_x[k] = modulation * y.weight[a] * x.slope[b];
          }
        }
        ++samples;
        if (derivatives) ++derivatives;
      }
    }
  }
}

template <typename T>
void gather(const T* image, int64_t stride, const T* zeros, const Neighbours<T>* samples, int64_t count,
            int64_t channels, T* columns, int64_t column_stride) {
  for (int64_t s = 0; s < count; ++s, columns += column_stride) {
    const T* row[4];
    for (int k = 0; k < 4; ++k) {
      row[k] = samples[s].pixel[k] == kNoPixel ? zeros : image + samples[s].pixel[k] * stride;
    }
    const T *r0 = row[0], *r1 = row[1], *r2 = row[2], *r3 = row[3];
    const T w0 = samples[s].weight[0], w1 = samples[s].weight[1], w2 = samples[s].weight[2], w3 = samples[s].weight[3];
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) columns[c] = w0 * r0[c] + w1 * r1[c] + w2 * r2[c] + w3 * r3[c];
  }
}

template <typename T>
void add_scaled(T* a, const T* b, T scale, int64_t count) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) a[c] += scale * b[c];
}

template <typename T>
T inner(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) sum += a[c] * b[c];
  return sum;
}

template <typename T>
void scatter(const T* grad_columns, int64_t column_stride, const Neighbours<T>* samples, int64_t count,
             int64_t channels, T* grad_image, int64_t stride) {
  for (int64_t s = 0; s < count; ++s, grad_columns += column_stride) {
    for (int k = 0; k < 4; ++k) {
      if (samples[s].pixel[k] == kNoPixel) continue;
      add_scaled(grad_image + samples[s].pixel[k] * stride, grad_columns, samples[s].weight[k], channels);
    }
  }
}

template <typename T>
void dot(const T* grad_columns, int64_t column_stride, const T* image, int64_t stride, const Neighbours<T>* samples,
         int64_t count, int64_t channels, T* dots) {
  for (int64_t s = 0; s < count; ++s, grad_columns += column_stride) {
    for (int k = 0; k < 4; ++k) {
      const int32_t pixel = samples[s].pixel[k];
      dots[4 * s + k] = pixel == kNoPixel ? T(0) : inner(grad_columns, image + pixel * stride, channels);
    }
  }
}

}  // namespace

const Kernels<float> float_kernels{locate<float>, gather<float>,     scatter<float>,
                                   dot<float>,    add_scaled<float>, inner<float>};
const Kernels<double> double_kernels{locate<double>, gather<double>,     scatter<double>,
                                     dot<double>,    add_scaled<double>, inner<double>};

}  // namespace dcn::cpu::DCN_ISA
