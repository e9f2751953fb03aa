// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Gathers samples: where they fall is found once for a tile of positions, up to kMostTaps taps and a deform group, and
// kept in shared memory for all channels.
#pragma once

#include "product.cuh"

namespace dcn::cuda {

// Of the four in a step: split operands take the registers that more would need.
template <Kind kKind>
constexpr int kUnrolledSlices = kKind == Kind::kFloat32 ? 1 : 4;

// A sample in 16 bytes.
struct alignas(16) PackedSample {
  uint32_t place;  // index of the upper left pixel among all images, plus width + 1, times 16; bits of what exists
  float y, x;      // by how much it lies beyond the upper left pixel
  float modulation;

  DCN_HOST_DEVICE bool exists(int corner) const { return place >> corner & 1; }
  DCN_HOST_DEVICE int pixel(int width) const { return static_cast<int>(place >> 4) - width - 1; }
};
constexpr int64_t kMostPackedPixels = (int64_t{1} << 28) - 1;

DCN_HOST_DEVICE PackedSample pack_sample(const Place<float>& place, int64_t image, int64_t pixels, int64_t width) {
  uint32_t exists = 0;
  for (int corner = 0; corner < 4; ++corner) {
    exists |= static_cast<uint32_t>(place.y.exists[corner / 2] && place.x.exists[corner % 2]) << corner;
  }
  const auto fraction = [](const AxisSample<float>& axis) {
    return axis.exists[1] ? axis.weight[1] : 1.0f - axis.weight[0];
  };
  const int64_t index = image * pixels + (place.y.low + 1) * width + place.x.low + 1;
  return {static_cast<uint32_t>(index) << 4 | exists, fraction(place.y), fraction(place.x), place.modulation};
}

// A unit of a sample between loading and use.
template <Kind kKind>
struct Interpolation {
  Unit corner[4];
  const PackedSample* sample;

  // Loads the corners; `from` is the unit in the first image's first pixel.
  __device__ __forceinline__ void start(const PackedSample* place, bool exists, const Element<kKind>* from,
                                        int channels, int width) {
    sample = place;
    const PackedSample here{exists ? place->place : 0, 0, 0, 0};
    from += int64_t{here.pixel(width)} * channels;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      corner[k] = here.exists(k) ? load_unit(from + (k / 2 * width + k % 2) * channels) : Unit{{0, 0, 0, 0}};
    }
  }
  // Interpolates between them.
  __device__ __forceinline__ Unit finish() const {
    const float y = sample->y, x = sample->x, modulation = sample->modulation;
    float sum[kUnitElements<kKind>] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float weight = (k / 2 ? y : 1.0f - y) * (k % 2 ? x : 1.0f - x) * modulation;
      float values[kUnitElements<kKind>];
      to_floats<kKind>(corner[k], values);
#pragma unroll
      for (int e = 0; e < kUnitElements<kKind>; ++e) sum[e] += weight * values[e];
    }
    return to_unit<kKind>(sum);
  }
};

// How the channels of a product's rows are found.
struct GatherSizes {
  int group_columns, group_channels;  // columns of the product that read the same channels, and how many those are
  int deform_channels;                // of a deform group
  int segment_units;                  // in the same conv group and the same deform group
};

template <Kind kKind>
struct SampleGather {
  static constexpr bool kLean = true;  // whether it leaves registers for two blocks

  Operands<Element<kKind>> operands;
  GatherSizes sizes;

  struct Table {
    PackedSample sample[kMostTaps][kProductRows];
  };

  // What a thread keeps.
  struct State {
    Interpolation<kKind> interpolation;
    int channel;  // the first of the group

    __device__ __forceinline__ State(const SampleGather& gather, int column_begin)
        : channel(column_begin / gather.sizes.group_columns * gather.sizes.group_channels) {}

    // Locates the samples of the step's taps and segment. All threads call it together.
    __device__ __forceinline__ void fill(Table& table, const SampleGather& gather, const ProductSizes& sizes,
                                         int row_begin, const Step& step) {
      const DeformConv2dSizes& s = gather.operands.sizes;
      const int first = channel + step.segment * gather.sizes.segment_units * kUnitElements<kKind>;
      const int deform_group = first / gather.sizes.deform_channels;
      const int row = static_cast<int>(threadIdx.x) % kProductRows;
      const int image = (row_begin + row) / sizes.image_rows, position = (row_begin + row) % sizes.image_rows;
      for (int tap = static_cast<int>(threadIdx.x) / kProductRows; tap < step.taps;
           tap += kProductThreads / kProductRows) {
        PackedSample packed{0, 0, 0, 0};
        if (row_begin + row < sizes.rows) {
          const auto place = place_sample<float>(gather.operands, image, position, deform_group, step.tap + tap);
          packed = pack_sample(place, image, s.pixels(), s.width);
        }
        table.sample[tap][row] = packed;
      }
    }

    __device__ __forceinline__ void prepare(const Table&, const SampleGather&, const Pair&, int) {}
    __device__ __forceinline__ void start(const Table& table, const SampleGather& gather, const Pair& pair, int row) {
      const DeformConv2dSizes& s = gather.operands.sizes;
      interpolation.start(&table.sample[pair.tap()][row], pair.exists(),
                          gather.operands.images + channel + pair.unit() * kUnitElements<kKind>,
                          static_cast<int>(s.channels), static_cast<int>(s.width));
    }
    __device__ __forceinline__ Unit finish(const SampleGather&) const { return interpolation.finish(); }
  };
};

}  // namespace dcn::cuda
