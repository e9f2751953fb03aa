// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The samples that read a pixel. For every tap and deform group they are listed by cells: a cell is the square between
// four pixels, some of which may not exist. With these lists the gradient by the input is a gather as well: nothing is
// added by atomics, and the order of sums is the same in every run.
#pragma once

#include "cuda/deform_conv2d/sampling/operands.cuh"

namespace dcn::cuda {

constexpr int kListThreads = 256;

// One sample in the list of its cell.
template <typename A>
struct alignas(4 * sizeof(A)) ListedSample {
  int32_t position;  // counted over the images of `SampleListsView`
  A y, x;            // how far it lies beyond the upper left pixel
  A modulation;
};

// How much one position counts for a pixel.
template <typename A>
struct alignas(2 * sizeof(A)) ListEntry {
  int32_t position;
  A weight;  // modulated by the mask
};

// What reads a pixel: the samples of the two cells above it, then those of the two below. The left cell comes first.
template <typename A>
struct PixelSamples {
  struct Row {
    int32_t begin, middle, end;  // where the left cell's samples begin, the right one's, and what comes after
  };
  Row rows[2];

  __device__ __forceinline__ int32_t above() const { return rows[0].end - rows[0].begin; }
  __device__ __forceinline__ int32_t count() const { return above() + rows[1].end - rows[1].begin; }
  __device__ __forceinline__ ListEntry<A> entry(const ListedSample<A>* samples, int32_t k) const {
    const bool below = k >= above();
    const int32_t index = k + (below ? rows[1].begin - above() : rows[0].begin);
    const bool right = index >= (below ? rows[1].middle : rows[0].middle);
    const ListedSample<A> sample = samples[index];
    return {sample.position,
            (below ? A(1) - sample.y : sample.y) * (right ? A(1) - sample.x : sample.x) * sample.modulation};
  }
};

// The number of cells of an image, for one tap and deform group.
DCN_HOST_DEVICE int64_t image_cells(const DeformConv2dSizes& s) { return (s.height + 1) * (s.width + 1); }

// Lists of the samples of some images. Cell i has samples [starts[i], starts[i + 1]), in the order of positions.
template <typename A>
struct SampleListsView {
  int64_t first_image, images;
  const int32_t* starts;
  const ListedSample<A>* samples;

