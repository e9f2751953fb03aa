// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, blocks run one after the other.
//
// What it proves about the kernels that it runs: indexing, memory layouts, bounds (under a sanitizer), barriers that
// are missing, divergent or deadlocked, shared memory and outputs that are read before they are written, and all of
// the entry points except CUDA's own calls. What it does not prove: anything about speed, registers, the GPU's memory
// model, real atomics and their order, or blocks that run at the same time.
//
// Fibers switch only at barriers and shuffles. A missing barrier therefore shows where a thread runs ahead of others,
// which depends on who runs first: hence two schedules.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dcn::emulate {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr size_t kSharedBytes = size_t{48} << 10;  // what a kernel may have on every GPU without asking for more
constexpr size_t kExchangeBytes = 256;             // what a lane can give to an instruction of its warp
constexpr size_t kDynamicAlignment = 128;
constexpr unsigned kWarpLanes = 32;

// kRoundRobin: every thread runs to its next barrier or shuffle, one thread after the other, the first one first.
// kGreedyWarp: the last warp runs until a barrier of the thread block stops it, then the one before it. The lanes of a
// warp run from the last to the first.
enum class Schedule { kRoundRobin, kGreedyWarp };

// A copy from global to shared memory that is under way; of zeros if `from` is null.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A thread of execution. One that was left before is entered again by longjmp: unlike swapcontext it does not ask the
// system for the signal mask. The address sanitizer wants to see swapcontext.
struct Context {
  ucontext_t context;
  jmp_buf left;
  bool was_left = false;
};

struct Fiber : Context {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool ready;
  unsigned exchanges;                    // how many it has done
  size_t shared_variables;               // how many it has seen
  std::vector<Copy> copies;              // under way
  std::vector<size_t> committed_copies;  // how many each group has; the other copies are not committed yet
};

struct Warp {
  unsigned waiting;  // lanes at a shuffle or another instruction of a whole warp
  alignas(16) char exchanged[2][kWarpLanes][kExchangeBytes];  // used alternately
};

// What the lanes of a warp gave to one instruction.
struct Exchange {
  const char (*lanes)[kExchangeBytes];

  template <typename T>
  const T* from(unsigned lane) const {
    return reinterpret_cast<const T*>(lanes[lane]);
  }
};

class Machine {
 public:
  Schedule schedule = Schedule::kRoundRobin;
  // A __syncthreads() on this line of this file does nothing.
  int removed_barrier = 0;
  std::string removed_barrier_file;
  cuda::Device device{90, 4, 227 << 10};

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(int64_t blocks, unsigned threads, size_t dynamic_bytes, std::function<void()> kernel);

  void block_barrier(int line, const char* file) {
    if (line == removed_barrier && std::string_view(file).ends_with(removed_barrier_file)) return;
    if (waiting_ > 0 && line != barrier_) throw std::runtime_error("emulated kernel: divergent __syncthreads()");
    barrier_ = line;
    wait(waiting_, 0, fibers_.size());
  }

  // What all lanes of the same warp give to the same instruction.
  Exchange exchange_all(const void* given, size_t bytes) {
    STD_TORCH_CHECK(bytes <= kExchangeBytes, "emulated kernel: a lane exchanges ", bytes, " bytes");
    Warp& warp = warps_[current_ / kWarpLanes];
    auto& exchanged = warp.exchanged[fibers_[current_].exchanges++ % 2];
    std::memcpy(exchanged[current_ % kWarpLanes], given, bytes);
    wait(warp.waiting, current_ / kWarpLanes * kWarpLanes, kWarpLanes);
    return {exchanged};
  }

  // Copies arrive as late as they may: when a thread waits for them. Until then the target holds poison.
  void copy_later(void* to, const void* from, size_t bytes) {
    std::memset(to, 0xff, bytes);
    fibers_[current_].copies.push_back({to, from, bytes});
  }
  void commit_copies() {
    Fiber& fiber = fibers_[current_];
    size_t before = 0;
    for (const size_t count : fiber.committed_copies) before += count;
    fiber.committed_copies.push_back(fiber.copies.size() - before);
  }
  void wait_copies(size_t groups_left) {
    Fiber& fiber = fibers_[current_];
    size_t done = 0;
    while (fiber.committed_copies.size() > groups_left) {
      done += fiber.committed_copies.front();
      fiber.committed_copies.erase(fiber.committed_copies.begin());
    }
    for (size_t i = 0; i < done; ++i) {
      const Copy& copy = fiber.copies[i];
      if (copy.from) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(done));
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

  unsigned char* dynamic_shared() { return dynamic_.get() + dynamic_skipped_; }

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
    if (!machine.fibers_[machine.current_].copies.empty() && !machine.failure_) {
      machine.failure_ = std::make_exception_ptr(std::runtime_error("emulated kernel: nobody waits for a copy"));
    }
    ++machine.done_;
    machine.fibers_[machine.current_].ready = false;
    machine.switch_to(machine.fibers_[machine.current_], machine.main_, machine.main_stack_, machine.main_stack_bytes_);
  }

