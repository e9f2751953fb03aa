// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The gradient by the weight on tensor cores: the product of output gradients and samples, which are gathered again,
// summed over positions. Positions are rows in shared memory, so operands are read transposed.
#pragma once

#include "cuda/deform_conv2d/tensor_cores/sample_gather.cuh"

namespace dcn::cuda {

// Positions that are summed over in one step: four fragments.
template <Kind kKind>
constexpr int kWeightPositions = 8 * kChunkElements<kKind>;

// Where a chunk of a position lies. A position's chunks are cut into lines of 128 bytes. First come the first lines of
// all positions, then the second ones, and so on. The chunks of a line are permuted so that both the gather and the
// transposed reading use all banks.
template <Kind kKind>
DCN_HOST_DEVICE unsigned position_chunk(unsigned position, unsigned chunk) {
  const unsigned key = kChunkElements<kKind> == 8 ? position % 8 : position % 4 * 2;
  return (chunk / kRowChunks * kWeightPositions<kKind> + position) * kRowBytes +
         (chunk % kRowChunks ^ key) * kChunkBytes;
}

struct WeightGradientSizes {
  Reduction reduction;  // the segments and chunks of one group's channels
  int groups, group_channels, group_outputs;
  int conv_channels, conv_outputs;  // channels of a group of the convolution; several of those may be one group here
  int rows, positions;              // positions of all images, and of one
  int deform_channels;
  int segment_tiles, output_tiles;
  int splits;

  DCN_HOST_DEVICE int channel_tiles() const { return groups * reduction.segments * segment_tiles; }
  DCN_HOST_DEVICE int64_t work() const { return int64_t{channel_tiles()} * reduction.taps * output_tiles * splits; }
};

// How a block's tile of kOutputs output channels by kChannels input channels lies in shared memory, and who does what.
template <Kind kKind, int kOutputs, int kChannels>
struct WeightGradientTile {
  static constexpr int kPositions = kWeightPositions<kKind>;
  static constexpr int kGradChunks = kOutputs / kChunkElements<kKind>,
                       kSampleChunks = kChannels / kChunkElements<kKind>;
  static constexpr int kGradBytes = kPositions * kGradChunks * kChunkBytes;
  static constexpr int kSampleBytes = kPositions * kSampleChunks * kChunkBytes;
  // A warp has 32 output channels by kWarpChannels input channels.
  static constexpr int kWarpChannels = kOutputs * kChannels / 256, kWarpsAcross = kChannels / kWarpChannels;
  // Rows that all threads gather or copy together, and how often they do so in a step.
  static constexpr int kGatherRows = kProductThreads / kSampleChunks, kGathers = kPositions / kGatherRows;
  static constexpr int kCopyRows = kProductThreads / kGradChunks, kCopies = kPositions / kCopyRows;
  // The steps for which all threads locate one sample each.
  static constexpr int kLocatedSteps = kProductThreads / kPositions;
  static_assert(kOutputs / 32 * kWarpsAcross == kProductThreads / kWarp);
  // All of a thread's rows are permuted alike.
  static_assert(kGatherRows % kChunkElements<kKind> == 0 && kCopyRows % kChunkElements<kKind> == 0);

  struct Shared {
    unsigned char grads[2][kGradBytes];
    unsigned char samples[2][kSampleBytes];
    KeptSample<kKind> places[2 * kProductThreads];
    int deform_group, tap;  // those of the block: in shared memory they take no registers
  };
};

// A warp's operands in shared memory: output gradients, of 32 output channels, and samples, of kColumns times 8.
template <Kind kKind, int kColumns>
struct TransposedOperands {
  unsigned left, right;  // for elements of 16 bits: where the first row of the lane's matrices lies

  __device__ __forceinline__ TransposedOperands(int output, int channel) {
    const unsigned lane = threadIdx.x % kWarp;
    left = position_chunk<kKind>(lane % 8 + lane / 16 * 8, output / 8 + lane / 8 % 2);
    right = position_chunk<kKind>(lane % 16, channel / 8 + lane / 16);
  }

