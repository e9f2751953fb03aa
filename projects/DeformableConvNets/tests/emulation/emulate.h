// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, blocks run one after the other.
//
// What it proves about the kernels that it runs: indexing, memory layouts, bounds (under a sanitizer), barriers that
// are missing, divergent or deadlocked, shared memory and outputs that are read before they are written, and all of
// the entry points but CUDA's own calls. What it does not prove: anything about speed, registers, the GPU's memory
// model, real atomics and their order, or blocks that run at the same time.
//
// Fibers switch only at barriers and shuffles. A missing barrier therefore shows where a thread runs ahead of others,
// which depends on who runs first: hence two schedules.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dcn::emulate {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr size_t kSharedBytes = size_t{48} << 10;  // what a kernel may have on every GPU without asking for more
constexpr unsigned kWarpLanes = 32;

// kRoundRobin: threads take turns from one barrier or shuffle to the next, the first thread first.
// kGreedyWarp: the last warp runs until a block barrier stops it, then the one before it; its lanes last to first.
enum class Schedule { kRoundRobin, kGreedyWarp };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool ready;
  unsigned shuffles;        // how many it has done
  size_t shared_variables;  // how many it has seen
};

struct Warp {
  unsigned waiting;                   // lanes at a shuffle
  uint64_t exchanged[2][kWarpLanes];  // used in turn
};

class Machine {
 public:
  Schedule schedule = Schedule::kRoundRobin;
  int removed_barrier = 0;  // a __syncthreads() on this line does nothing

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(int64_t blocks, unsigned threads, std::function<void()> kernel);

  void block_barrier(int line) {
    if (line == removed_barrier) return;
    if (waiting_ > 0 && line != barrier_) throw std::runtime_error("emulated kernel: divergent __syncthreads()");
    barrier_ = line;
    wait(waiting_, 0, fibers_.size());
  }

  // What lane `from` of the same warp gives to the same shuffle.
  uint64_t exchange(uint64_t given, unsigned from) {
    Warp& warp = warps_[current_ / kWarpLanes];
    uint64_t* exchanged = warp.exchanged[fibers_[current_].shuffles++ % 2];
    exchanged[current_ % kWarpLanes] = given;
    wait(warp.waiting, current_ / kWarpLanes * kWarpLanes, kWarpLanes);
    return exchanged[from];
  }

  // The block's next shared variable, at first filled with bytes that make NaN of a float and -1 of an integer.
  template <typename T>
  T& shared_variable() {
    const size_t index = fibers_[current_].shared_variables++;
    if (index == shared_.size()) {
      shared_bytes_ += sizeof(T);
      STD_TORCH_CHECK(shared_bytes_ <= kSharedBytes, "emulated kernel: ", shared_bytes_, " bytes of shared memory");
      shared_.emplace_back(new char[sizeof(T)]);
      std::memset(shared_.back().get(), 0xff, sizeof(T));
    }
    return *reinterpret_cast<T*>(shared_[index].get());
  }

 private:
  static void enter() {
    Machine& machine = get();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack_, &machine.main_stack_bytes_);
#endif
    try {
      machine.kernel_();
    } catch (...) {
      machine.failure_ = std::current_exception();
    }
    ++machine.done_;
    machine.fibers_[machine.current_].ready = false;
    machine.switch_to(machine.fibers_[machine.current_].context, machine.main_, machine.main_stack_,
                      machine.main_stack_bytes_);
  }

  void switch_to(ucontext_t& from, ucontext_t& to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, stack, bytes);
#endif
    swapcontext(&from, &to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

  // Lets others run until all of fibers [begin, begin + count) wait here; `waiting` counts them.
  void wait(unsigned& waiting, size_t begin, size_t count) {
    fibers_[current_].ready = false;
    if (++waiting == count) {
      for (size_t i = begin; i < begin + count; ++i) fibers_[i].ready = true;
      waiting = 0;
    }
    switch_to(fibers_[current_].context, main_, main_stack_, main_stack_bytes_);
  }

  // Makes the fiber that runs next the current one.
  void choose() {
    const unsigned threads = static_cast<unsigned>(fibers_.size()), last = current_;
    for (unsigned i = 0; i < threads; ++i) {
      current_ = schedule == Schedule::kRoundRobin ? (last + 1 + i) % threads : threads - 1 - i;
      if (fibers_[current_].ready) return;
    }
    throw std::runtime_error("emulated kernel: deadlock, threads wait for others that never come");
  }

  void run_block();

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
  std::function<void()> kernel_;
  std::exception_ptr failure_;
  unsigned current_ = 0, waiting_ = 0, done_ = 0;
  int barrier_ = 0;  // line of the barrier that some wait at
  std::vector<std::unique_ptr<char[]>> shared_;
  size_t shared_bytes_ = 0;
};

}  // namespace dcn::emulate

// What kernels and csrc/cuda/launch.cuh take from CUDA.

#define __global__ inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DCN_SHARED(Type, name) Type& name = dcn::emulate::Machine::get().shared_variable<Type>()
#define DCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), dcn::emulate::Machine::get().launch(blocks, threads, [&] { kernel(__VA_ARGS__); }))

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) { dcn::emulate::Machine::get().block_barrier(line); }

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  STD_TORCH_CHECK(lanes == 0xffffffffu, "emulated kernel: only whole warps can shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = dcn::emulate::Machine::get().exchange(bits, threadIdx.x % dcn::emulate::kWarpLanes ^ distance);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// No lane passes before all of them have come.
inline void __syncwarp(unsigned lanes = 0xffffffffu) { __shfl_xor_sync(lanes, 0, 0); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

namespace dcn::cuda {

// Small, so that blocks loop over their work and parts of the positions have several tiles.
constexpr int64_t kMaxBlocks = 5;
constexpr int64_t kEnoughBlocks = 8;

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  int stream() const { return 0; }
};

}  // namespace dcn::cuda

namespace dcn::emulate {

inline void Machine::run_block() {
  shared_.clear(), shared_bytes_ = 0;
  warps_.assign(fibers_.size() / kWarpLanes, Warp{});
  waiting_ = done_ = 0, failure_ = nullptr;
  current_ = static_cast<unsigned>(fibers_.size()) - 1;
  for (Fiber& fiber : fibers_) {
    fiber.ready = true, fiber.shuffles = 0, fiber.shared_variables = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, &Machine::enter, 0);
  }
  while (done_ < fibers_.size()) {
    choose();
    threadIdx.x = current_;
    switch_to(main_, fibers_[current_].context, fibers_[current_].stack.get(), kStackBytes);
    if (failure_) std::rethrow_exception(failure_);
  }
}

inline void Machine::launch(int64_t blocks, unsigned threads, std::function<void()> kernel) {
  STD_TORCH_CHECK(blocks > 0 && threads > 0 && threads <= 1024 && threads % kWarpLanes == 0,
                  "emulated kernel: launched with ", blocks, " blocks of ", threads, " threads");
  kernel_ = std::move(kernel);
  fibers_.resize(threads);
  blockDim.x = threads, gridDim.x = static_cast<unsigned>(blocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
}

}  // namespace dcn::emulate