  void switch_to(Context& from, Context& to, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, stack, bytes);
    swapcontext(&from.context, &to.context);
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#else
    if (_setjmp(from.left) != 0) return;
    from.was_left = true;
    if (to.was_left) _longjmp(to.left, 1);
    setcontext(&to.context);
#endif
  }

  // Lets others run until all of fibers [begin, begin + count) wait here; `waiting` counts them.
  void wait(unsigned& waiting, size_t begin, size_t count) {
    fibers_[current_].ready = false;
    if (++waiting == count) {
      for (size_t i = begin; i < begin + count; ++i) fibers_[i].ready = true;
      waiting = 0;
    }
    switch_to(fibers_[current_], main_, main_stack_, main_stack_bytes_);
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
  Context main_;
  const void* main_stack_ = nullptr;
  size_t main_stack_bytes_ = 0;
  std::function<void()> kernel_;
  std::exception_ptr failure_;
  unsigned current_ = 0, waiting_ = 0, done_ = 0;
  int barrier_ = 0;  // line of the barrier that some wait at
  std::vector<std::unique_ptr<char[]>> shared_;
  size_t shared_bytes_ = 0;
  std::unique_ptr<unsigned char[]> dynamic_;
  size_t dynamic_bytes_ = 0, dynamic_skipped_ = 0;
};

}  // namespace dcn::emulate

// What kernels and csrc/cuda/launch.cuh use of CUDA.

#define __global__ inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DCN_SHARED(Type, name) Type& name = dcn::emulate::Machine::get().shared_variable<Type>()
#define DCN_DYNAMIC_SHARED(name) unsigned char* name = dcn::emulate::Machine::get().dynamic_shared()
#define DCN_LAUNCH_SHARED(kernel, blocks, threads, bytes, stream, ...) \
  ((void)(stream), dcn::emulate::Machine::get().launch(blocks, threads, bytes, [&] { kernel(__VA_ARGS__); }))
#define DCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  DCN_LAUNCH_SHARED(kernel, blocks, threads, 0, stream, __VA_ARGS__)

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE(), const char* file = __builtin_FILE()) {
  dcn::emulate::Machine::get().block_barrier(line, file);
}

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  STD_TORCH_CHECK(lanes == 0xffffffffu, "emulated kernel: only whole warps can shuffle");
  const dcn::emulate::Exchange all = dcn::emulate::Machine::get().exchange_all(&value, sizeof(T));
  return *all.from<T>(threadIdx.x % dcn::emulate::kWarpLanes ^ static_cast<unsigned>(distance));
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

template <typename A>
A reciprocal(A value) {
  return A(1) / value;
}

template <typename Kernel>
int compiled_capability(Kernel*) {
  return emulate::Machine::get().device.capability;
}

// Small, so that thread blocks loop over their work, and splits of the positions have several tiles.
constexpr int64_t kMaxBlocks = 5;
constexpr int64_t kEnoughBlocks = 8;

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}
  int stream() const { return 0; }
  Device device() const { return emulate::Machine::get().device; }
};

}  // namespace dcn::cuda

namespace dcn::emulate {

inline void Machine::run_block() {
  shared_.clear(), shared_bytes_ = 0;
  // Has exactly the size that was asked for, so that a sanitizer sees accesses beyond it; the skipped bytes align it.
  dynamic_.reset(new unsigned char[dynamic_bytes_ + kDynamicAlignment]);
  dynamic_skipped_ = kDynamicAlignment - reinterpret_cast<uintptr_t>(dynamic_.get()) % kDynamicAlignment;
  std::memset(dynamic_.get(), 0xff, dynamic_bytes_ + kDynamicAlignment);
  warps_.assign(fibers_.size() / kWarpLanes, Warp{});
  waiting_ = done_ = 0, failure_ = nullptr;
  current_ = static_cast<unsigned>(fibers_.size()) - 1;
  for (Fiber& fiber : fibers_) {
    fiber.ready = true, fiber.exchanges = 0, fiber.shared_variables = 0;
    fiber.copies.clear(), fiber.committed_copies.clear();
    fiber.was_left = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, &Machine::enter, 0);
  }
  while (done_ < fibers_.size()) {
    choose();
    threadIdx.x = current_;
    switch_to(main_, fibers_[current_], fibers_[current_].stack.get(), kStackBytes);
    if (failure_) std::rethrow_exception(failure_);
  }
}

inline void Machine::launch(int64_t blocks, unsigned threads, size_t dynamic_bytes, std::function<void()> kernel) {
  STD_TORCH_CHECK(dynamic_bytes <= static_cast<size_t>(device.shared_bytes), "emulated kernel: launched with ",
                  dynamic_bytes, " bytes of shared memory");
  dynamic_bytes_ = dynamic_bytes;
  STD_TORCH_CHECK(blocks > 0 && threads > 0 && threads <= 1024 && threads % kWarpLanes == 0,
                  "emulated kernel: launched with ", blocks, " blocks of ", threads, " threads");
  kernel_ = std::move(kernel);
  fibers_.resize(threads);
  blockDim.x = threads, gridDim.x = static_cast<unsigned>(blocks);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
}

}  // namespace dcn::emulate
