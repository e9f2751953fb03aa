// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The sizes that all RoI poolings have, for the code that they share.
#pragma once

#include "sample.h"

namespace dcn {

// Input channel = channel * cells + cell; each of the `blocks` of output channels has two planes of `parts` offsets, x
// then y.
struct RoiPoolSizes {
  int64_t batch, height, width, rois, channels, out_h, out_w, cells, blocks, parts;

  DCN_HOST_DEVICE int64_t bins() const { return out_h * out_w; }
  DCN_HOST_DEVICE int64_t pixels() const { return height * width; }
  DCN_HOST_DEVICE int64_t block_channels() const { return channels / blocks; }
  DCN_HOST_DEVICE int64_t input_channels() const { return channels * cells; }
};

}  // namespace dcn
