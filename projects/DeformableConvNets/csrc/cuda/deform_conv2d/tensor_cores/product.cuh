// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The implicit matrix product on tensor cores: rows that a Gather puts together in shared memory, by packed weights.
// deform_conv2d's forward gathers samples; its gradient by the input gathers output gradients (sample_lists.cuh).
#pragma once

#include "cuda/deform_conv2d/tensor_cores/reduction.cuh"

namespace dcn::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductRows = 128;  // of a block's tile
constexpr int kOperandBytes = kProductRows * kRowBytes;

// The order in which a product's rows go through a map: by bands of some lines, and column by column therein. So the
// rows of a tile lie close together in both directions, and what they read is read again while it is in the cache.
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
  int rows, image_rows;  // of all images, of one
  PatchOrder order;      // of an image's rows
  int columns;           // of all stripes
  int stripe_tiles;      // of columns
  int splits;            // parts of the sum, each with a result of its own in `partials`, or 1

  DCN_HOST_DEVICE int place(int row) const { return order.place(row % image_rows); }  // on its image's map
  DCN_HOST_DEVICE int row_tiles() const { return (rows + kProductRows - 1) / kProductRows; }
  DCN_HOST_DEVICE int tiles() const { return packing.stripes * stripe_tiles; }  // of columns
  DCN_HOST_DEVICE int64_t work() const { return int64_t{row_tiles()} * tiles() * splits; }
};

// The part of a product that this block computes.
struct ProductTile {
  int stripe, first_column, columns;  // of the stripe's columns, those from the first on
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

  // The first, counted over all stripes.
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

// Threads of a block. With twice as many a tile of 256 columns is gathered once for all of them, by warps which hold no
// more than those of a tile of 128.
template <int kColumns, typename Gather>
constexpr int kBlockThreads =
    kColumns == 256 && Gather::kLean && !kLargeTable<Gather> ? 2 * kProductThreads : kProductThreads;

// How the warps of `kThreads` threads share a tile of kColumns columns.
template <int kColumns, int kThreads>
struct WarpGrid {
  static constexpr int kWarps = kThreads / kWarp, kDown = kColumns / kWarps == 32 ? 2 : 4, kAcross = kWarps / kDown;
  static constexpr int kWarpRows = kProductRows / kDown, kWarpColumns = kColumns / kAcross;
};

// Fewer where the shared memory is needed for columns or the table.
template <int kColumns, typename Gather>
constexpr int kProductStages = kColumns == 256 || kLargeTable<Gather> ? 2 : 3;

// Calls visit(slice) for kCount slices of a step: for all by the same code, or each by its own.
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

// Blocks that a multiprocessor shall hold at least: what the compiler may spend registers on without spilling. Two with
// 128 columns need 200 KB of shared memory, which GPUs before 9.0 and those of 12.0 have not.
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
  // Of channels_last results, and of others: store_tile ends each line of a tile with a chunk.
  constexpr int kElement = static_cast<int>(sizeof(Element<kKind>));
  constexpr int kLast = kProductRows * (kColumns * kElement + kChunkBytes);
  constexpr int kFirst = kColumns * (kProductRows * kElement + kChunkBytes);
  constexpr int kStaged = kLast > kFirst ? kLast : kFirst;
  constexpr int kLoop = 2 * kOperandBytes + kProductStages<kColumns, Gather> * kColumns * kRowBytes;
  return (kLoop > kStaged ? kLoop : kStaged) + static_cast<int>(sizeof(typename Gather::Table));
}

