// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Gathers samples. Where they fall is found once for a tile of positions, up to kMostTaps taps and a deform group, and
// kept in shared memory for all channels.
#pragma once

#include "cuda/deform_conv2d/tensor_cores/product_sizes.cuh"

namespace dcn::cuda {

// How many of the four slices of a step are unrolled. With kFloat32, the halves of the operands take the registers that
// more than one would need.
template <Kind kKind>
constexpr int kUnrolledSlices = kKind == Kind::kFloat32 ? 1 : 4;

// A sample in 16 bytes.
struct alignas(16) PackedSample {
  // 16 * (index of the upper left pixel among all images + width + 1), plus one bit for each corner that exists.
  uint32_t place;
  float y, x;  // how far it lies beyond the upper left pixel
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

// A sample in 16 bytes, for images of 16-bit elements. It holds all that does not depend on the channel. The arithmetic
// on its corners is packed, two elements at a time.
struct alignas(16) PairedSample {
  uint32_t first;    // where the upper left pixel begins: the index of its first chunk in all images, modulo 2^32
  uint32_t corners;  // one bit for each corner that exists
  uint32_t weights[2];

  DCN_HOST_DEVICE bool exists(int corner) const { return corners >> corner & 1; }
};
constexpr uint32_t kAllCorners = 15;

// A sample as it is kept in shared memory, for all channels.
template <Kind kKind>
using KeptSample = std::conditional_t<kChunkElements<kKind> == 8, PairedSample, PackedSample>;

template <Kind kKind>
__device__ __forceinline__ KeptSample<kKind> keep_sample(const Place<float>& place, int64_t image,
                                                         const DeformConv2dSizes& s) {
  if constexpr (kChunkElements<kKind> == 8) {
    const int64_t pixel = image * s.pixels() + int64_t{place.y.low} * s.width + place.x.low;
    PairedSample sample{static_cast<uint32_t>(pixel * (s.channels / kChunkElements<kKind>)), 0, {0, 0}};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sample.corners |= static_cast<uint32_t>(place.y.exists[k / 2] && place.x.exists[k % 2]) << k;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float weight = place.y.weight[row] * place.modulation;
      sample.weights[row] = pack<kKind>(weight * place.x.weight[0], weight * place.x.weight[1]);
    }
    return sample;
  } else {
    return pack_sample(place, image, s.pixels(), s.width);
  }
}

// A chunk of a sample: its corners between loading and use.
template <Kind kKind>
struct Interpolation {
  static constexpr bool kPaired = kChunkElements<kKind> == 8;

  Chunk corner[4];
  const KeptSample<kKind>* sample;

  // Loads the corners. `chunk` is the index of the chunk in its pixel, which has `pixel_chunks` of them.
  __device__ __forceinline__ void start(const KeptSample<kKind>* place, bool exists, const Element<kKind>* images,
                                        uint32_t chunk, uint32_t pixel_chunks, int width) {
    sample = place;
    if constexpr (kPaired) {
      const uint32_t corners = exists ? place->corners : 0;
      const uint32_t first = place->first + chunk, row_chunks = width * pixel_chunks;
      if (corners != kAllCorners) {
#pragma unroll
        for (int k = 0; k < 4; ++k) corner[k] = zero_chunk();
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t at = first + k / 2 * row_chunks + k % 2 * pixel_chunks;
        load_chunk_if(corner[k], reinterpret_cast<const Chunk*>(images) + at, corners & 1u << k);
      }
    } else {
      const PackedSample here{exists ? place->place : 0, 0, 0, 0};
      const int channels = static_cast<int>(pixel_chunks) * kChunkElements<kKind>;
      const Element<kKind>* from = images + chunk * kChunkElements<kKind> + int64_t{here.pixel(width)} * channels;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        corner[k] = here.exists(k) ? load_chunk(from + (k / 2 * width + k % 2) * channels) : Chunk{{0, 0, 0, 0}};
      }
    }
  }
  // Interpolates between the corners. The sum of 16-bit elements is rounded after each of its four terms.
  __device__ __forceinline__ Chunk finish() const {
    if constexpr (kPaired) {
      Chunk sum{{0, 0, 0, 0}};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t weight = both_halves(sample->weights[k / 2], k % 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.word[i] = multiply_add_pairs<kKind>(corner[k].word[i], weight, sum.word[i]);
      }
      return sum;
    } else {
      const float y = sample->y, x = sample->x, modulation = sample->modulation;
      float sum[kChunkElements<kKind>] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float weight = (k / 2 ? y : 1.0f - y) * (k % 2 ? x : 1.0f - x) * modulation;
        float values[kChunkElements<kKind>];
        to_floats<kKind>(corner[k], values);
#pragma unroll
        for (int e = 0; e < kChunkElements<kKind>; ++e) sum[e] += weight * values[e];
      }
      return to_chunk<kKind>(sum);
    }
  }
};

// How the channels of a product's rows are found.
struct GatherSizes {
  int group_columns, group_channels;  // columns of the product that read the same channels, and how many those are
  int deform_channels;                // channels of a deform group
  int segment_chunks;                 // chunks of a segment, which lies in one conv group and in one deform group
  int pixel_chunks;                   // chunks of a pixel
};

template <Kind kKind>
struct SampleGather {
  static constexpr bool kLean = true;  // it leaves registers for two blocks

  OperandsView<Element<kKind>> operands;
  GatherSizes sizes;

  struct Table {
    KeptSample<kKind> sample[kMostTaps][kProductRows];
  };

  // What a thread keeps.
  struct State {
    Interpolation<kKind> interpolation;
    uint32_t channel_chunk;  // the first chunk of the group's channels

    __device__ __forceinline__ State(const SampleGather& gather, int column_begin)
        : channel_chunk(column_begin / gather.sizes.group_columns * gather.sizes.group_channels /
                        kChunkElements<kKind>) {}

    // Locates the samples of the step's taps and segment. All threads of the block call it together.
    __device__ __forceinline__ void fill(Table& table, const SampleGather& gather, const ProductSizes& sizes,
                                         int row_begin, const Step& step) {
      const DeformConv2dSizes& s = gather.operands.sizes;
      const int first = (channel_chunk + step.segment * gather.sizes.segment_chunks) * kChunkElements<kKind>;
      const int deform_group = first / gather.sizes.deform_channels;
      const int row = static_cast<int>(threadIdx.x) % kProductRows;
      const int image = (row_begin + row) / sizes.image_rows, position = sizes.place(row_begin + row);
      for (int tap = static_cast<int>(threadIdx.x) / kProductRows; tap < step.taps;
           tap += static_cast<int>(blockDim.x) / kProductRows) {
        KeptSample<kKind> kept{};
        if (row_begin + row < sizes.rows) {
          const auto place = place_sample<float>(gather.operands, image, position, deform_group, step.tap + tap);
          kept = keep_sample<kKind>(place, image, s);
        }
        table.sample[tap][row] = kept;
      }
    }

    __device__ __forceinline__ void start(const Table& table, const SampleGather& gather, const Pair& pair, int row) {
      const DeformConv2dSizes& s = gather.operands.sizes;
      interpolation.start(&table.sample[pair.tap()][row], pair.exists(), gather.operands.images,
                          channel_chunk + pair.chunk(), gather.sizes.pixel_chunks, static_cast<int>(s.width));
    }
    __device__ __forceinline__ Chunk finish(const SampleGather&) const { return interpolation.finish(); }
  };
};

}  // namespace dcn::cuda
