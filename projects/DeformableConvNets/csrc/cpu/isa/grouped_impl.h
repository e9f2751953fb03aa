// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Grouped convolutions with as many outputs as inputs in a group, for all_impl.h. Samples go from the image into
// registers and are multiplied there; columns are never stored.
//
// The lanes of a vector are channels of one or several groups. Every input channel of a group contributes to every
// output channel of that group, so the plain way would move each input to the lanes of all its outputs, for every tap.
// Instead there are as many sums as a group has channels, and no value moves before the end. In sum d, lane i collects
// what input channel i contributes to output channel i ^ d. With vectors of 4 lanes, groups of kD = 2 channels {0, 1}
// and {2, 3}, inputs x and a weight w[output][input]:
//
//   lane          0               1               2               3
//   sum 0     w[0][0] x[0]    w[1][1] x[1]    w[2][2] x[2]    w[3][3] x[3]     added up over all taps
//   sum 1     w[1][0] x[0]    w[0][1] x[1]    w[3][2] x[2]    w[2][3] x[3]     added up over all taps
//   result    sum 0 + (sum 1 with the lanes of each pair exchanged): lane i is output channel i
//
// The weight is packed in that order (see for_each_weight in grouped.cpp). In the backward pass the output gradients
// are exchanged so once, and then serve all taps.
//
// A lane group is kG vectors that are computed together. If kG is 1, the vector holds whole groups of kD channels;
// otherwise the kG vectors of kD lanes hold one group. Channels are counted from the first one of the call.
//
// This file is longer than 300 lines because the forward and the backward pass share the order of the weight and the
// exchange of lanes, which one has to see side by side.

namespace dcn::cpu::DCN_ISA {
namespace {

// The most sums that fit into the registers, next to what they are computed from.
constexpr int kGroupedSums = DCN_VECTOR_BYTES == 64 ? 16 : 8;

// sum[0] = sum over d of sum[d], its lanes exchanged at distance d.
template <typename T, int kD>
[[gnu::always_inline]] inline void collect(Vector<T>* sum) {
  if constexpr (kD > 1) {
    constexpr int kHalf = kD / 2;
#pragma GCC unroll 8
    for (int d = 0; d < kHalf; ++d) {
      sum[d] += exchange<T, kHalf>(sum[d + kHalf], std::make_index_sequence<kLanes<T>>());
    }
    collect<T, kHalf>(sum);
  }
}

// vector[d] = vector[0], its lanes exchanged at distance d.
template <typename T, int kD>
[[gnu::always_inline]] inline void spread(Vector<T>* vector) {
  if constexpr (kD > 1) {
    constexpr int kHalf = kD / 2;
    spread<T, kHalf>(vector);
#pragma GCC unroll 8
    for (int d = 0; d < kHalf; ++d) {
      vector[d + kHalf] = exchange<T, kHalf>(vector[d], std::make_index_sequence<kLanes<T>>());
    }
  }
}

template <typename Pointer, typename T>
void point(const TapSamples<T>& samples, Pointer image, int64_t stride, Pointer outside, Pointer* rows) {
  for (int k = 0; k < 4; ++k) {
    const int32_t* pixel = samples.pixel[k];
    Pointer* row = rows + k * kGroupedStride;
#pragma omp simd
    for (int64_t p = 0; p < samples.count; ++p) row[p] = pixel[p] == kNoPixel ? outside : image + pixel[p] * stride;
  }
}

// Outputs of kP positions from `p` on and kN lane groups from channel `c` on.
template <typename T, int kD, int kG, int kN, int kP>
[[gnu::always_inline]] inline void grouped_outputs(const GroupedSamples<T>& samples, const T* weight, const T* bias,
                                                   int64_t p, int64_t c, T* output, int64_t output_stride) {
  constexpr int64_t lanes = kLanes<T>, tap_size = kG * kG * kD * lanes;
  const int64_t lane_group_size = samples.taps * tap_size;
  for (int u = 0; u < kG; ++u, weight += kG * kD * lanes) {
    Vector<T> sum[kP][kN][kD] = {};
    const T* const* rows = samples.rows + p;
    const T* factors = samples.weights + p;
    const T* of_tap = weight;
    for (int64_t tap = 0; tap < samples.taps; ++tap) {
#pragma GCC unroll 4
      for (int i = 0; i < kP; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kG; ++v) {
#pragma GCC unroll 2
          for (int n = 0; n < kN; ++n) {
            const int64_t at = c + (n * kG + v) * lanes;
            Vector<T> column = factors[i] * load(rows[i] + at);
#pragma GCC unroll 4
            for (int k = 1; k < 4; ++k) {
              column += factors[k * kGroupedStride + i] * load(rows[k * kGroupedStride + i] + at);
            }
#pragma GCC unroll 16
            for (int d = 0; d < kD; ++d) {
              sum[i][n][d] += column * load(of_tap + n * lane_group_size + (v * kD + d) * lanes);
            }
          }
        }
      }
      rows += 4 * kGroupedStride;
      factors += 4 * kGroupedStride;
      of_tap += tap_size;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kP; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < kN; ++n) {
        const int64_t at = c + (n * kG + u) * lanes;
        collect<T, kD>(sum[i][n]);
        store(output + i * output_stride + at, bias ? sum[i][n][0] + load(bias + at) : sum[i][n][0]);
      }
    }
  }
}