// A warp's part of a tile goes to memory: bias added, through shared memory so that neighbouring threads write
// neighbouring elements.
template <Kind kKind, int kColumns, int kThreads, typename Product>
__device__ __forceinline__ void store_tile(const ProductSizes& sizes, const ProductOutput<Element<kKind>>& output,
                                           const Product& product, int warp_row, int warp_column,
                                           const ProductTile& tile, unsigned char* shared, int* places) {
  const int row_begin = tile.row, column_begin = tile.column(), columns = tile.columns;
  using T = Element<kKind>;
  constexpr int kVector = kChunkElements<kKind>;
  T* staged = reinterpret_cast<T*>(shared);
  const bool channels_last = output.planes.channel_stride == 1;
  const int row_pitch = channels_last ? kColumns + kVector : 1,
            column_pitch = channels_last ? 1 : kProductRows + kVector;
  constexpr int kRowFragments = WarpGrid<kColumns, kThreads>::kWarpRows / 16;
  constexpr int kColumnFragments = WarpGrid<kColumns, kThreads>::kWarpColumns / 8;
#pragma unroll
  for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = warp_column + product.column(j, e);
      const float bias =
          output.bias && column < columns ? static_cast<float>(output.bias[column_begin + column]) : 0.0f;
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        staged[(warp_row + product.row(i, e)) * row_pitch + column * column_pitch] =
            static_cast<T>(product.value[i][j][e] + bias);
      }
    }
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kProductRows) {
    const int row = row_begin + thread;
    places[thread] = row / sizes.image_rows * sizes.image_rows + sizes.place(row);
  }
  __syncthreads();
  const int rows = sizes.rows - row_begin < kProductRows ? sizes.rows - row_begin : kProductRows;
  if (channels_last) {
    // In a channels_last tensor, an image's last place is followed by the next one's first.
    T* first = output.planes.data + column_begin;
    const bool aligned = sizes.columns % kVector == 0 && column_begin % kVector == 0;
    for (int at = thread; at < kProductRows * (kColumns / kVector); at += kThreads) {
      const int row = at / (kColumns / kVector), column = at % (kColumns / kVector) * kVector;
      if (row >= rows || column >= columns) continue;
      T* to = first + int64_t{places[row]} * sizes.columns + column;
      const T* from = staged + row * row_pitch + column;
      if (aligned && column + kVector <= columns) {
        store_chunk(to, *reinterpret_cast<const Chunk*>(from));
      } else {
        for (int e = 0; e < kVector && column + e < columns; ++e) to[e] = from[e];
      }
    }
  } else {
    const int row = thread % kProductRows;
    const int image = places[row] / sizes.image_rows, position = places[row] % sizes.image_rows;
    for (int column = thread / kProductRows; column < columns && column < kColumns; column += kThreads / kProductRows) {
      if (row < rows) {
        output.planes.at(image, column_begin + column, position) = staged[row + column * column_pitch];
      }
    }
  }
}

