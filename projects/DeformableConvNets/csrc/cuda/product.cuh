// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The implicit matrix product on tensor cores: rows that a Gather puts together in shared memory, by packed weights.
// deform_conv2d's forward gathers samples; its gradient by the input gathers output gradients (sample_lists.cuh).
#pragma once

#include "reduction.cuh"

namespace dcn::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductRows = 128;  // of a block's tile
constexpr int kOperandBytes = kProductRows * kRowBytes;

// Sizes of one product: (rows, columns), where rows are the pixels of all images and columns are channels.
struct ProductSizes {
  Packing packing;
  int rows, image_rows;  // of all images, of one
  int columns;           // of all segments
  int segment_tiles;     // of columns
  int splits;            // parts of the sum, each with a result of its own in `partials`, or 1

  DCN_HOST_DEVICE int row_tiles() const { return (rows + kProductRows - 1) / kProductRows; }
  DCN_HOST_DEVICE int tiles() const { return packing.segments * segment_tiles; }  // of columns
  DCN_HOST_DEVICE int64_t work() const { return int64_t{row_tiles()} * tiles() * splits; }
};

// The part of a product that this block computes.
struct ProductTile {
  int segment, first_column, columns;  // of the segment's columns, those from the first on
  int segment_columns;
  int row;    // the first
  int split;  // sums over steps [begin, end)
  int begin, end;

  __device__ __forceinline__ ProductTile(const ProductSizes& sizes, int steps, int tile_columns) {
    const int block = static_cast<int>(block_index()), index = block % sizes.tiles(), rest = block / sizes.tiles();
    segment = index / sizes.segment_tiles, first_column = index % sizes.segment_tiles * tile_columns;
    segment_columns = sizes.packing.columns, columns = segment_columns - first_column;
    row = rest % sizes.row_tiles() * kProductRows, split = rest / sizes.row_tiles();
    begin = static_cast<int>(int64_t{steps} * split / sizes.splits);
    end = static_cast<int>(int64_t{steps} * (split + 1) / sizes.splits);
  }

  // The first, counted over all segments.
  __device__ __forceinline__ int column() const { return segment * segment_columns + first_column; }
};

// How 8 warps share a tile of kColumns columns.
template <int kColumns>
struct WarpGrid {
  static constexpr int kDown = kColumns == 256 ? 2 : 4, kAcross = 8 / kDown;
  static constexpr int kWarpRows = kProductRows / kDown, kWarpColumns = kColumns / kAcross;
};

template <typename T>
struct ProductOutput {
  const T* bias;  // by column, or null
  Planes<T> planes;
  float* partials;  // (splits, rows, columns), where the sum is split
};

// Whether a gather has a large table, and much code that reads it.
template <typename Gather>
constexpr bool kLargeTable = sizeof(typename Gather::Table) > 2 * kOperandBytes;

// Fewer where the shared memory is needed for columns or the table.
template <int kColumns, typename Gather>
constexpr int kProductStages = kColumns == 256 || kLargeTable<Gather> ? 2 : 3;

