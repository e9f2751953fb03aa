// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The sizes of an implicit matrix product on tensor cores, and how its work is shared out among thread blocks, warps
// and stages of shared memory.
#pragma once

#include "cuda/deform_conv2d/tensor_cores/reduction.cuh"

namespace dcn::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductRows = 128;  // rows of a block's tile
constexpr int kOperandBytes = kProductRows * kRowBytes;

// The order in which a product's rows go through a map: band by band of some lines, and column by column in a band. So
// the rows of a tile lie close together in both directions, and what they read is read again while it is in the cache.
struct PatchOrder {
  static constexpr int kBand = 8;

  int width, height;

  // The place on the map of row `row`.
  DCN_HOST_DEVICE int place(int row) const {
    const int band = row / (kBand * width), rest = row - band * kBand * width, left = height - band * kBand;
    const int line = left >= kBand ? rest % kBand : rest % left, column = left >= kBand ? rest / kBand : rest / left;
    return (band * kBand + line) * width + column;
  }
};

// Sizes of one product: (rows, columns), where rows are the pixels of all images and columns are channels.
struct ProductSizes {
  Packing packing;
  int rows, image_rows;  // rows of all images, and of one
  PatchOrder order;      // the order of an image's rows
  int columns;           // columns of all stripes
  int stripe_tiles;      // tiles of a stripe's columns
  int splits;            // how many blocks share a sum; if more than 1, each has a result in `partials`

  DCN_HOST_DEVICE int place(int row) const { return order.place(row % image_rows); }  // on its image's map
  DCN_HOST_DEVICE int row_tiles() const { return (rows + kProductRows - 1) / kProductRows; }
  DCN_HOST_DEVICE int tiles() const { return packing.stripes * stripe_tiles; }  // of the columns
  DCN_HOST_DEVICE int64_t work() const { return int64_t{row_tiles()} * tiles() * splits; }
};

// What this thread block computes of a product.
struct ProductTile {
  int stripe, first_column, columns;  // the stripe's columns from the first one on, and how many those are
  int stripe_columns;
  int row;    // the first
  int split;  // sums over steps [begin, end)
  int begin, end;

  __device__ __forceinline__ ProductTile(const ProductSizes& sizes, int steps, int tile_columns) {
    const int block = static_cast<int>(block_index()), index = block % sizes.tiles(), rest = block / sizes.tiles();
    stripe = index / sizes.stripe_tiles, first_column = index % sizes.stripe_tiles * tile_columns;
    stripe_columns = sizes.packing.columns, columns = stripe_columns - first_column;
    row = rest % sizes.row_tiles() * kProductRows, split = rest / sizes.row_tiles();
    begin = static_cast<int>(int64_t{steps} * split / sizes.splits);
    end = static_cast<int>(int64_t{steps} * (split + 1) / sizes.splits);
  }

  // The first column, counted over all stripes.
  __device__ __forceinline__ int column() const { return stripe * stripe_columns + first_column; }
};

template <typename T>
struct ProductOutput {
  const T* bias;  // by column, or null
  PlanesView<T> planes;
  float* partials;  // (splits, rows, columns), where the sum is split
};

// Whether a gather has a large table, and much code that reads it.
template <typename Gather>
constexpr bool kLargeTable = sizeof(typename Gather::Table) > 2 * kOperandBytes;

// Threads of a block. A tile of 256 columns has twice as many threads as others, so that it is gathered once for all of
// its columns and a warp holds no more than in a tile of 128.
template <int kColumns, typename Gather>
constexpr int kBlockThreads =
    kColumns == 256 && Gather::kLean && !kLargeTable<Gather> ? 2 * kProductThreads : kProductThreads;

// How the warps of `kThreads` threads share a tile of kColumns columns.
template <int kColumns, int kThreads>
struct WarpGrid {
  static constexpr int kWarps = kThreads / kWarp, kDown = kColumns / kWarps == 32 ? 2 : 4, kAcross = kWarps / kDown;
  static constexpr int kWarpRows = kProductRows / kDown, kWarpColumns = kColumns / kAcross;
};

// Stages of weights in shared memory: fewer where the columns or the table need the memory.
template <int kColumns, typename Gather>
constexpr int kProductStages = kColumns == 256 || kLargeTable<Gather> ? 2 : 3;

// Calls visit(slice) for kCount slices of a step, in a loop if kSameCode, else unrolled.
template <bool kSameCode, int kCount, typename Visit>
__device__ __forceinline__ void for_slices(const Visit& visit) {
  if constexpr (kSameCode) {
#pragma unroll 1
    for (int slice = 0; slice < kCount; ++slice) visit(slice);
  } else {
#pragma unroll
    for (int slice = 0; slice < kCount; ++slice) visit(slice);
  }
}

// What a thread keeps of a gather.
template <int kColumns, typename Gather>
struct GatherState {
  using Type = typename Gather::State;
};

// Blocks that a multiprocessor must hold at least. The compiler may use as many registers as that leaves, and then
// spills none. Two blocks with 128 columns need 200 KB of shared memory, which GPUs before 9.0 and those of 12.0 do not
// have.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kMostSharedColumns = 64;
#else
constexpr int kMostSharedColumns = 128;
#endif
template <Kind kKind, int kColumns, typename Gather>
constexpr int kProductBlocks = kColumns > kMostSharedColumns || kKind == Kind::kFloat32 || !Gather::kLean ? 1 : 2;

// Bytes of dynamic shared memory of product_kernel.
template <Kind kKind, int kColumns, typename Gather>
constexpr int product_bytes() {
  // The bytes of a tile's results, channels_last and otherwise: store_tile pads each line of a tile by a chunk.
  constexpr int kElement = static_cast<int>(sizeof(Element<kKind>));
  constexpr int kLast = kProductRows * (kColumns * kElement + kChunkBytes);
  constexpr int kFirst = kColumns * (kProductRows * kElement + kChunkBytes);
  constexpr int kStaged = kLast > kFirst ? kLast : kFirst;
  constexpr int kLoop = 2 * kOperandBytes + kProductStages<kColumns, Gather> * kColumns * kRowBytes;
  return (kLoop > kStaged ? kLoop : kStaged) + static_cast<int>(sizeof(typename Gather::Table));
}

}  // namespace dcn::cuda