  // Adds the products of a quarter of the positions.
  __device__ __forceinline__ void add_slice(WarpProduct<kKind, 2, kColumns, true>& product, const unsigned char* grads,
                                            int output, const unsigned char* samples, int channel, int slice) const {
    uint32_t a[2][4];
    if constexpr (kChunkElements<kKind> == 8) {
      // Rows are aligned, so that the bits of the chunk are bits of the address.
      const int offset = slice * 16 * kRowBytes;
      const SharedAddress first = shared_address(const_cast<unsigned char*>(grads)) + left;
      const SharedAddress rows[2] = {first + offset, flip(first, 2 * kChunkBytes) + offset};
      load_matrices<2, true>(a, rows);
      const SharedAddress columns = shared_address(const_cast<unsigned char*>(samples)) + right;
#pragma unroll
      for (unsigned j = 0; j < kColumns; j += 2) {
        uint32_t pair[1][4];
        const SharedAddress at[1] = {flip(columns, j * kChunkBytes) + offset};
        load_matrices<1, true>(pair, at);
        const uint32_t b[2][2] = {{pair[0][0], pair[0][1]}, {pair[0][2], pair[0][3]}};
        product.add(static_cast<int>(j), a, b);
      }
    } else {
      // Elements of 32 bits are read one by one.
      const auto element = [](const unsigned char* rows, unsigned position, unsigned column) {
        return *reinterpret_cast<const uint32_t*>(rows + position_chunk<kKind>(position, column / 4) + column % 4 * 4);
      };
      const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = slice * 8 + lane % 4;
#pragma unroll
      for (unsigned i = 0; i < 2; ++i) {
#pragma unroll
        for (unsigned k = 0; k < 4; ++k) a[i][k] = element(grads, t + k / 2 * 4, output + 16 * i + g + k % 2 * 8);
      }
      product.round_raw(a);
#pragma unroll
      for (unsigned j = 0; j < kColumns; j += 2) {
        uint32_t b[2][2];
#pragma unroll
        for (unsigned k = 0; k < 4; ++k) {
          b[k / 2][k % 2] = element(samples, t + k % 2 * 4, channel + 8 * (j + k / 2) + g);
        }
        product.add(static_cast<int>(j), a, b);
      }
    }
  }
};

// What a block computes.
struct WeightGradientShare {
  // The tile's first output channel, counted in its group, and its first input channel, counted over all and in its
  // segment.
  int output, channel, local;
  int tap, split;

  template <int kOutputs, int kChannels>
  __device__ __forceinline__ static WeightGradientShare of_block(const WeightGradientSizes& sizes,
                                                                 int segment_channels) {
    int index = static_cast<int>(block_index());
    WeightGradientShare share;
    share.output = index % sizes.output_tiles * kOutputs;
    index /= sizes.output_tiles;
    const int tile = index % sizes.channel_tiles();
    index /= sizes.channel_tiles();
    share.tap = index % sizes.reduction.taps, share.split = index / sizes.reduction.taps;
    share.local = tile % sizes.segment_tiles * kChannels;
    share.channel = tile / sizes.segment_tiles * segment_channels + share.local;
    return share;
  }
};

// Blocks that a multiprocessor must hold at least: two of the larger tiles only where there is shared memory for them.
DCN_HOST_DEVICE constexpr int weight_gradient_blocks(Kind kind, int outputs, int channels, int capability) {
  const bool room = capability >= 90 && capability < 120;
  return kind == Kind::kFloat32 || (outputs * channels > 128 * 64 && !room) ? 1 : 2;
}

// A block sums one tap of up to kOutputs output channels by up to kChannels input channels over a split of the
// positions.
template <Kind kKind, int kOutputs, int kChannels>
__global__ void __launch_bounds__(kProductThreads,
                                  (weight_gradient_blocks(kKind, kOutputs, kChannels, kCompiledCapability)))
    weight_gradient_tensor_kernel(const WeightGradientSizes sizes, const OperandsView<Element<kKind>> operands,
                                  const Element<kKind>* grads, float* partials) {
  using T = Element<kKind>;
  using Tile = WeightGradientTile<kKind, kOutputs, kChannels>;
  constexpr int kChunk = kChunkElements<kKind>, kPositions = Tile::kPositions, kGathers = Tile::kGathers;
  constexpr int kColumns = Tile::kWarpChannels / 8;
  DCN_DYNAMIC_SHARED(dynamic);
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(dynamic);
  const DeformConv2dSizes& s = operands.sizes;
  const int channels = static_cast<int>(s.channels), width = static_cast<int>(s.width);
  const int out_channels = static_cast<int>(s.out_channels), taps = sizes.reduction.taps;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int warp_output = warp / Tile::kWarpsAcross * 32;
  const int warp_channel = warp % Tile::kWarpsAcross * Tile::kWarpChannels;

  const int segment_channels = sizes.reduction.chunks * kChunk;
  const auto share = WeightGradientShare::of_block<kOutputs, kChannels>(sizes, segment_channels);
  const int group = share.channel / sizes.group_channels;
  const int steps = (sizes.rows + kPositions - 1) / kPositions;
  const int begin = static_cast<int>(int64_t{steps} * share.split / sizes.splits);
  const int end = static_cast<int>(int64_t{steps} * (share.split + 1) / sizes.splits);

  const int copy_row = thread / Tile::kGradChunks, copy_output = share.output + thread % Tile::kGradChunks * kChunk;
  const T* copy_from = grads + (int64_t{begin} * kPositions + copy_row) * out_channels + group * sizes.group_outputs +
                       copy_output;  // for the next step
  const unsigned copy_to = position_chunk<kKind>(copy_row, thread % Tile::kGradChunks);
  const auto copy_grads = [&](int step) {
    if (step < end) {
      const SharedAddress to = shared_address(shared.grads[step % 2]) + copy_to;
      const int rows = copy_output < sizes.group_outputs ? sizes.rows - step * kPositions - copy_row : 0;
#pragma unroll
      for (int i = 0; i < Tile::kCopies; ++i) {
        const bool exists = i * Tile::kCopyRows < rows;
        copy_async(to + i * Tile::kCopyRows * kRowBytes, exists ? copy_from : grads, exists);
        copy_from += int64_t{out_channels} * Tile::kCopyRows;
      }
    }
    commit_copies();
  };
  // Locates the samples of the steps that begin with this one.
  const auto locate = [&](int step, int deform_group, int tap) {
    KeptSample<kKind> place{};
    const int row = step / Tile::kLocatedSteps * kProductThreads + thread, image = row / sizes.positions;
    if (row < sizes.rows) {
      place =
          keep_sample<kKind>(place_sample<float>(operands, image, row % sizes.positions, deform_group, tap), image, s);
    }
    shared.places[row % (2 * kProductThreads)] = place;
  };
  Interpolation<kKind> interpolation;
  const int gather_chunk = thread % Tile::kSampleChunks, gather_row = thread / Tile::kSampleChunks;
  const bool gather_exists = share.local + gather_chunk * kChunk < segment_channels;
  const uint32_t gather_first = static_cast<uint32_t>(share.channel) / kChunk + gather_chunk;
  const auto start = [&](int step, int i) {
    const int first = step * kPositions % (2 * kProductThreads) + gather_row;
    interpolation.start(&shared.places[first + i * Tile::kGatherRows], gather_exists, operands.images, gather_first,
                        static_cast<uint32_t>(channels) / kChunk, width);
  };
  const auto finish = [&](int step, int i) {
    // Computed again: to keep it would take a register too many.
    const unsigned at = thread_index();
    unsigned char* to =
        shared.samples[step % 2] + position_chunk<kKind>(at / Tile::kSampleChunks, at % Tile::kSampleChunks);
    store_chunk(to + i * Tile::kGatherRows * kRowBytes, interpolation.finish());
  };

  copy_grads(begin);
  const int deform_group = share.channel / sizes.deform_channels;
  if (thread == 0) shared.deform_group = deform_group, shared.tap = share.tap;
  locate(begin, deform_group, share.tap);
  if ((begin + 1) % Tile::kLocatedSteps == 0) locate(begin + 1, deform_group, share.tap);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kGathers; ++i) start(begin, i), finish(begin, i);