// Calls visit(slice) for the four slices of a step: for all by the same code, or each by its own.
template <bool kSameCode, typename Visit>
__device__ __forceinline__ void for_slices(const Visit& visit) {
  if constexpr (kSameCode) {
#pragma unroll 1
    for (int slice = 0; slice < 4; ++slice) visit(slice);
  } else {
#pragma unroll
    for (int slice = 0; slice < 4; ++slice) visit(slice);
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
  constexpr int kStaged = kProductRows * (kColumns * static_cast<int>(sizeof(Element<kKind>)) + kUnitBytes);
  constexpr int kLoop = 2 * kOperandBytes + kProductStages<kColumns, Gather> * kColumns * kRowBytes;
  return (kLoop > kStaged ? kLoop : kStaged) + static_cast<int>(sizeof(typename Gather::Table));
}

// A warp's part of a tile goes to memory: bias added, through shared memory so that neighbouring threads write
// neighbouring elements.
template <Kind kKind, int kColumns, typename Product>
__device__ __forceinline__ void store_tile(const ProductSizes& sizes, const ProductOutput<Element<kKind>>& output,
                                           const Product& product, int warp_row, int warp_column,
                                           const ProductTile& tile, unsigned char* shared) {
  const int row_begin = tile.row, column_begin = tile.column(), columns = tile.columns;
  using T = Element<kKind>;
  constexpr int kVector = kUnitElements<kKind>;
  T* staged = reinterpret_cast<T*>(shared);
  const bool channels_last = output.planes.channel_stride == 1;
  const int row_pitch = channels_last ? kColumns + kVector : 1,
            column_pitch = channels_last ? 1 : kProductRows + kVector;
  constexpr int kRowFragments = WarpGrid<kColumns>::kWarpRows / 16;
  constexpr int kColumnFragments = WarpGrid<kColumns>::kWarpColumns / 8;
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
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int rows = sizes.rows - row_begin < kProductRows ? sizes.rows - row_begin : kProductRows;
  if (channels_last) {
    // Of a channels_last tensor, rows follow each other without gaps, also those of the next image.
    T* first = output.planes.data + int64_t{row_begin} * sizes.columns + column_begin;
    const bool aligned = sizes.columns % kVector == 0 && column_begin % kVector == 0;
    for (int at = thread; at < kProductRows * (kColumns / kVector); at += kProductThreads) {
      const int row = at / (kColumns / kVector), column = at % (kColumns / kVector) * kVector;
      if (row >= rows || column >= columns) continue;
      T* to = first + int64_t{row} * sizes.columns + column;
      const T* from = staged + row * row_pitch + column;
      if (aligned && column + kVector <= columns) {
        store_unit(to, *reinterpret_cast<const Unit*>(from));
      } else {
        for (int e = 0; e < kVector && column + e < columns; ++e) to[e] = from[e];
      }
    }
  } else {
    const int row = thread % kProductRows;
    const int image = (row_begin + row) / sizes.image_rows, position = (row_begin + row) % sizes.image_rows;
    for (int column = thread / kProductRows; column < columns && column < kColumns;
         column += kProductThreads / kProductRows) {
      if (row < rows) {
        output.planes.at(image, column_begin + column, position) = staged[row + column * column_pitch];
      }
    }
  }
}

template <Kind kKind, int kColumns, typename Gather>
__global__ void __launch_bounds__(kProductThreads, (kProductBlocks<kKind, kColumns, Gather>))
    product_kernel(const ProductSizes sizes, const Gather gather, const Unit* packed,
                   const ProductOutput<Element<kKind>> output) {
  using Grid = WarpGrid<kColumns>;
  constexpr int kStages = kProductStages<kColumns, Gather>;
  constexpr int kStageBytes = kColumns * kRowBytes;
  DCN_DYNAMIC_SHARED(shared);
  // Two tiles of gathered rows, then stages of weights, then the table.
  const SharedAddress operands = shared_address(shared), stages = operands + 2 * kOperandBytes;
  auto& table = *reinterpret_cast<typename Gather::Table*>(shared + product_bytes<kKind, kColumns, Gather>() -
                                                           sizeof(typename Gather::Table));

  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int warp_row = warp / Grid::kAcross * Grid::kWarpRows, warp_column = warp % Grid::kAcross * Grid::kWarpColumns;
  // A thread gathers one unit of every 32nd row, so that 8 neighbouring lanes read 128 neighbouring bytes.
  const int gather_row = thread / kRowUnits, gather_column = thread % kRowUnits;
  unsigned char* const gathered = shared + swizzled(gather_row, gather_column);
  const Packing& packing = sizes.packing;
  const int steps = packing.reduction.steps();

  const ProductTile tile(sizes, steps, kColumns);

  const Unit* weights = packed + tile.segment * packing.segment_units() + tile.first_column * kRowUnits + thread;
  SharedAddress next_stage = stages + thread * kUnitBytes;
  const auto copy_weights = [&](int step) {
    if (step < tile.end) {
      const Unit* from = weights + step * packing.step_units();
#pragma unroll
      for (int i = 0; i < kColumns * kRowUnits / kProductThreads; ++i) {
        copy_async(next_stage + i * kProductThreads * kUnitBytes, from + i * kProductThreads);
      }
    }
    commit_copies();
    next_stage += next_stage < stages + (kStages - 1) * kStageBytes ? kStageBytes : -(kStages - 1) * kStageBytes;
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_weights(tile.begin + i);

  const Pair* pairs = reinterpret_cast<const Pair*>(packed + packing.weight_units()) + gather_column;
  Pair next = pairs[tile.begin * kRowUnits];  // that is gathered
  typename GatherState<kColumns, Gather>::Type state(gather, tile.column());
  state.fill(table, gather, sizes, tile.row, Step(packing.reduction, tile.begin));
  __syncthreads();
  static_assert(kProductRows * kRowUnits == 4 * kProductThreads);
  for_slices<kLargeTable<Gather>>([&](int slice) {
    state.start(table, gather, next, gather_row + 32 * slice);
    *reinterpret_cast<Unit*>(gathered + 32 * slice * kRowBytes) = state.finish(gather);
  });
  const auto pair_after = [&](int step) { return pairs[(step + 1 < tile.end ? step + 1 : tile.end - 1) * kRowUnits]; };
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
    const bool gathers = kLargeTable<Gather> || more;
    if (kLargeTable<Gather> && !more) next.bits = 0;
    const unsigned next_half = half ^ kOperandBytes;
    for_slices<kLargeTable<Gather>>([&](int slice) {
      // What is loaded here arrives while the tensor cores are busy.
      if (gathers) state.start(table, gather, next, gather_row + 32 * slice);
      product.add_slice(operands + half, warp_row, stage, warp_column, slice);
      if (gathers) *reinterpret_cast<Unit*>(gathered + next_half + 32 * slice * kRowBytes) = state.finish(gather);
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
    store_tile<kKind, kColumns>(sizes, output, product, warp_row, warp_column, result, shared);
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
        output.planes.data[row * sizes.columns + column] = static_cast<T>(sum);
      } else {
        shared.value[i][x] = sum;
      }
    }
    if (channels_last) continue;
    __syncthreads();
    for (int i = y; i < kFinishTile; i += 8) {
      const int64_t row = row_begin + x, column = column_begin + i;
      if (row >= sizes.rows || column >= sizes.columns) continue;
      output.planes.at(row / sizes.image_rows, column, row % sizes.image_rows) = static_cast<T>(shared.value[x][i]);
    }
    __syncthreads();
  }
}

// The product's results, with `bias` added, in `planes`: launches what that takes.
template <Kind kKind, int kColumns, typename Gather>
void run_product(const DeviceScope& device, const Tensor& like, ProductSizes sizes, const Gather& gather,
                 const Weights<const Element<kKind>>& weights, const Element<kKind>* bias,
                 const Planes<Element<kKind>>& planes, int splits) {
  using T = Element<kKind>;
  sizes.segment_tiles = (sizes.packing.columns + kColumns - 1) / kColumns;
  sizes.packing.padded = sizes.segment_tiles * kColumns;
  sizes.splits = splits;
  const PackedWeights packed(KindConstant<kKind>(), device, like, sizes.packing, weights);
  ProductOutput<T> output{bias, planes, nullptr};
  std::optional<Tensor> partials;
  if (splits > 1) {
    const std::array<int64_t, 1> count{int64_t{splits} * sizes.rows * sizes.columns};
    partials = torch::stable::empty(count, ScalarType::Float, std::nullopt, like.device());
    output.partials = partials->mutable_data_ptr<float>();
  }
  const auto kernel = product_kernel<kKind, kColumns, Gather>;
  DCN_LAUNCH_SHARED(kernel, sizes.work(), kProductThreads, (product_bytes<kKind, kColumns, Gather>()), device.stream(),
                    sizes, gather, packed.units(), output);
  if (splits > 1) {
    const int64_t tiles = divide_up(sizes.rows, kFinishTile) * divide_up(sizes.columns, kFinishTile);
    DCN_LAUNCH(finish_kernel<T>, std::min(tiles, kMaxBlocks), 256, device.stream(), sizes, output);
  }
}

}  // namespace dcn::cuda
