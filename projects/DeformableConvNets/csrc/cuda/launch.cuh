// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// What kernels and entry points need of CUDA, in one place: tests/emulation runs the same sources on the CPU with
// DCN_EMULATE defined, where every CUDA thread is a fiber. Hence kernels are launched by DCN_LAUNCH, not by <<<>>>,
// have their shared memory in one struct declared by DCN_SHARED, and use one-dimensional grids and blocks.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sample.h"
#include "tensor.h"

namespace dcn::cuda {

// What entry points need to know about a device.
struct Device {
  int capability;  // 90 is 9.0
  int multiprocessors;
  int shared_bytes;  // shared memory that a thread block may have
};

}  // namespace dcn::cuda

#if defined(DCN_EMULATE)
#include "emulate.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define DCN_SHARED(Type, name) __shared__ Type name
#define DCN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define DCN_LAUNCH(kernel, blocks, threads, stream, ...)                          \
  do {                                                                            \
    kernel<<<static_cast<unsigned>(blocks), threads, 0, (stream)>>>(__VA_ARGS__); \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                               \
  } while (0)
// Launches with `bytes` of dynamic shared memory, which the kernel declares by DCN_DYNAMIC_SHARED. CUDA gives more than
// 48 KB only to kernels that ask for it.
#define DCN_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, ...)                                       \
  do {                                                                                                       \
    STD_CUDA_CHECK(                                                                                          \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))); \
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), (stream)>>>(__VA_ARGS__);   \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                                                          \
  } while (0)

namespace dcn::cuda {

// 1 / value. For floats it may be off by 2 units in the last place, and is 0 beyond 2^126: an exact division would need
// more registers.
__device__ __forceinline__ float reciprocal(float value) { return __fdividef(1.0f, value); }
__device__ __forceinline__ double reciprocal(double value) { return 1.0 / value; }

// The compute capability that a kernel's code was compiled for, as the current device runs it: lower than the device's
// own if the driver compiled the kernel from PTX.
template <typename Kernel>
int compiled_capability(Kernel* kernel) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion;
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // in one launch; kernels loop where there is more work
constexpr int64_t kEnoughBlocks = 2048;                 // fill every GPU; more would only add partial results

// Makes the tensor's device the current one while it lives. Kernels go to that device's current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  Device device() const {
    int index = 0, major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;
    STD_CUDA_CHECK(cudaGetDevice(&index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    return {10 * major + minor, multiprocessors, shared_bytes};
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace dcn::cuda
#endif

namespace dcn::cuda {

// The type in which a kernel for T computes.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The compute capability that this code is being compiled for: 90 is 9.0.
#if defined(__CUDA_ARCH__)
constexpr int kCompiledCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCompiledCapability = 90;
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

DCN_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum over an aligned group of `lanes` neighbouring lanes, which all of them get; `lanes` is a power of two.
template <typename A>
__device__ __forceinline__ A sum_lanes(A value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Calls function(T()) for the C++ type of `dtype`, one of the four that check_input_dtype lets through.
template <typename Function>
auto in_dtype(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(double());
    case ScalarType::Half:
      return function(torch::headeronly::Half());
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16());
    default:
      return function(float());
  }
}

// `tensor`, which is channels_last, in `dtype` and as dense as `like` is: channels_last or contiguous.
inline Tensor as_dense_as(const Tensor& tensor, const Tensor& like, ScalarType dtype) {
  return dense(tensor, dtype, is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace dcn::cuda
