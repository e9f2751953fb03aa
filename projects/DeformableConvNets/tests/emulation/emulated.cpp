// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// The CUDA operators, emulated, as CPU kernels of the operator library dcn_d2_emulated.
#define DCN_EMULATE

#include "cuda/deform_conv2d/backward.cu"
#include "cuda/deform_conv2d/forward.cu"
#include "cuda/roi_pool/deform_psroi_pool.cu"
#include "cuda/roi_pool/deform_roi_pool.cu"

STABLE_TORCH_LIBRARY_IMPL(dcn_d2_emulated, CPU, m) {
  m.impl("_deform_conv2d", TORCH_BOX(&dcn::cuda::deform_conv2d));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&dcn::cuda::deform_conv2d_backward));
  m.impl("_modulated_deform_conv2d", TORCH_BOX(&dcn::cuda::modulated_deform_conv2d));
  m.impl("_modulated_deform_conv2d_backward", TORCH_BOX(&dcn::cuda::modulated_deform_conv2d_backward));
  m.impl("deform_conv2d", dcn::cuda::with_tf32_setting<TORCH_BOX(&dcn::cuda::deform_conv2d)>);  // as on a GPU
  m.impl("deform_roi_pool", TORCH_BOX(&dcn::cuda::deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&dcn::cuda::deform_roi_pool_backward));
  m.impl("deform_psroi_pool", TORCH_BOX(&dcn::cuda::deform_psroi_pool));
  m.impl("deform_psroi_pool_backward", TORCH_BOX(&dcn::cuda::deform_psroi_pool_backward));
}

namespace dcn::cuda {

// One warp multiplies a (16, 32 bytes) by b (8, 32 bytes), transposed. Its fragments are taken from memory by the table
// in mma.cuh, or loaded as matrices.
template <Kind kKind>
void multiply_kernel(const unsigned char* a, const unsigned char* b, float* sums, bool as_matrices) {
  DCN_DYNAMIC_SHARED(shared);
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  std::memcpy(shared + lane * 16, a + lane * 16, 16);
  if (lane < 16) std::memcpy(shared + 512 + lane * 16, b + lane * 16, 16);
  __syncthreads();
  uint32_t left[1][4], right[1][2];
  if (as_matrices) {
    load_matrices<1>(left, {shared + lane % 16 * 32 + lane / 16 * 16});
    uint32_t both[1][4];  // b, twice
    load_matrices<1>(both, {shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16});
    right[0][0] = both[0][0], right[0][1] = both[0][1];
  } else {
    const auto word = [](const unsigned char* rows, unsigned row, unsigned column) {
      uint32_t value;
      std::memcpy(&value, rows + row * 32 + column * 4, 4);
      return value;
    };
    left[0][0] = word(shared, g, t), left[0][1] = word(shared, g + 8, t);
    left[0][2] = word(shared, g, t + 4), left[0][3] = word(shared, g + 8, t + 4);
    right[0][0] = word(shared + 512, g, t), right[0][1] = word(shared + 512, g, t + 4);
  }
  float sum[1][1][4] = {};
  multiply<kKind>(sum, 0, left, right);
  for (unsigned e = 0; e < 4; ++e) sums[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sum[0][0][e];
}

}  // namespace dcn::cuda

// Multiplies with the instruction for `kind`, a number of dcn::cuda::Kind.
extern "C" __attribute__((visibility("default"))) void dcn_emulate_multiply(int kind, const void* a, const void* b,
                                                                            float* sums, bool as_matrices) {
  using dcn::cuda::Kind;
  const auto* left = static_cast<const unsigned char*>(a);
  const auto* right = static_cast<const unsigned char*>(b);
  const auto kernel = kind == static_cast<int>(Kind::kHalf)       ? dcn::cuda::multiply_kernel<Kind::kHalf>
                      : kind == static_cast<int>(Kind::kBFloat16) ? dcn::cuda::multiply_kernel<Kind::kBFloat16>
                                                                  : dcn::cuda::multiply_kernel<Kind::kTF32>;
  DCN_LAUNCH_SHARED(kernel, 1, 32, 768, 0, left, right, sums, as_matrices);
}

// `removed_barrier` is the line of a __syncthreads() in `file` that is to do nothing, or 0.
extern "C" __attribute__((visibility("default"))) void dcn_emulate_configure(int schedule, int removed_barrier,
                                                                             const char* file) {
  dcn::emulate::Machine& machine = dcn::emulate::Machine::get();
  machine.schedule = static_cast<dcn::emulate::Schedule>(schedule);
  machine.removed_barrier = removed_barrier;
  machine.removed_barrier_file = file;
}

// Sets the device that the entry points see.
extern "C" __attribute__((visibility("default"))) void dcn_emulate_device(int capability, int multiprocessors,
                                                                          int shared_bytes) {
  dcn::emulate::Machine::get().device = {capability, multiprocessors, shared_bytes};
}

// The number of splits that plan.cuh chooses.
extern "C" __attribute__((visibility("default"))) int dcn_emulate_weight_gradient_splits(int64_t tiles, int64_t steps,
                                                                                         int64_t slots, int64_t bytes) {
  return dcn::cuda::weight_gradient_splits(tiles, steps, slots, bytes);
}