  // The index of the cell with this lower right pixel, which may not exist. It fits 32 bits: SampleListTensors checks.
  __device__ __forceinline__ static int32_t cell(const DeformConv2dSizes& s, int32_t image, int32_t deform_group,
                                                 int32_t tap, int32_t y, int32_t x) {
    const int32_t plane =
        (image * static_cast<int32_t>(s.deform_groups) + deform_group) * static_cast<int32_t>(s.taps()) + tap;
    return plane * static_cast<int32_t>(image_cells(s)) + y * static_cast<int32_t>(s.width + 1) + x;
  }
  __device__ __forceinline__ PixelSamples<A> of_pixel(const DeformConv2dSizes& s, int32_t image, int32_t deform_group,
                                                      int32_t tap, int32_t y, int32_t x) const {
    const int32_t* above = starts + cell(s, image, deform_group, tap, y, x);
    const int32_t* below = above + static_cast<int32_t>(s.width + 1);
    return {{{above[0], above[1], above[2]}, {below[0], below[1], below[2]}}};
  }
};

DCN_HOST_DEVICE int64_t image_samples(const DeformConv2dSizes& s) { return s.deform_groups * s.taps() * s.positions(); }
DCN_HOST_DEVICE int64_t image_lists(const DeformConv2dSizes& s) { return s.deform_groups * s.taps() * image_cells(s); }

// Calls visit(cell, sample) for this thread's samples, except those that read no pixel.
template <typename A, typename T, typename Visit>
__device__ __forceinline__ void for_each_listed(const OperandsView<T>& operands, int64_t first_image, int64_t images,
                                                const Visit& visit) {
  const DeformConv2dSizes& s = operands.sizes;
  const auto positions = static_cast<int32_t>(s.positions()), taps = static_cast<int32_t>(s.taps());
  const auto deform_groups = static_cast<int32_t>(s.deform_groups);
  for (int64_t index = int64_t{blockIdx.x} * kListThreads + threadIdx.x; index < images * image_samples(s);
       index += int64_t{gridDim.x} * kListThreads) {
    const int32_t plane = static_cast<int32_t>(index) / positions, position = static_cast<int32_t>(index) % positions;
    const int32_t tap = plane % taps, deform_group = plane / taps % deform_groups, image = plane / taps / deform_groups;
    const Place<A> place =
        place_sample<A>(operands, static_cast<int32_t>(first_image) + image, position, deform_group, tap);
    const AxisSample<A>&y = place.y, &x = place.x;
    if (!(y.exists[0] || y.exists[1]) || !(x.exists[0] || x.exists[1])) continue;
    const auto fraction = [](const AxisSample<A>& axis) {
      return axis.exists[1] ? axis.weight[1] : A(1) - axis.weight[0];
    };
    visit(SampleListsView<A>::cell(s, image, deform_group, tap, y.low + 1, x.low + 1),
          ListedSample<A>{image * positions + position, fraction(y), fraction(x), place.modulation});
  }
}

// Adds the length of list i to counts[i + 2].
template <typename T>
__global__ void __launch_bounds__(kListThreads, 1)
    count_samples_kernel(const OperandsView<T> operands, const int64_t first_image, const int64_t images,
                         int32_t* counts) {
  for_each_listed<Accumulate<T>>(operands, first_image, images,
                                 [&](int32_t cell, const auto&) { atomicAdd(counts + cell + 2, 1); });
}

// Puts samples into their lists, in any order. List i begins at starts[i + 1], which moves to its end.
template <typename T>
__global__ void __launch_bounds__(kListThreads, 1)
    list_samples_kernel(const OperandsView<T> operands, const int64_t first_image, const int64_t images,
                        int32_t* starts, ListedSample<Accumulate<T>>* samples) {
  for_each_listed<Accumulate<T>>(operands, first_image, images, [&](int32_t cell, const auto& sample) {
    samples[atomicAdd(starts + cell + 1, 1)] = sample;
  });
}

// All threads of the block together put one list into the order of positions. It is a bitonic network in which every
// comparison moves the greater one up. So the list may have any length: what it lacks to a power of two need not exist.
template <typename A>
__device__ __forceinline__ void sort_together(ListedSample<A>* list, int32_t count) {
  const auto end = static_cast<uint32_t>(count);
  for (uint32_t size = 2; size / 2 < end; size *= 2) {
    for (uint32_t distance = size / 2; distance > 0; distance /= 2) {
      for (uint32_t i = threadIdx.x;; i += kListThreads) {
        const uint32_t rest = i & (distance - 1), low = 2 * i - rest;
        if (low - rest >= end) break;
        const uint32_t high = distance == size / 2 ? low + size - 1 - 2 * rest : low + distance;
        if (high >= end || list[low].position < list[high].position) continue;
        const ListedSample<A> moved = list[low];
        list[low] = list[high], list[high] = moved;
      }
      __syncthreads();
    }
  }
}

// Puts every list into the order of positions; no position comes twice in a list. A thread sorts a short list alone,
// and most have no more than two samples. The threads of a block sort a long list together, so that it takes bearable
// time.
template <typename A>
__global__ void __launch_bounds__(kListThreads, 1)
    sort_lists_kernel(const int32_t* starts, const int64_t lists, ListedSample<A>* samples) {
  constexpr int32_t kShort = 16;
  struct Shared {
    int32_t count, list[kListThreads];
  };
  DCN_SHARED(Shared, shared);
  for (int64_t first = int64_t{blockIdx.x} * kListThreads; first < lists; first += int64_t{gridDim.x} * kListThreads) {
    const int64_t index = first + threadIdx.x;
    const int32_t begin = index < lists ? starts[index] : 0, count = index < lists ? starts[index + 1] - begin : 0;
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    ListedSample<A>* list = samples + begin;
    if (count > kShort) {
      shared.list[atomicAdd(&shared.count, 1)] = static_cast<int32_t>(index);
    } else {
      for (int32_t i = 1; i < count; ++i) {
        const ListedSample<A> moved = list[i];
        int32_t to = i;
        for (; to > 0 && list[to - 1].position > moved.position; --to) list[to] = list[to - 1];
        if (to < i) list[to] = moved;
      }
    }
    __syncthreads();
    // A fast thread may clear the count for its next round before a slow one tests it here. Both leave the loop: after
    // the last list's barrier the index has reached the count, whichever they see.
    for (int32_t i = 0; i < shared.count; ++i) {
      const int32_t from = starts[shared.list[i]];
      sort_together(samples + from, starts[shared.list[i] + 1] - from);
    }
  }
}

// The lists of some images, kept alive.
template <typename A>
struct SampleListTensors {
  Tensor starts, samples;
  SampleListsView<A> view;

  template <typename T>
  SampleListTensors(const DeviceScope& device, const OperandsView<T>& operands, const Tensor& like, int64_t first_image,
                    int64_t images) {
    const DeformConv2dSizes& s = operands.sizes;
    const int64_t lists = images * image_lists(s), most = images * image_samples(s);
    DCN_CHECK(std::max(lists, most) < int64_t{1} << 30, "deform_conv2d: ", most, " samples of ", lists,
              " places in an image are too many for the gradient by the input");
    const std::array<int64_t, 1> count{lists + 2}, bytes{most * static_cast<int64_t>(sizeof(ListedSample<A>))};
    Tensor counts = torch::stable::empty(count, ScalarType::Int, std::nullopt, like.device());
    torch::stable::zero_(counts);
    const int64_t sample_blocks = std::min(divide_up(most, kListThreads), kMaxBlocks);
    DCN_LAUNCH(count_samples_kernel<T>, sample_blocks, kListThreads, device.stream(), operands, first_image, images,
               counts.template mutable_data_ptr<int32_t>());
    starts = cumulative_sum(counts);
    samples = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, like.device());
    auto* start_data = starts.template mutable_data_ptr<int32_t>();
    auto* sample_data = static_cast<ListedSample<A>*>(samples.mutable_data_ptr());
    DCN_LAUNCH(list_samples_kernel<T>, sample_blocks, kListThreads, device.stream(), operands, first_image, images,
               start_data, sample_data);
    DCN_LAUNCH(sort_lists_kernel<A>, std::min(divide_up(lists, kListThreads), kMaxBlocks), kListThreads,
               device.stream(), start_data, lists, sample_data);
    view = {first_image, images, start_data, sample_data};
  }
};

// For how many images lists are made at a time: they must not take much more memory than the images.
template <typename A>
int64_t listed_images(const DeformConv2dSizes& s) {
  constexpr int64_t kMostBytes = int64_t{256} << 20;
  const int64_t bytes = image_samples(s) * static_cast<int64_t>(sizeof(ListedSample<A>)) +
                        2 * image_lists(s) * static_cast<int64_t>(sizeof(int32_t));
  return std::clamp<int64_t>(kMostBytes / bytes, 1, s.batch);
}

}  // namespace dcn::cuda
