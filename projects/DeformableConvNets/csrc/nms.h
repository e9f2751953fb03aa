// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// batched_nms: the sizes of its operands, and their checks.
#pragma once

#include "tensor.h"

namespace dcn {

// boxes (batch, boxes, 4) of x0, y0, x1, y1; scores (batch, boxes). The rows of a batch have nothing to do with each
// other.
struct NmsSizes {
  int64_t batch, boxes;
};

// Raises an error that names the operand and both values where something does not fit.
inline NmsSizes check_batched_nms(const Tensor& boxes, const Tensor& scores) {
  const char* op = "batched_nms";
  const ScalarType dtype = boxes.scalar_type();
  DCN_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || is_half(dtype), op,
            ": boxes must be float64, float32, float16 or bfloat16, got ", to_string(dtype));
  DCN_CHECK(scores.scalar_type() == dtype, op, ": scores has dtype ", to_string(scores.scalar_type()),
            ", but boxes has ", to_string(dtype));
  DCN_CHECK(scores.device() == boxes.device(), op, ": scores is on ", to_string(scores.device()), ", but boxes is on ",
            to_string(boxes.device()));
  DCN_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, op, ": boxes must have shape [B, R, 4], got ",
            to_string(boxes.sizes()));
  const NmsSizes s{boxes.size(0), boxes.size(1)};
  check_shape(op, "scores", scores, {s.batch, s.boxes});
  return s;
}

}  // namespace dcn
