// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What the RoI poolings have in common: operands and their sizes, and what the code that they share asks of each.
//
// An operator brings its geometry: where the bins of a RoI sample. It is a class template over the type of positions,
// for the host and for the devices, so that there is one text of it (deform_roi_pool.h, deform_psroi_pool.h):
//   sizes                  the operator's sizes
//   axis(row, column)      one axis of the RoI in `row`, a row of rois: x if `column`, else y. It has
//     unit                   the pixels by which an offset of 1 moves a bin
//     samples(bin, offset)   the samples of a bin that is moved by `offset`: their `range`, and each when called with k
//     divisor(on_map)        by what the sum over this axis is divided; on_map() counts the samples that lie on the map
//   average(divisor)       the factor of a bin's sum, where `divisor` is that of an axis or the product of both
//   cell(h, w)             the group of channels that bin (h, w) reads
//   offset_cell(h, w)      the offset of the plane that moves bin (h, w)
//   own_offsets()          whether every bin has an offset of its own, whose index is the bin's
#pragma once

#include "sample.h"
#include "tensor.h"

namespace dcn {

// Input channel = channel * cells + cell. Output channels form `channel_sets` sets, which move independently: each set
// has two planes of `offset_cells` offsets, x then y.
struct RoiPoolSizes {
  int64_t batch, height, width, rois, channels, out_h, out_w, cells, channel_sets, offset_cells;

  DCN_HOST_DEVICE int64_t bins() const { return out_h * out_w; }
  DCN_HOST_DEVICE int64_t pixels() const { return height * width; }
  DCN_HOST_DEVICE int64_t set_channels() const { return channels / channel_sets; }
  DCN_HOST_DEVICE int64_t input_channels() const { return channels * cells; }
};

// The tensors that a caller gives to a RoI pooling.
struct RoiPoolInputs {
  const Tensor &input, &rois;
  const std::optional<Tensor>&offset, &mask;
};

// Which gradients the caller asked for.
struct NeededRoiPoolGradients {
  bool input, offset;  // the mask's comes with the offset's
};

// Samples [begin, end) of a bin along one axis.
struct SampleRange {
  int64_t begin, end;
};

}  // namespace dcn
