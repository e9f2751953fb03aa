// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// batched_nms on CPU, and by way of the CPU for tensors elsewhere. Each row of the batch is the work of one thread.
#include "nms.h"

#include <cmath>

#include "cpu/memory.h"

namespace dcn::cpu {
namespace {

// The boxes of one row that take part, highest score first, as columns, so that a vector holds several boxes.
template <typename T>
struct Candidates {
  std::vector<int64_t> index;  // place in the row
  std::vector<T> x0, y0, x1, y1, area;
  std::vector<uint8_t> suppressed;

  void take(const T* boxes, const T* scores, int64_t count) {
    index.clear();
    for (int64_t i = 0; i < count; ++i) {
      const T* box = boxes + 4 * i;
      // False for NaN too. Most scores are -inf where a row holds one class of many, so these are never sorted.
      const bool scored = scores[i] > -std::numeric_limits<T>::infinity();
      if (scored && !std::isnan(box[0]) && !std::isnan(box[1]) && !std::isnan(box[2]) && !std::isnan(box[3])) {
        index.push_back(i);
      }
    }
    std::stable_sort(index.begin(), index.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    for (std::vector<T>* column : {&x0, &y0, &x1, &y1, &area}) column->resize(index.size());
    suppressed.assign(index.size(), 0);
    for (size_t i = 0; i < index.size(); ++i) {
      const T* box = boxes + 4 * index[i];
      x0[i] = box[0], y0[i] = box[1], x1[i] = box[2], y1[i] = box[3];
      area[i] = (box[2] - box[0]) * (box[3] - box[1]);
    }
  }

  // Suppresses what comes after box `i` and overlaps it by more than `threshold`. Two boxes of no area have no
  // overlap: 0 / 0 is not greater than anything.
  void suppress_after(size_t i, T threshold) {
    const T left = x0[i], top = y0[i], right = x1[i], bottom = y1[i], own = area[i];
    const T *a = x0.data(), *b = y0.data(), *c = x1.data(), *d = y1.data(), *areas = area.data();
    uint8_t* out = suppressed.data();
    const size_t count = index.size();
#pragma omp simd
    for (size_t j = i + 1; j < count; ++j) {
      const T width = std::max(T(0), std::min(right, c[j]) - std::max(left, a[j]));
      const T height = std::max(T(0), std::min(bottom, d[j]) - std::max(top, b[j]));
      const T both = width * height;
      out[j] |= both / (own + areas[j] - both) > threshold;
    }
  }
};

// The greatest T that is not greater than `threshold`: a T is greater than the one where it is greater than the other.
template <typename T>
T round_down(double threshold) {
  const T nearest = static_cast<T>(threshold);
  return nearest > threshold ? std::nextafter(nearest, -std::numeric_limits<T>::infinity()) : nearest;
}

template <typename T>
Tensor keep(const NmsSizes& s, const Tensor& given_boxes, const Tensor& given_scores, double iou_threshold) {
  const Tensor boxes = dense(given_boxes, scalar_type_of<T>()), scores = dense(given_scores, scalar_type_of<T>());
  Tensor kept =
      torch::stable::empty(std::array<int64_t, 2>{s.batch, s.boxes}, ScalarType::Bool, std::nullopt, boxes.device());
  const T *boxes_data = boxes.const_data_ptr<T>(), *scores_data = scores.const_data_ptr<T>();
  auto* kept_data = static_cast<uint8_t*>(kept.mutable_data_ptr());
  const T threshold = round_down<T>(iou_threshold);
  torch::stable::parallel_for(0, s.batch, 1, [&](int64_t first, int64_t last) {
    Candidates<T> candidates;
    for (int64_t row = first; row < last; ++row) {
      uint8_t* out = kept_data + row * s.boxes;
      std::fill(out, out + s.boxes, uint8_t{0});
      candidates.take(boxes_data + row * s.boxes * 4, scores_data + row * s.boxes, s.boxes);
      for (size_t i = 0; i < candidates.index.size(); ++i) {
        if (candidates.suppressed[i]) continue;
        out[candidates.index[i]] = 1;
        candidates.suppress_after(i, threshold);
      }
    }
  });
  return kept;
}

Tensor batched_nms(Tensor boxes, Tensor scores, double iou_threshold) {
  const NmsSizes s = check_batched_nms(boxes, scores);
  return boxes.scalar_type() == ScalarType::Double ? keep<double>(s, boxes, scores, iou_threshold)
                                                   : keep<float>(s, boxes, scores, iou_threshold);
}

Tensor on_device(const Tensor& tensor, const torch::stable::Device& device) {
  return torch::stable::to(tensor, std::nullopt, std::nullopt, device);
}

// For tensors elsewhere. The boxes are few, but one depends on another, which GPUs are slow at.
Tensor batched_nms_by_cpu(Tensor boxes, Tensor scores, double iou_threshold) {
  check_batched_nms(boxes, scores);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return on_device(batched_nms(on_device(boxes, cpu), on_device(scores, cpu), iou_threshold), boxes.device());
}

}  // namespace
}  // namespace dcn::cpu

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CPU, m) { m.impl("batched_nms", TORCH_BOX(&dcn::cpu::batched_nms)); }

STABLE_TORCH_LIBRARY_IMPL(dcn_d2, CompositeExplicitAutograd, m) {
  m.impl("batched_nms", TORCH_BOX(&dcn::cpu::batched_nms_by_cpu));
}