  WarpProduct<kKind, 2, kColumns, true> product;
  const TransposedOperands<kKind, kColumns> loads(warp_output, warp_channel);
  for (int step = begin; step < end; ++step) {
    wait_copies<0>();
    __syncthreads();
    copy_grads(step + 1);
    const bool more = step + 1 < end;
#pragma unroll kUnrolledSlices < kKind>
    for (int slice = 0; slice < 4; ++slice) {
      // What is loaded here arrives while the tensor cores are busy.
      constexpr int kSlices = 4 / kGathers;  // for a gather
      if (more && slice % kSlices == 0) start(step + 1, slice / kSlices);
      loads.add_slice(product, shared.grads[step % 2], warp_output, shared.samples[step % 2], warp_channel, slice);
      if (more && slice % kSlices == kSlices - 1) finish(step + 1, slice / kSlices);
    }
    product.end_step();
    if ((step + 2) % Tile::kLocatedSteps == 0 && step + 2 < end) locate(step + 2, shared.deform_group, shared.tap);
  }
  wait_copies<0>();

  // Computed again, so that the loop need not keep it in registers.
  const auto result = WeightGradientShare::of_block<kOutputs, kChannels>(sizes, segment_channels);
  const int first_output = result.channel / sizes.group_channels * sizes.group_outputs;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int output = result.output + warp_output + product.row(i, e);
      if (output >= sizes.group_outputs) continue;
      // The first channel of the output channel's group in the convolution.
      const int out_channel = first_output + output;
      const int first = out_channel / sizes.conv_outputs * sizes.conv_channels;
      float* to =
          partials + ((int64_t{result.split} * out_channels + out_channel) * taps + result.tap) * sizes.conv_channels;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int column = warp_channel + product.column(j, k), channel = result.channel + column - first;
          if (result.local + column >= segment_channels || channel < 0 || channel >= sizes.conv_channels) continue;
          to[channel] = product.value[i][j][e + k];
        }
      }
    }
  }
}

// Adds up partial gradients (splits, out_channels, taps, channels) in their order, to the same without splits if
// `channels_last`, or else to (out_channels, channels, taps).
template <typename T>
__global__ void __launch_bounds__(256, 1)
    finish_weight_gradient_kernel(const Accumulate<T>* partials, const int64_t splits, const int64_t out_channels,
                                  const int64_t taps, const int64_t channels, const bool channels_last, T* gradient) {
  const int64_t count = out_channels * taps * channels;
  for (int64_t at = int64_t{blockIdx.x} * 256 + threadIdx.x; at < count; at += int64_t{gridDim.x} * 256) {
    const int64_t channel = at % channels, tap = at / channels % taps, output = at / channels / taps;
    Accumulate<T> sum = 0;
    for (int64_t k = 0; k < splits; ++k) sum += partials[k * count + at];
    gradient[channels_last ? at : (output * channels + channel) * taps + tap] = static_cast<T>(sum);
  }
}

}  // namespace dcn::cuda
