// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The implicit matrix product on tensor cores: rows that a Gather puts together in shared memory, by packed weights.
// The forward pass of deform_conv2d gathers samples (sample_gather.cuh). The gradient by the input gathers output
// gradients (list_gather.cuh).
#pragma once

#include "cuda/deform_conv2d/tensor_cores/product_results.cuh"

namespace dcn::cuda {

template <Kind kKind, int kColumns, typename Gather>
__global__ void __launch_bounds__((kBlockThreads<kColumns, Gather>), (kProductBlocks<kKind, kColumns, Gather>))
    product_kernel(const ProductSizes sizes, const Gather gather, const Chunk* packed,
                   const ProductOutput<Element<kKind>> output) {
  constexpr int kThreads = kBlockThreads<kColumns, Gather>;
  using Grid = WarpGrid<kColumns, kThreads>;
  constexpr int kStages = kProductStages<kColumns, Gather>;
  constexpr int kStageBytes = kColumns * kRowBytes;
  DCN_DYNAMIC_SHARED(shared);
  // Shared memory holds two tiles of gathered rows, then stages of weights, then the table.
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
  Pair next = pair_of(tile.begin);  // what is gathered next
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
  unsigned half = 0;  // which of the two tiles of gathered rows is multiplied: its offset in bytes
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
    // After the last step nothing is left to gather. With a large table the code runs all the same, on a pair that does
    // not exist: what a thread keeps then lives for one slice only.
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

// Launches all that the product takes: its results, with `bias` added, go to `planes`.
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
  if (splits > 1) add_partials(device, sizes, output);
}

}  // namespace dcn::cuda