template <typename T, int kD, int kG, int kN>
void lane_groups_forward(const GroupedSamples<T>& samples, const T* weight, const T* bias, int64_t c, T* output,
                         int64_t output_stride) {
  constexpr int kP = std::clamp(kGroupedSums / (kD * kN), 1, 4);
  int64_t p = 0;
  for (; p + kP <= samples.count; p += kP) {
    grouped_outputs<T, kD, kG, kN, kP>(samples, weight, bias, p, c, output + p * output_stride, output_stride);
  }
  for (; kP > 1 && p < samples.count; ++p) {
    grouped_outputs<T, kD, kG, kN, 1>(samples, weight, bias, p, c, output + p * output_stride, output_stride);
  }
}

template <typename T, int kD, int kG>
void sized_groups_forward(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* bias,
                          T* output, int64_t output_stride) {
  constexpr int kN = kG == 1 && 2 * kD <= kGroupedSums ? 2 : 1;
  constexpr int64_t width = kG * kLanes<T>;    // channels of a lane group
  const int64_t row = samples.taps * kG * kD;  // of the weight, for one channel
  int64_t c = 0;
  for (; c + kN * width <= channels.count; c += kN * width) {
    lane_groups_forward<T, kD, kG, kN>(samples, channels.weight + c * row, bias, c, output, output_stride);
  }
  for (; kN > 1 && c < channels.count; c += width) {
    lane_groups_forward<T, kD, kG, 1>(samples, channels.weight + c * row, bias, c, output, output_stride);
  }
}

// Adds the halves of each vector: with h half the lanes, lane 2 i of the result is a[i] + a[i + h], and lane 2 i + 1 is
// b[i] + b[i + h].
template <typename T>
[[gnu::always_inline]] inline Vector<T> merge(const Vector<T>& a, const Vector<T>& b) {
  constexpr auto indices = std::make_index_sequence<kLanes<T>>();
  return interleave<T, 0>(a, b, indices) + interleave<T, 1>(a, b, indices);
}

// The dots of one sample are summed up in kPartials values: those with index 4 j + k belong to dot k.
template <typename T>
constexpr int64_t kPartials = std::max<int64_t>(kLanes<T>, 4);

template <typename T>
[[gnu::always_inline]] inline void add_to_partials(const Vector<T>* dot, T* partials) {
  if constexpr (kLanes<T> == 2) {
    store(partials, load(partials) + merge<T>(dot[0], dot[1]));
    store(partials + 2, load(partials + 2) + merge<T>(dot[2], dot[3]));
  } else {
    store(partials, load(partials) + merge<T>(merge<T>(dot[0], dot[2]), merge<T>(dot[1], dot[3])));
  }
}

// Adds up the partial sums of kTogether<T> samples, which lie `stride` apart: dots[k * kGroupedStride + p] is dot k of
// sample p.
template <typename T>
constexpr int64_t kTogether = kPartials<T> / 4;
template <typename T>
[[gnu::always_inline]] inline void sum_partials(const T* partials, int64_t stride, T* dots) {
  T sums[kPartials<T>];  // (dots, samples)
  if constexpr (kTogether<T> == 4) {
    store(sums, merge<T>(merge<T>(load(partials), load(partials + 2 * stride)),
                         merge<T>(load(partials + stride), load(partials + 3 * stride))));
  } else if constexpr (kTogether<T> == 2) {
    store(sums, merge<T>(load(partials), load(partials + stride)));
  } else {
    std::copy_n(partials, 4, sums);
  }
  for (int k = 0; k < 4; ++k) std::copy_n(sums + k * kTogether<T>, kTogether<T>, dots + k * kGroupedStride);
}

