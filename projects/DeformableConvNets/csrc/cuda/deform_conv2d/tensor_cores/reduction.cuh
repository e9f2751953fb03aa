// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The order in which the tensor-core kernels sum over taps and channels, and the weights in that order.
#pragma once

#include "cuda/arithmetic.cuh"
#include "cuda/deform_conv2d/sampling/operands.cuh"

namespace dcn::cuda {

constexpr int kMostTaps = 9;  // taps whose samples a block locates at a time

// The order of a sum over taps and over the channels of a group, which are `segments` segments of `chunks` chunks:
//   for each group of up to kMostTaps taps
//     for each segment
//       for each group of up to kRowChunks chunks
//         for each tap of its group: the neighbouring taps of a tile read the same pixels
//           for each chunk of its group
// The two inner loops are a stretch. Its pairs of tap and chunk are cut into steps of kRowChunks pairs; the last step
// of a stretch may have fewer.
struct Reduction {
  int taps, segments, chunks;

  // The steps of one group of taps.
  DCN_HOST_DEVICE int steps_of(int group_taps) const {
    const int rest = (group_taps * (chunks % kRowChunks) + kRowChunks - 1) / kRowChunks;
    return segments * (chunks / kRowChunks * group_taps + rest);
  }
  DCN_HOST_DEVICE int steps() const {
    return taps / kMostTaps * steps_of(kMostTaps) + (taps % kMostTaps ? steps_of(taps % kMostTaps) : 0);
  }
  DCN_HOST_DEVICE int chunk_groups() const { return (chunks + kRowChunks - 1) / kRowChunks; }
  DCN_HOST_DEVICE int stretches() const { return (taps + kMostTaps - 1) / kMostTaps * segments * chunk_groups(); }
  DCN_HOST_DEVICE int first_step(int stretch) const {
    const int chunk_group = stretch % chunk_groups(), segment = stretch / chunk_groups() % segments;
    const int tap = stretch / chunk_groups() / segments * kMostTaps;
    const int group_taps = taps - tap < kMostTaps ? taps - tap : kMostTaps;
    return tap / kMostTaps * steps_of(kMostTaps) + segment * (steps_of(group_taps) / segments) +
           chunk_group * group_taps;
  }
};

// One step of a Reduction.
struct Step {
  int tap, taps;      // the stretch's first tap, and how many it has
  int segment;        // the segment of the stretch
  int chunk, chunks;  // the stretch's first chunk, counted in its segment, and how many it has
  int index, length;  // the index of the step in the stretch, and how many steps that has

  DCN_HOST_DEVICE Step(const Reduction& r, int step) {
    tap = segment = chunk = 0, index = step;
    start_stretch(r);
    while (index >= length) {
      index -= length;
      next_stretch(r);
    }
  }

  // Whether it is the first step for its taps and segment.
  DCN_HOST_DEVICE bool starts_segment() const { return index == 0 && chunk == 0; }

  // The tap of the pair in column `column` of this step, counted in the stretch. There is no such pair from `taps` on.
  DCN_HOST_DEVICE int tap_of(int column) const { return (index * kRowChunks + column) / chunks; }
  // The chunk of that pair, counted in the segment.
  DCN_HOST_DEVICE int chunk_of(int column) const { return chunk + (index * kRowChunks + column) % chunks; }

 private:
  DCN_HOST_DEVICE void start_stretch(const Reduction& r) {
    taps = r.taps - tap < kMostTaps ? r.taps - tap : kMostTaps;
    chunks = r.chunks - chunk < kRowChunks ? r.chunks - chunk : kRowChunks;
    length = (taps * chunks + kRowChunks - 1) / kRowChunks;
  }
  DCN_HOST_DEVICE void next_stretch(const Reduction& r) {
    chunk += kRowChunks;
    if (chunk >= r.chunks) chunk = 0, ++segment;
    if (segment == r.segments) segment = 0, tap += kMostTaps;
    start_stretch(r);
  }
};

// One pair of tap and chunk of a step, in 4 bytes. Kernels read pairs from a table: to compute them would cost
// registers.
struct Pair {
  uint32_t bits;

  DCN_HOST_DEVICE Pair(const Reduction& r, const Step& step, int column) {
    const int tap = step.tap_of(column);
    const bool exists = tap < step.taps;
    const int chunk = exists ? step.segment * r.chunks + step.chunk_of(column) : 0;
    bits = static_cast<uint32_t>(chunk) << 6 | static_cast<uint32_t>(exists ? tap : 0) << 2 |
           static_cast<uint32_t>(step.starts_segment()) << 1 | static_cast<uint32_t>(exists);
  }

