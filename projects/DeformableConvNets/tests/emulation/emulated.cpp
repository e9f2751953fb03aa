// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The CUDA operators, emulated, as CPU kernels of the operator library dcn_d2_emulated.
#define DCN_EMULATE

#include "cuda/deform_conv2d.cu"
#include "cuda/deform_psroi_pool.cu"
#include "cuda/deform_roi_pool.cu"

STABLE_TORCH_LIBRARY_IMPL(dcn_d2_emulated, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&dcn::cuda::deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&dcn::cuda::deform_conv2d_backward));
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cuda::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cuda::deform_roi_pool_backward));
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cuda::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cuda::deform_psroi_pool_backward));
}

// `removed_barrier` is the line of a __syncthreads() that shall do nothing, or 0.
extern "C" __attribute__((visibility("default"))) void dcn_emulate_configure(int schedule, int removed_barrier) {
  dcn::emulate::Machine::get().schedule = static_cast<dcn::emulate::Schedule>(schedule);
  dcn::emulate::Machine::get().removed_barrier = removed_barrier;
}