// Positions that the backward pass handles at a time: what it keeps of them fits into the first-level cache.
constexpr int64_t kBatch = 8;
// Vectors that it handles at a time: reading samples and summing dots is done once for all of them.
constexpr int kBatchVectors = 4;

// Backward of kN lane groups from channel `c` on, for a batch of positions. `columns`, (positions, taps, channels), is
// scratch memory.
template <typename T, int kD, int kG, int kN>
struct GroupedBatch {
  static constexpr int kV = kN * kG;
  static constexpr int64_t lanes = kLanes<T>, tap_size = kG * kG * kD * lanes;

  int64_t taps, count;
  T* columns;
  alignas(DCN_VECTOR_BYTES) T gradients[kBatch][kV][kD][lanes];  // output gradients, exchanged at all distances

  // Where input vector v and output vector u of lane group n meet in the weight of a tap.
  int64_t weight_at(int64_t tap, int n, int v, int u) const {
    return (n * taps + tap) * tap_size + (u * kG + v) * kD * lanes;
  }

  void load_gradients(const T* from, int64_t stride) {
    for (int64_t p = 0; p < count; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        Vector<T> gradient[kD];
        gradient[0] = load(from + p * stride + v * lanes);
        spread<T, kD>(gradient);
#pragma GCC unroll 16
        for (int d = 0; d < kD; ++d) store(gradients[p][v][d], gradient[d]);
      }
    }
  }

  // columns = gradients of the columns.
  void multiply_columns(const T* weight) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int n = 0; n < kN; ++n) {
        for (int v = 0; v < kG; ++v) {
          for (int u = 0; u < kG; ++u) {
            const T* factors = weight + weight_at(tap, n, v, u);
            Vector<T> factor[kD];
#pragma GCC unroll 16
            for (int d = 0; d < kD; ++d) factor[d] = load(factors + d * lanes);
            T* column = columns + (tap * kV + n * kG + v) * lanes;
            for (int64_t p = 0; p < count; ++p, column += taps * kV * lanes) {
              Vector<T> sum = u > 0 ? load(column) : Vector<T>{};
#pragma GCC unroll 16
              for (int d = 0; d < kD; ++d) sum += factor[d] * load(gradients[p][n * kG + u][d]);
              store(column, sum);
            }
          }
        }
      }
    }
  }

  // Spreads the columns' gradients to the pixels, overwrites them with the columns, and adds to the partial sums of
  // the dots.
  void sample(const GroupedSamples<T>& samples, int64_t first, int64_t c, T* partials) {
    T* column = columns;
    for (int64_t p = first; p < first + count; ++p) {
      const T* const* rows = samples.rows + p;
      T* const* grad_rows = samples.grad_rows + p;
      const T* weights = samples.weights + p;
      for (int64_t tap = 0; tap < taps; ++tap, column += kV * lanes, partials += kPartials<T>) {
        // Copies: what is stored below cannot be part of them.
        const T* row[4];
        T* grad_row[4];
        Vector<T> weight[4], dot[4] = {};
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          row[k] = rows[k * kGroupedStride] + c;
          grad_row[k] = grad_rows[k * kGroupedStride] + c;
          weight[k] = Vector<T>{} + weights[k * kGroupedStride];
        }
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) {
          const Vector<T> gradient = load(column + v * lanes);
          Vector<T> sum = {};
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const Vector<T> value = load(row[k] + v * lanes);
            T* place = grad_row[k] + v * lanes;
            sum += weight[k] * value;
            dot[k] += gradient * value;
            store(place, load(place) + weight[k] * gradient);
          }
          store(column + v * lanes, sum);
        }
        add_to_partials<T>(dot, partials);
        rows += 4 * kGroupedStride;
        grad_rows += 4 * kGroupedStride;
        weights += 4 * kGroupedStride;
      }
    }
  }

  void multiply_weight(T* grad_weight) const {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int n = 0; n < kN; ++n) {
        for (int v = 0; v < kG; ++v) {
          for (int u = 0; u < kG; ++u) {
            T* sums = grad_weight + weight_at(tap, n, v, u);
            Vector<T> sum[kD];
#pragma GCC unroll 16
            for (int d = 0; d < kD; ++d) sum[d] = load(sums + d * lanes);
            const T* column = columns + (tap * kV + n * kG + v) * lanes;
            for (int64_t p = 0; p < count; ++p, column += taps * kV * lanes) {
              const Vector<T> value = load(column);
#pragma GCC unroll 16
              for (int d = 0; d < kD; ++d) sum[d] += value * load(gradients[p][n * kG + u][d]);
            }
#pragma GCC unroll 16
            for (int d = 0; d < kD; ++d) store(sums + d * lanes, sum[d]);
          }
        }
      }
    }
  }
};

