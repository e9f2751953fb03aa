// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The samples that read a pixel, listed for every pixel, tap and deform group. With them the gradient by the input is
// a gather as well: nothing is added by atomics, and the order of sums does not change from run to run.
#pragma once

#include "deform_conv2d_operands.cuh"

namespace dcn::cuda {

constexpr int kListThreads = 256;

// One sample in the list of one of the pixels that it reads.
template <typename A>
struct alignas(2 * sizeof(A)) ListEntry {
  int32_t position;  // counted over the images of `SampleLists`
  A weight;          // of the pixel, modulated by the mask
};

// Lists of the samples of some images. Those of list i are entries [starts[i], starts[i + 1]).
template <typename A>
struct SampleLists {
  int64_t first_image, images;
  const int64_t* starts;
  const ListEntry<A>* entries;

  DCN_HOST_DEVICE static int64_t list(const DeformConv2dSizes& s, int64_t image, int64_t deform_group, int64_t tap,
                                      int64_t pixel) {
    return ((image * s.deform_groups + deform_group) * s.taps() + tap) * s.pixels() + pixel;
  }
};

DCN_HOST_DEVICE int64_t image_samples(const DeformConv2dSizes& s) { return s.deform_groups * s.taps() * s.positions(); }
DCN_HOST_DEVICE int64_t image_lists(const DeformConv2dSizes& s) { return s.deform_groups * s.taps() * s.pixels(); }

// Calls visit(list, entry) for every list that this thread's samples belong to.
template <typename A, typename T, typename Visit>
__device__ __forceinline__ void for_each_entry(const Operands<T>& operands, int64_t first_image, int64_t images,
                                               const Visit& visit) {
  const DeformConv2dSizes& s = operands.sizes;
  for (int64_t index = int64_t{blockIdx.x} * kListThreads + threadIdx.x; index < images * image_samples(s);
       index += int64_t{gridDim.x} * kListThreads) {
    const int64_t position = index % s.positions(), tap = index / s.positions() % s.taps();
    const int64_t deform_group = index / s.positions() / s.taps() % s.deform_groups, image = index / image_samples(s);
    const Place<A> place = place_sample<A>(operands, first_image + image, position, deform_group, tap);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int row = k / 2, column = k % 2;
      if (!place.y.exists[row] || !place.x.exists[column]) continue;
      const int64_t pixel = (place.y.low + row) * s.width + place.x.low + column;
      visit(SampleLists<A>::list(s, image, deform_group, tap, pixel),
            ListEntry<A>{static_cast<int32_t>(image * s.positions() + position),
                         place.y.weight[row] * place.x.weight[column] * place.modulation});
    }
  }
}

// Adds the length of list i to counts[i + 1].
template <typename T>
__global__ void __launch_bounds__(kListThreads, 1)
    count_samples_kernel(const Operands<T> operands, const int64_t first_image, const int64_t images, int32_t* counts) {
  for_each_entry<Accumulate<T>>(operands, first_image, images,
                                [&](int64_t list, const auto&) { atomicAdd(counts + list + 1, 1); });
}

// Puts samples into their lists, in any order. Counts go down to zero.
template <typename T>
__global__ void __launch_bounds__(kListThreads, 1)
    list_samples_kernel(const Operands<T> operands, const SampleLists<Accumulate<T>> lists, int32_t* counts,
                        ListEntry<Accumulate<T>>* entries) {
  for_each_entry<Accumulate<T>>(operands, lists.first_image, lists.images, [&](int64_t list, const auto& entry) {
    entries[lists.starts[list] + atomicAdd(counts + list + 1, -1) - 1] = entry;
  });
}

// Moves the entry at `root` of a heap of `count` entries, the last position at its root, to where it belongs.
template <typename A>
__device__ __forceinline__ void sift_down(ListEntry<A>* entries, int64_t root, int64_t count) {
  const ListEntry<A> moved = entries[root];
  for (int64_t child = 2 * root + 1; child < count; child = 2 * root + 1) {
    if (child + 1 < count && entries[child + 1].position > entries[child].position) ++child;
    if (entries[child].position < moved.position) break;
    entries[root] = entries[child];
    root = child;
  }
  entries[root] = moved;
}

// Puts every list into the order of positions, of which none comes twice. A thread sorts a list: most are short, and of
// the others the time must only not explode.
template <typename A>
__global__ void __launch_bounds__(kListThreads, 1)
    sort_lists_kernel(const int64_t* starts, const int64_t lists, ListEntry<A>* entries) {
  constexpr int64_t kShort = 24;
  for (int64_t index = int64_t{blockIdx.x} * kListThreads + threadIdx.x; index < lists;
       index += int64_t{gridDim.x} * kListThreads) {
    ListEntry<A>* list = entries + starts[index];
    const int64_t count = starts[index + 1] - starts[index];
    if (count > kShort) {
      for (int64_t root = count / 2 - 1; root >= 0; --root) sift_down(list, root, count);
      for (int64_t last = count - 1; last > 0; --last) {
        const ListEntry<A> greatest = list[0];
        list[0] = list[last], list[last] = greatest;
        sift_down(list, 0, last);
      }
    } else {
      for (int64_t i = 1; i < count; ++i) {
        const ListEntry<A> moved = list[i];
        int64_t to = i;
        for (; to > 0 && list[to - 1].position > moved.position; --to) list[to] = list[to - 1];
        list[to] = moved;
      }
    }
  }
}

// Keeps the lists of some images alive.
template <typename A>
struct ListTensors {
  Tensor starts, entries;
  SampleLists<A> pointers;

  template <typename T>
  ListTensors(const DeviceScope& device, const Operands<T>& operands, const Tensor& like, int64_t first_image,
              int64_t images) {
    const DeformConv2dSizes& s = operands.sizes;
    const int64_t lists = images * image_lists(s), samples = images * image_samples(s);
    const std::array<int64_t, 1> count{lists + 1}, bytes{4 * samples * static_cast<int64_t>(sizeof(ListEntry<A>))};
    Tensor counts = torch::stable::empty(count, ScalarType::Int, std::nullopt, like.device());
    torch::stable::zero_(counts);
    int32_t* count_data = counts.template mutable_data_ptr<int32_t>();
    const int64_t sample_blocks = std::min(divide_up(samples, kListThreads), kMaxBlocks);
    DCN_LAUNCH(count_samples_kernel<T>, sample_blocks, kListThreads, device.stream(), operands, first_image, images,
               count_data);
    starts = cumulative_sum(counts);
    entries = torch::stable::empty(bytes, ScalarType::Byte, std::nullopt, like.device());
    auto* entry_data = static_cast<ListEntry<A>*>(entries.mutable_data_ptr());
    pointers = {first_image, images, starts.template const_data_ptr<int64_t>(), entry_data};
    DCN_LAUNCH(list_samples_kernel<T>, sample_blocks, kListThreads, device.stream(), operands, pointers, count_data,
               entry_data);
    DCN_LAUNCH(sort_lists_kernel<A>, std::min(divide_up(lists, kListThreads), kMaxBlocks), kListThreads,
               device.stream(), pointers.starts, lists, entry_data);
  }
};

// How many images' lists are made at a time: they shall not take much more memory than the images.
template <typename A>
int64_t listed_images(const DeformConv2dSizes& s) {
  constexpr int64_t kMostBytes = int64_t{256} << 20;
  const int64_t bytes = 4 * image_samples(s) * static_cast<int64_t>(sizeof(ListEntry<A>));
  return std::clamp<int64_t>(kMostBytes / bytes, 1, s.batch);
}

}  // namespace dcn::cuda