  DCN_HOST_DEVICE bool exists() const { return bits & 1; }
  DCN_HOST_DEVICE bool starts_segment() const { return bits & 2; }
  DCN_HOST_DEVICE int tap() const { return static_cast<int>(bits >> 2 & 15); }  // counted in the group of taps
  DCN_HOST_DEVICE int chunk() const { return static_cast<int>(bits >> 6); }     // counted in the channels' group
};
static_assert(kMostTaps <= 16);

// How weights are packed as the second operand of a product: for every stripe of columns and every step, `padded` rows
// of 128 bytes, one for each column, swizzled. What does not exist is zero.
struct Packing {
  Reduction reduction;
  int stripes;          // how many stripes the columns form
  int columns, padded;  // columns of a stripe, and with padding
  int group_columns;    // neighbouring columns that are multiplied with the same channels
  int group_channels;   // how many channels that are
  bool outputs;         // columns are output channels, summed over are input channels; or the other way round
  // Output and input channels of a group of the convolution.
  int conv_outputs, conv_channels;
  bool permuted = false;  // whether rows are permuted, see permuted_row
  int outer_taps = 1;     // if not 1, all stripes are packed for one tap after the other, and the Reduction has one tap

  DCN_HOST_DEVICE int64_t step_chunks() const { return int64_t{padded} * kRowChunks; }
  DCN_HOST_DEVICE int64_t stripe_chunks() const { return step_chunks() * reduction.steps(); }
  DCN_HOST_DEVICE int64_t weight_chunks() const { return stripe_chunks() * stripes * outer_taps; }
  // Behind the weights lie the Pairs of all steps.
  DCN_HOST_DEVICE int64_t total_chunks() const { return weight_chunks() + 2 * int64_t{reduction.steps()}; }
};

// Which row of every 32 a packed column has, so that the sums that a lane gets in four neighbouring fragments, two in
// each, are those of eight neighbouring columns.
DCN_HOST_DEVICE int permuted_row(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

constexpr int kPackThreads = 256;
constexpr int kPackColumns = 8;  // columns that a block packs

// Whether a block packs all outer taps. One block for each would read the same memory again.
DCN_HOST_DEVICE bool packs_outer_taps(const Packing& packing) {
  return packing.outer_taps > 1 && packing.outer_taps <= kMostTaps;
}

inline int64_t pack_blocks(const Packing& packing) {
  const int64_t outer_taps = packs_outer_taps(packing) ? 1 : packing.outer_taps;
  return packing.stripes * outer_taps * (packing.padded / kPackColumns) * packing.reduction.stretches();
}

// A block packs a stretch of the Reduction for some columns. It goes through shared memory: weights are read in the
// order in which they lie in memory, by lines of one output channel's weights for several input channels and taps.
template <Kind kKind>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const Packing packing, const WeightsView<const Element<kKind>> weights, Chunk* packed) {
  constexpr int kChunk = kChunkElements<kKind>;
  // Elements are moved as bits.
  using Bits = std::conditional_t<kChunk == 8, uint16_t, uint32_t>;
  struct Shared {
    alignas(kChunkBytes) Bits weights[kPackColumns * kRowChunks * kChunk * kMostTaps];
  };
  DCN_SHARED(Shared, shared);
  const Reduction& reduction = packing.reduction;
  const int thread = static_cast<int>(threadIdx.x);
  const int column_tiles = packing.padded / kPackColumns;
  int index = static_cast<int>(blockIdx.x);
  const int column_begin = index % column_tiles * kPackColumns;  // in its stripe
  index /= column_tiles;
  const int stretch = index % reduction.stretches(), outer = index / reduction.stretches();
  const int outer_tap = outer / packing.stripes, stripe_begin = outer % packing.stripes * packing.columns;
  const int first_step = reduction.first_step(stretch);
  const Step step(reduction, first_step);
  const bool all_outer = packs_outer_taps(packing);
  const int tap_begin = outer_tap + step.tap, taps = all_outer ? packing.outer_taps : step.taps;  // that are read
  const int elements = step.chunks * kChunk;

  // Columns are counted from `n` on, what is summed over from `m` on, over all conv groups.
  const int group = stripe_begin / packing.group_columns, n = stripe_begin + column_begin;
  const int m = group * packing.group_channels + (step.segment * reduction.chunks + step.chunk) * kChunk;
  const int columns = packing.columns - column_begin < kPackColumns ? packing.columns - column_begin : kPackColumns;
  const int lines = packing.outputs ? kPackColumns : elements, length = packing.outputs ? elements : kPackColumns;
  const int first_output = packing.outputs ? n : m, first_channel = packing.outputs ? m : n;
  const bool merged = packing.group_columns != (packing.outputs ? packing.conv_outputs : packing.conv_channels);

  // In shared memory a line is as in memory: of taps of channels, or of channels of taps.
  const bool taps_first = weights.tap_stride <= weights.channel_stride;
  const int line_elements = length * taps;
  const int runs = taps_first ? 1 : taps, run = line_elements / runs;  // elements that follow each other in memory
  const int run_chunks = run / kChunk;
  const auto* base = reinterpret_cast<const Bits*>(&weights.at(0, 0, tap_begin));
  const int64_t channel_begin = first_channel - group * packing.conv_channels;
  const bool dense =
      taps_first ? weights.tap_stride == 1 && weights.channel_stride == taps : weights.channel_stride == 1;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % kChunkBytes == 0 && run % kChunk == 0 &&
                       weights.output_stride % kChunk == 0 && channel_begin * weights.channel_stride % kChunk == 0 &&
                       (taps_first || weights.tap_stride % kChunk == 0);
  if (dense && aligned && !merged && columns == kPackColumns) {
#pragma unroll 3
    for (int at = thread; at < lines * runs * run_chunks; at += kPackThreads) {
      const int line = at / (runs * run_chunks), tap = at / run_chunks % runs, chunk = at % run_chunks;
      const Bits* from = base + (first_output + line) * weights.output_stride + channel_begin * weights.channel_stride +
                         tap * weights.tap_stride + chunk * kChunk;
      store_chunk(shared.weights + line * line_elements + tap * run + chunk * kChunk, load_chunk(from));
    }
  } else {
    for (int at = thread; at < lines * line_elements; at += kPackThreads) {
      const int line = at / line_elements, rest = at % line_elements;
      const int tap = taps_first ? rest % taps : rest / length;
      const int channel = first_channel + (taps_first ? rest / taps : rest % length), output = first_output + line;
      const int conv_group = merged ? output / packing.conv_outputs : group;
      const bool exists = (packing.outputs ? line : channel - n) < columns &&
                          (!merged || channel / packing.conv_channels == conv_group);
      Bits bits = 0;
      if (exists) {
        bits = base[output * weights.output_stride +
                    (channel - conv_group * packing.conv_channels) * weights.channel_stride + tap * weights.tap_stride];
      }
      shared.weights[at] = bits;
    }
  }
  __syncthreads();

  // Every outer tap has all stripes.
  const int written = all_outer ? packing.outer_taps : 1, step_chunks = step.length * kPackColumns * kRowChunks;
  const int element_stride = !packing.outputs ? line_elements : taps_first ? taps : 1;
  const int column_stride = packing.outputs ? line_elements : taps_first ? taps : 1;
  const int tap_stride = taps_first ? 1 : length;
  for (int index_in_stretch = thread; index_in_stretch < written * step_chunks; index_in_stretch += kPackThreads) {
    const int moved = index_in_stretch / step_chunks, at = index_in_stretch % step_chunks;  // by outer taps
    const int slot = at % kRowChunks, column = at / kRowChunks % kPackColumns, place = at / (kPackColumns * kRowChunks);
    const int pair = place * kRowChunks + slot, tap = pair / step.chunks, chunk = pair % step.chunks;
    Chunk result{{0, 0, 0, 0}};
    if (tap < step.taps) {
      const Bits* from =
          shared.weights + column * column_stride + chunk * kChunk * element_stride + (moved + tap) * tap_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kChunk == 8) {
          result.word[i] = from[2 * i * element_stride] | uint32_t{from[(2 * i + 1) * element_stride]} << 16;
        } else {
          const uint32_t bits = from[i * element_stride];
          result.word[i] = kKind == Kind::kTF32 ? round_to_tf32(bits_to_float(bits)) : bits;
        }
      }
    }
    const int local = column_begin + column, row = packing.permuted ? permuted_row(local) : local;
    Chunk* to = packed + (int64_t{moved} * packing.stripes + outer) * packing.stripe_chunks() +
                (first_step + place) * packing.step_chunks();
    to[row * kRowChunks + (slot ^ row % kRowChunks)] = result;
    if (moved == 0 && outer == 0 && local == 0) {
      Step here = step;
      here.index = place;
      reinterpret_cast<Pair*>(packed + packing.weight_chunks())[first_step * kRowChunks + pair] =
          Pair(reduction, here, slot);
    }
  }
}

// Weights packed for one kernel, kept alive.
class PackedWeightTensor {
 public:
  template <Kind kKind>
  PackedWeightTensor(std::integral_constant<Kind, kKind>, const DeviceScope& device, const Tensor& like,
                     const Packing& packing, const WeightsView<const Element<kKind>>& weights)
      : tensor_(torch::stable::empty(std::array<int64_t, 1>{packing.total_chunks() * kChunkBytes}, ScalarType::Byte,
                                     std::nullopt, like.device())) {
    DCN_CHECK(packing.total_chunks() <= kMostChunks, "deform_conv2d: weight takes ",
              packing.total_chunks() * kChunkBytes,
              " bytes in the order in which the tensor cores read it, but at most ", kMostChunks * kChunkBytes,
              " are supported");
    DCN_LAUNCH(pack_kernel<kKind>, pack_blocks(packing), kPackThreads, device.stream(), packing, weights,
               static_cast<Chunk*>(tensor_.mutable_data_ptr()));
  }
  const Chunk* chunks() const { return static_cast<const Chunk*>(tensor_.const_data_ptr()); }

 private:
  Tensor tensor_;
};

template <Kind kKind>
using KindConstant = std::integral_constant<Kind, kKind>;

}  // namespace dcn::cuda