template <typename T, int kD, int kG, int kN>
void lane_groups_backward(const GroupedSamples<T>& samples, const T* weight, int64_t c, const T* grad_output,
                          int64_t grad_stride, T* grad_weight, T* partials, T* columns) {
  GroupedBatch<T, kD, kG, kN> batch;
  batch.taps = samples.taps;
  batch.columns = columns;
  for (int64_t p = 0; p < samples.count; p += kBatch) {
    batch.count = std::min(kBatch, samples.count - p);
    batch.load_gradients(grad_output + p * grad_stride + c, grad_stride);
    batch.multiply_columns(weight);
    batch.sample(samples, p, c, partials + p * samples.taps * kPartials<T>);
    batch.multiply_weight(grad_weight);
  }
}

template <typename T, int kD, int kG>
void sized_groups_backward(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* grad_output,
                           int64_t grad_stride, T* grad_weight, T* dots, T* memory) {
  constexpr int kN = kBatchVectors / kG;
  constexpr int64_t width = kG * kLanes<T>;  // channels of a lane group
  static_assert(kPartials<T> * kGroupedTile + kBatch * kBatchVectors * kLanes<T> <= kGroupedMemory);
  const int64_t taps = samples.taps, row = taps * kG * kD;
  T *partials = memory, *columns = memory + kGroupedTile * taps * kPartials<T>;
  std::fill_n(partials, (samples.count + kTogether<T> - 1) / kTogether<T> * kTogether<T> * taps * kPartials<T>, T(0));
  int64_t c = 0;
  for (; c + kN * width <= channels.count; c += kN * width) {
    lane_groups_backward<T, kD, kG, kN>(samples, channels.weight + c * row, c, grad_output, grad_stride,
                                        grad_weight + c * row, partials, columns);
  }
  for (; kN > 1 && c < channels.count; c += width) {
    lane_groups_backward<T, kD, kG, 1>(samples, channels.weight + c * row, c, grad_output, grad_stride,
                                       grad_weight + c * row, partials, columns);
  }
  for (int64_t p = 0; p < samples.count; p += kTogether<T>) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      sum_partials<T>(partials + (p * taps + tap) * kPartials<T>, taps * kPartials<T>,
                      dots + tap * 4 * kGroupedStride + p);
    }
  }
}

// Calls run(kD, kG) for groups of `channels`, a power of two, as constants.
template <typename T, typename Run>
[[gnu::always_inline]] inline void with_group_size(int64_t channels, const Run& run) {
  using std::integral_constant;
  constexpr int lanes = kLanes<T>;
  constexpr integral_constant<int, 1> one;
  if (channels == 1) return run(one, one);
  if (channels == lanes) return run(integral_constant<int, lanes>(), one);
  if (channels == 2 * lanes) return run(integral_constant<int, lanes>(), integral_constant<int, 2>());
  if (channels == 4 * lanes) return run(integral_constant<int, lanes>(), integral_constant<int, 4>());
  if constexpr (lanes > 2) {
    if (channels == 2) return run(integral_constant<int, 2>(), one);
  }
  if constexpr (lanes > 4) {
    if (channels == 4) return run(integral_constant<int, 4>(), one);
  }
  if constexpr (lanes > 8) {
    if (channels == 8) return run(integral_constant<int, 8>(), one);
  }
}

template <typename T>
void grouped_tile_forward(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* bias,
                          T* output, int64_t output_stride) {
  with_group_size<T>(channels.group_channels, [&](auto d, auto g) {
    sized_groups_forward<T, d(), g()>(samples, channels, bias, output, output_stride);
  });
}

template <typename T>
void grouped_tile_backward(const GroupedSamples<T>& samples, const GroupedChannels<T>& channels, const T* grad_output,
                           int64_t grad_stride, T* grad_weight, T* dots, T* memory) {
  with_group_size<T>(channels.group_channels, [&](auto d, auto g) {
    sized_groups_backward<T, d(), g()>(samples, channels, grad_output, grad_stride, grad_weight, dots, memory);
  });
}

}  // namespace
}  // namespace dcn::cpu::DCN_ISA
