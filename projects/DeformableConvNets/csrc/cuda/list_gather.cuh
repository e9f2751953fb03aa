// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Gathers output gradients by lists of samples, for the gradient by the input.
#pragma once

#include "product.cuh"
#include "sample_lists.cuh"

namespace dcn::cuda {

template <Kind kKind>
struct ListGather {
  static constexpr bool kLean = false;

  using T = Element<kKind>;

  DeformConv2dSizes sizes;
  SampleLists<float> lists;
  const T* grads;                     // (images of the lists, positions, out_channels)
  int group_columns, group_channels;  // columns of the product that read the same channels, and how many those are

  struct Range {
    int64_t begin;
    int32_t count;
  };
  struct Table {
    Range range[kMostTaps][kProductRows];
  };

  // What a thread keeps: the first entries of a list are loaded together.
  struct State {
    static constexpr int kTogether = 4;

    Unit grad[kTogether];
    float weight[kTogether];
    ListEntry<float> prepared[kTogether];
    const ListEntry<float>*list, *prepared_list;
    int count, prepared_count;
    const T* group;  // its first channel
    const T* unit;   // the channel that is gathered
    int deform_group;

    __device__ __forceinline__ State(const ListGather& gather, int column_begin)
        : group(gather.grads + column_begin / gather.group_columns * gather.group_channels),
          deform_group(column_begin / static_cast<int>(gather.sizes.deform_channels())) {}

    // Finds the lists of the step's taps. All threads call it together.
    __device__ __forceinline__ void fill(Table& table, const ListGather& gather, const ProductSizes& sizes,
                                         int row_begin, const Step& step) {
      const int row = static_cast<int>(threadIdx.x) % kProductRows;
      const int image = (row_begin + row) / sizes.image_rows, pixel = (row_begin + row) % sizes.image_rows;
      for (int tap = static_cast<int>(threadIdx.x) / kProductRows; tap < step.taps;
           tap += kProductThreads / kProductRows) {
        Range range{0, 0};
        if (row_begin + row < sizes.rows) {
          const int64_t list = SampleLists<float>::list(gather.sizes, image, deform_group, step.tap + tap, pixel);
          range.begin = gather.lists.starts[list];
          range.count = static_cast<int32_t>(gather.lists.starts[list + 1] - range.begin);
        }
        table.range[tap][row] = range;
      }
    }

    // Loads the first entries of a row's list.
    __device__ __forceinline__ void prepare(const Table& table, const ListGather& gather, const Pair& pair, int row) {
      const Range range = table.range[pair.tap()][row];
      prepared_list = gather.lists.entries + range.begin;
      prepared_count = pair.exists() ? range.count : 0;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (k < prepared_count) prepared[k] = prepared_list[k];
      }
    }
    // Loads what they name, of the row that was prepared.
    __device__ __forceinline__ void start(const Table&, const ListGather& gather, const Pair& pair, int) {
      unit = group + pair.unit() * kUnitElements<kKind>;
      list = prepared_list, count = prepared_count;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        grad[k] = k < count ? load_unit(unit + prepared[k].position * gather.sizes.out_channels) : Unit{{0, 0, 0, 0}};
        weight[k] = k < count ? prepared[k].weight : 0.0f;
      }
    }
    // Adds them up, and what else the list has.
    __device__ __forceinline__ Unit finish(const ListGather& gather) const {
      float sum[kUnitElements<kKind>] = {};
      const auto add = [&](const Unit& loaded, float by) {
        float values[kUnitElements<kKind>];
        to_floats<kKind>(loaded, values);
#pragma unroll
        for (int e = 0; e < kUnitElements<kKind>; ++e) sum[e] += by * values[e];
      };
#pragma unroll
      for (int k = 0; k < kTogether; ++k) add(grad[k], weight[k]);
      for (int k = kTogether; k < count; ++k) {
        const ListEntry<float> entry = list[k];
        add(load_unit(unit + entry.position * gather.sizes.out_channels), entry.weight);
      }
      return to_unit<kKind>(sum);
    }
  };
};

}  // namespace dcn::cuda