template <Kind kKind, int kColumns, typename Gather>
__global__ void __launch_bounds__((kBlockThreads<kColumns, Gather>), (kProductBlocks<kKind, kColumns, Gather>))
    product_kernel(const ProductSizes sizes, const Gather gather, const Chunk* packed,
                   const ProductOutput<Element<kKind>> output) {
  constexpr int kThreads = kBlockThreads<kColumns, Gather>;
  using Grid = WarpGrid<kColumns, kThreads>;
  constexpr int kStages = kProductStages<kColumns, Gather>;
  constexpr int kStageBytes = kColumns * kRowBytes;
  DCN_DYNAMIC_SHARED(shared);
  // Two tiles of gathered rows, then stages of weights, then the table.
  const SharedAddress operands = shared_address(shared), stages = operands + 2 * kOperandBytes;
  auto& table = *reinterpret_cast<typename Gather::Table*>(shared + product_bytes<kKind, kColumns, Gather>() -
                                                           sizeof(typename Gather::Table));

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int warp_row = warp / Grid::kAcross * Grid::kWarpRows, warp_column = warp % Grid::kAcross * Grid::kWarpColumns;
  // A thread gathers one chunk of every kGatherRows-th row, so that 8 neighbouring lanes read 128 neighbouring bytes.
  constexpr int kGatherRows = kThreads / kRowChunks, kGathers = kProductRows / kGatherRows;
  const int gather_row = thread / kRowChunks, gather_column = thread % kRowChunks;
  unsigned char* const gathered = shared + swizzled(gather_row, gather_column);
  const Packing& packing = sizes.packing;
  const int steps = packing.reduction.steps();

  const ProductTile tile(sizes, steps, kColumns);

  // Indices take fewer registers than pointers.
  const uint32_t weights =
      static_cast<uint32_t>(tile.stripe * packing.stripe_chunks()) + tile.first_column * kRowChunks + thread;
  SharedAddress next_stage = stages + thread * kChunkBytes;
  const auto copy_weights = [&](int step) {
    if (step < tile.end) {
      const Chunk* from = packed + (weights + static_cast<uint32_t>(step * packing.step_chunks()));
#pragma unroll
      for (int i = 0; i < kColumns * kRowChunks / kThreads; ++i) {
        copy_async(next_stage + i * kThreads * kChunkBytes, from + i * kThreads);
      }
    }
    commit_copies();
    next_stage += next_stage < stages + (kStages - 1) * kStageBytes ? kStageBytes : -(kStages - 1) * kStageBytes;
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_weights(tile.begin + i);

  const auto pair_of = [&](int step) {
    return reinterpret_cast<const Pair*>(packed + packing.weight_chunks())[step * kRowChunks + gather_column];
  };
  Pair next = pair_of(tile.begin);  // that is gathered
  typename GatherState<kColumns, Gather>::Type state(gather, tile.column());
  state.fill(table, gather, sizes, tile.row, Step(packing.reduction, tile.begin));
  __syncthreads();
  for_slices<kLargeTable<Gather>, kGathers>([&](int slice) {
    state.start(table, gather, next, gather_row + kGatherRows * slice);
    *reinterpret_cast<Chunk*>(gathered + kGatherRows * slice * kRowBytes) = state.finish(gather);
  });
  const auto pair_after = [&](int step) { return pair_of(step + 1 < tile.end ? step + 1 : tile.end - 1); };
  next = pair_after(tile.begin);

  WarpProduct<kKind, Grid::kWarpRows / 16, Grid::kWarpColumns / 8> product;
  SharedAddress stage = stages;
  unsigned half = 0;  // of the gathered rows, in bytes
  for (int step = tile.begin; step < tile.end; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    copy_weights(step + kStages - 1);
    const bool more = step + 1 < tile.end;
    if (more) {
      if (next.starts_segment()) {
        state.fill(table, gather, sizes, tile.row, Step(packing.reduction, step + 1));
        __syncthreads();
      }
    }
    const Pair after_next = pair_after(step + 1);
    // After the last step nothing is gathered; with a large table by the same code, so that what a thread keeps lives
    // for a slice only.
    const bool any = kLargeTable<Gather> || more;
    if (kLargeTable<Gather> && !more) next.bits = 0;
    const unsigned next_half = half ^ kOperandBytes;
    for_slices<kLargeTable<Gather>, 4>([&](int slice) {
      // What is loaded here arrives while the tensor cores are busy.
      const bool gathers = any && slice < kGathers;
      if (gathers) state.start(table, gather, next, gather_row + kGatherRows * slice);
      product.add_slice(operands + half, warp_row, stage, warp_column, slice);
      if (gathers) {
        *reinterpret_cast<Chunk*>(gathered + next_half + kGatherRows * slice * kRowBytes) = state.finish(gather);
      }
    });
    product.end_step();
    next = after_next;
    half = next_half;
    stage += stage < stages + (kStages - 1) * kStageBytes ? kStageBytes : -(kStages - 1) * kStageBytes;
  }
  wait_copies<0>();
  __syncthreads();

  // Computed again, so that the loop need not keep it in registers.
  const ProductTile result(sizes, steps, kColumns);
  if (sizes.splits == 1) {
    store_tile<kKind, kColumns, kThreads>(sizes, output, product, warp_row, warp_column, result, shared,
                                          reinterpret_cast<int*>(&table));
    return;
  }
  float* partials = output.partials + int64_t{result.split} * sizes.rows * sizes.columns + result.column();
#pragma unroll
  for (int i = 0; i < Grid::kWarpRows / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = result.row + warp_row + product.row(i, e);
      float* to = partials + int64_t{row} * sizes.columns;
#pragma unroll
      for (int j = 0; j < Grid::kWarpColumns / 8; ++j) {
        const int column = warp_column + product.column(j, e);
        if (row < sizes.rows && column < result.columns) to[column] = product.value[i][j][e];
      }
    }
  }
}

constexpr int kFinishTile = 32;

// Adds up partials in their order, and the bias. A block writes tiles of 32 rows by 32 columns, with 8 rows of threads.
template <typename T>
__global__ void __launch_bounds__(256, 1) finish_kernel(const ProductSizes sizes, const ProductOutput<T> output) {
  struct Shared {
    float value[kFinishTile][kFinishTile + 1];
  };
  DCN_SHARED(Shared, shared);
  const int x = static_cast<int>(threadIdx.x) % kFinishTile, y = static_cast<int>(threadIdx.x) / kFinishTile;
  const int64_t column_tiles = divide_up(sizes.columns, kFinishTile);
  const bool channels_last = output.planes.channel_stride == 1;
  for (int64_t work = blockIdx.x; work < divide_up(sizes.rows, kFinishTile) * column_tiles; work += gridDim.x) {
    const int64_t row_begin = work / column_tiles * kFinishTile, column_begin = work % column_tiles * kFinishTile;
    for (int i = y; i < kFinishTile; i += 8) {
      const int64_t row = row_begin + i, column = column_begin + x;
      if (row >= sizes.rows || column >= sizes.columns) continue;
      float sum = output.bias ? static_cast<float>(output.bias[column]) : 0.0f;
      for (int k = 0; k < sizes.splits; ++k)
        sum += output.partials[(int64_t{k} * sizes.rows + row) * sizes.columns + column];
      if (channels_last) {
        const int image = static_cast<int>(row) / sizes.image_rows, place = sizes.place(static_cast<int>(row));
        output.planes.at(image, column, place) = static_cast<T>(sum);
      } else {
        shared.value[i][x] = sum;
      }
    }
    if (channels_last) continue;
    __syncthreads();
    for (int i = y; i < kFinishTile; i += 8) {
      const int64_t row = row_begin + x, column = column_begin + i;
      if (row >= sizes.rows || column >= sizes.columns) continue;
      const int image = static_cast<int>(row) / sizes.image_rows, place = sizes.place(static_cast<int>(row));
      output.planes.at(image, column, place) = static_cast<T>(shared.value[x][i]);
    }
    __syncthreads();
  }
}

