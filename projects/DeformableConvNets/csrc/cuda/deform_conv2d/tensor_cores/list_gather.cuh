// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Gathers output gradients by lists of samples, for the gradient by the input.
#pragma once

#include "cuda/deform_conv2d/sampling/sample_lists.cuh"
#include "cuda/deform_conv2d/tensor_cores/product_sizes.cuh"

namespace dcn::cuda {

template <Kind kKind>
struct ListGather {
  static constexpr bool kLean = kKind != Kind::kFloat32;  // whether it leaves registers for two blocks

  using T = Element<kKind>;

  DeformConv2dSizes sizes;
  SampleListsView<float> lists;
  const T* grads;                     // (images of the lists, positions, out_channels)
  int group_columns, group_channels;  // columns of the product that read the same channels, and how many those are
  uint32_t pitch;                     // bytes from one position to the next

  // Each half of a block's threads makes the lists of every other tap: kEach taps, or one less.
  static constexpr int kHalves = kProductThreads / kProductRows, kEach = (kMostTaps + kHalves - 1) / kHalves;
  static constexpr int kHalfWarps = kProductRows / kWarp;
  // Entries that a warp has room for, for each of its taps: lists have four on average. A warp whose lists need more
  // room keeps, instead of each long list, only where it is in memory: that takes kPlaceEntries.
  static constexpr int kRoom = 144, kPlaceEntries = 3;
  static_assert(kPlaceEntries * sizeof(ListEntry<float>) == sizeof(PixelSamples<float>));
  static_assert(kPlaceEntries * kWarp <= kRoom);

  static constexpr int kTogether = 4;

  // Where the list of a row and tap is.
  struct List {
    uint32_t bits;

    __device__ __forceinline__ bool elsewhere() const { return bits >> 31; }
    __device__ __forceinline__ int begin() const { return static_cast<int>(bits >> 16 & 0x7fffu); }
    __device__ __forceinline__ int count() const { return static_cast<int>(bits & 0xffffu); }  // 0 if elsewhere
  };
  struct Table {
    ListEntry<float> entries[kMostTaps * kHalfWarps * kRoom];
    List list[kMostTaps][kProductRows];
  };
  static_assert(kMostTaps * kHalfWarps * kRoom < 1 << 15);

  // The chunks of gradients that some entries of a list name.
  template <int kCount>
  struct Group {
    Chunk grad[kCount];

    // Loads the chunks at position(k) for k below `count`, for the channels from `channel` on.
    template <typename Position>
    __device__ __forceinline__ void start(const ListGather& gather, int channel, int count, const Position& position) {
      const char* first = reinterpret_cast<const char*>(gather.grads + channel);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        grad[k] = Chunk{{0, 0, 0, 0}};
        if (k < count) grad[k] = load_chunk(first + multiply_wide(static_cast<uint32_t>(position(k)), gather.pitch));
      }
    }
    template <typename Weight>
    __device__ __forceinline__ void add_to(float (&sum)[kChunkElements<kKind>], int count, const Weight& weight) const {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const float by = k < count ? weight(k) : 0.0f;
        float values[kChunkElements<kKind>];
        to_floats<kKind>(grad[k], values);
#pragma unroll
        for (int e = 0; e < kChunkElements<kKind>; ++e) sum[e] += by * values[e];
      }
    }
  };

  // What a thread keeps. It loads up to kGroups groups of a list before the tensor cores get busy, and the others
  // after.
  template <int kGroups>
  struct BasicState {
    Group<kTogether> group[kGroups];
    List list;
    uint32_t chunk;
    const Table* table;
    int first;  // channel of the conv group

    __device__ __forceinline__ BasicState(const ListGather& gather, int column_begin)
        : first(column_begin / gather.group_columns * gather.group_channels) {}

    __device__ __forceinline__ int channel() const {
      return first + static_cast<int>(chunk >> 6) * kChunkElements<kKind>;
    }

    // Makes the lists of the step's taps. All threads of the block call it together.
    __device__ __forceinline__ void fill(Table& table, const ListGather& gather, const ProductSizes& sizes, int,
                                         const Step& step) {
      // Computed again, so that a loop need not keep it in registers.
      const ProductTile tile(sizes, 0, sizes.packing.padded / sizes.stripe_tiles);
      const int deform_group = tile.column() / static_cast<int>(gather.sizes.deform_channels());
      const int thread = static_cast<int>(thread_index()), row = thread % kProductRows, half = thread / kProductRows;
      const int image = (tile.row + row) / sizes.image_rows, pixel = sizes.place(tile.row + row);
      const int width = static_cast<int>(gather.sizes.width), y = pixel / width, x = pixel % width;
      const int room = (half == 0 ? kEach : kMostTaps - kEach) * kRoom;
      const auto find = [&](int tap) {
        return tap < step.taps && tile.row + row < sizes.rows
                   ? gather.lists.of_pixel(gather.sizes, image, deform_group, step.tap + tap, y, x)
                   : PixelSamples<float>{};
      };
      int slots = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int count = find(half + i * kHalves).count();
        slots += count < room ? count : room + 1;  // the sum fits 32 bits
      }
      int all = slots;
      for (int distance = 1; distance < kWarp; distance *= 2) all += __shfl_xor_sync(kAllLanes, all, distance);
      int most = room;  // entries of a list that are kept here
      if (all > room) {
        most = kPlaceEntries, slots = 0;
#pragma unroll 1
        for (int tap = half; tap < step.taps; tap += kHalves) {
          const int count = find(tap).count();
          slots += count < kPlaceEntries ? count : kPlaceEntries;
        }
      }
      // The lists of lower lanes come first.
      int at = half * kHalfWarps * kEach * kRoom + row / kWarp * room;
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int others = __shfl_xor_sync(kAllLanes, slots, distance);
        if (thread & distance) at += others;
        slots += others;
      }
      // One list after the other, without waiting for the longer ones of other lanes.
      PixelSamples<float> samples{};
