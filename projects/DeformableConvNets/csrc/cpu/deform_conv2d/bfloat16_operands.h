// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What forward and backward of the bfloat16 path share: the operands of a call, its channels in panels.
#pragma once

#include "cpu/deform_conv2d/operands.h"
#include "cpu/isa/amx_kernels.h"

namespace dcn::cpu {

inline int64_t register_tiles_of(int64_t count) { return divide_up(count, kRegisterTileRows); }
inline int64_t panels_of(int64_t count) { return divide_up(count, kPanelColumns); }

inline const Bfloat16* bits_of(const Tensor& tensor) { return static_cast<const Bfloat16*>(tensor.const_data_ptr()); }

// The input channels in segments of at most `most_channels`, and these in panels. A segment lies in one conv group and
// one deform group.
class ChannelPanels {
 public:
  ChannelPanels(const DeformConv2dSizes& s, int64_t most_channels)
      : segments_(segments_of(s, most_channels)), first_(s.groups + 1, 0) {
    for (const Segment& segment : segments_) {
      panel_.push_back(total());
      for (int64_t group = segment.group; group < s.groups; ++group) first_[group + 1] += panels_of(segment.count);
    }
  }

  const std::vector<Segment>& segments() const { return segments_; }
  int64_t first_panel(size_t segment) const { return panel_[segment]; }
  int64_t first_of_group(int64_t group) const { return first_[group]; }
  int64_t of_group(int64_t group) const { return first_[group + 1] - first_[group]; }
  int64_t total() const { return first_.back(); }

 private:
  std::vector<Segment> segments_;
  std::vector<int64_t> panel_, first_;
};

// The register tiles of a thread: set up at first, given back at the end.
class RegisterTileSession {
 public:
  RegisterTileSession() { amx_kernels()->begin(); }
  ~RegisterTileSession() { amx_kernels()->end(); }
  RegisterTileSession(const RegisterTileSession&) = delete;
  RegisterTileSession& operator=(const RegisterTileSession&) = delete;
};

// The tensors of one call.
struct Bfloat16OperandTensors {
  DeformConv2dSizes sizes;
  Tensor image_tensor;
  OffsetTensors<float> offsets;
  ChannelPanels panels;
  std::vector<Bfloat16> zeros;
  const Bfloat16* images;

  Bfloat16OperandTensors(const DeformConv2dSizes& s, const Tensor& input, const SamplingInputs& sampling,
                         int64_t most_channels)
      : sizes(s),
        image_tensor(to_channels_last(input, ScalarType::BFloat16, amx_kernels()->transpose)),
        offsets(s, sampling),
        panels(s, most_channels),
        zeros(s.channels, 0),
        images(bits_of(image_tensor)) {}

  Bfloat16Channels channels(int64_t n, const Segment& segment) const {
    return {images + n * sizes.pixels() * sizes.channels + segment.begin, sizes.channels, segment.count, zeros.data()};
  }
};

}  // namespace dcn::cpu