// The same for channels_last results of a multiple of kFinishTogether columns: a thread adds up neighbouring ones.
constexpr int kFinishTogether = 4;

template <typename T>
__global__ void __launch_bounds__(256) finish_together_kernel(const ProductSizes sizes, const ProductOutput<T> output) {
  struct alignas(kFinishTogether * sizeof(T)) Together {
    T value[kFinishTogether];
  };
  // As sums are only split where partial results are small, all of them can be counted in 31 bits.
  const int count = sizes.rows * sizes.columns;
  for (int64_t chunk = int64_t{blockIdx.x} * 256 + threadIdx.x; chunk < count / kFinishTogether;
       chunk += int64_t{gridDim.x} * 256) {
    const int at = static_cast<int>(chunk) * kFinishTogether, row = at / sizes.columns;
    const int column = at - row * sizes.columns;
    float sum[kFinishTogether] = {};
    if (output.bias) {
#pragma unroll
      for (int e = 0; e < kFinishTogether; ++e) sum[e] = static_cast<float>(output.bias[column + e]);
    }
#pragma unroll 4
    for (int k = 0; k < sizes.splits; ++k) {
      const Chunk loaded = load_chunk(output.partials + int64_t{k} * count + at);
#pragma unroll
      for (int e = 0; e < kFinishTogether; ++e) sum[e] += bits_to_float(loaded.word[e]);
    }
    Together together;
#pragma unroll
    for (int e = 0; e < kFinishTogether; ++e) together.value[e] = static_cast<T>(sum[e]);
    *reinterpret_cast<Together*>(&output.planes.at(row / sizes.image_rows, column, sizes.place(row))) = together;
  }
}

// The product's results, with `bias` added, in `planes`: launches what that takes.
template <Kind kKind, int kColumns, typename Gather>
void run_product(const DeviceScope& device, const Tensor& like, ProductSizes sizes, const Gather& gather,
                 const WeightsView<const Element<kKind>>& weights, const Element<kKind>* bias,
                 const PlanesView<Element<kKind>>& planes, int splits) {
  using T = Element<kKind>;
  sizes.stripe_tiles = (sizes.packing.columns + kColumns - 1) / kColumns;
  sizes.packing.padded = sizes.stripe_tiles * kColumns;
  sizes.splits = splits;
  const PackedWeightTensor packed(KindConstant<kKind>(), device, like, sizes.packing, weights);
  ProductOutput<T> output{bias, planes, nullptr};
  std::optional<Tensor> partials;
  if (splits > 1) {
    const std::array<int64_t, 1> count{int64_t{splits} * sizes.rows * sizes.columns};
    partials = torch::stable::empty(count, ScalarType::Float, std::nullopt, like.device());
    output.partials = partials->mutable_data_ptr<float>();
  }
  const auto kernel = product_kernel<kKind, kColumns, Gather>;
  constexpr int kThreads = kBlockThreads<kColumns, Gather>;
  DCN_LAUNCH_SHARED(kernel, sizes.work(), kThreads, (product_bytes<kKind, kColumns, Gather>()), device.stream(), sizes,
                    gather, packed.chunks(), output);
  if (splits > 1 && planes.channel_stride == 1 && sizes.columns % kFinishTogether == 0) {
    const int64_t chunks = int64_t{sizes.rows} * sizes.columns / kFinishTogether;
    DCN_LAUNCH(finish_together_kernel<T>, std::min(divide_up(chunks, 256), kMaxBlocks), 256, device.stream(), sizes,
               output);
  } else if (splits > 1) {
    const int64_t tiles = divide_up(sizes.rows, kFinishTile) * divide_up(sizes.columns, kFinishTile);
    DCN_LAUNCH(finish_kernel<T>, std::min(tiles, kMaxBlocks), 256, device.stream(), sizes, output);
  }
}

}  // namespace dcn::cuda