#pragma unroll 1
      for (int tap = half - kHalves, k = 0;;) {
        if (k >= samples.count()) {
          tap += kHalves, k = 0;
          if (tap >= step.taps) break;
          samples = find(tap);
          const bool elsewhere = samples.count() > most;
          table.list[tap][row] = {static_cast<uint32_t>(at) << 16 |
                                  (elsewhere ? 1u << 31 : static_cast<uint32_t>(samples.count()))};
          if (elsewhere) {
            *reinterpret_cast<PixelSamples<float>*>(table.entries + at) = samples;
            at += kPlaceEntries, samples = {};
          }
        }
        const int left = samples.count() - k, now = left < kTogether ? left : kTogether;
        ListEntry<float> loaded[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (j < now) loaded[j] = samples.entry(gather.lists.samples, k + j);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (j < now) table.entries[at + j] = loaded[j];
        }
        k += now, at += now;
      }
    }

    // Loads what the first entries of a row's list name.
    __device__ __forceinline__ void start(const Table& lists, const ListGather& gather, const Pair& given, int row) {
      table = &lists, chunk = given.bits;
      list = given.exists() ? table->list[given.tap()][row] : List{0};
      const ListEntry<float>* entries = table->entries + list.begin();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int from = g * kTogether;
        group[g].start(gather, channel(), list.count() - from, [&](int k) { return entries[from + k].position; });
      }
    }
    // Adds them up, together with what else the list has.
    __device__ __forceinline__ Chunk finish(const ListGather& gather) const {
      float sum[kChunkElements<kKind>] = {};
      const int count = list.count();
      const ListEntry<float>* entries = table->entries + list.begin();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int from = g * kTogether;
        if (g > 0 && count <= from) break;
        group[g].add_to(sum, count - from, [&](int k) { return entries[from + k].weight; });
      }
#pragma unroll 1
      for (int k = kGroups * kTogether; k < count; k += kTogether) {
        Group<kTogether> more;
        more.start(gather, channel(), count - k, [&](int j) { return entries[k + j].position; });
        more.add_to(sum, count - k, [&](int j) { return entries[k + j].weight; });
      }
      if (list.elsewhere()) {
        const auto& samples = *reinterpret_cast<const PixelSamples<float>*>(entries);
        const int all = samples.count();
#pragma unroll 1
        for (int k = 0; k < all; ++k) {
          const ListEntry<float> entry = samples.entry(gather.lists.samples, k);
          Group<1> more;
          more.start(gather, channel(), 1, [&](int) { return entry.position; });
          more.add_to(sum, 1, [&](int) { return entry.weight; });
        }
      }
      return to_chunk<kKind>(sum);
    }
  };
  using State = BasicState<1>;
};

// A block with 256 columns is alone on its multiprocessor and has registers for more.
template <Kind kKind>
struct GatherState<256, ListGather<kKind>> {
  using Type = typename ListGather<kKind>::template BasicState<2>;
};

}  // namespace dcn::cuda
