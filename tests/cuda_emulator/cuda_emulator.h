// Runs CUDA kernels as C++ on the CPU, to check results, barriers, shared memory and bounds without a GPU.
//
// Every CUDA thread is a fiber; the blocks of a launch run one after the other. A fiber runs until it meets a barrier or a
// warp operation, so a schedule is an order of blocks and of threads, and there are several. Caught here: a barrier that
// not all threads reach, or reach at different places; a warp operation that names a lane which has left or waits
// elsewhere; shared memory out of bounds, read before it was written, or shared between threads without a barrier in
// between. Compiled with -fsanitize=address,undefined: global memory out of bounds, misaligned vector loads.
// Not caught: races on global memory, anything about speed.
//
// Covers what the project's kernels use: one-dimensional launches, __shfl_down_sync, __syncthreads, __syncwarp, bf16 and
// fp16 conversions. `Shared<T, n>` stands for an array in shared memory.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_SWITCH_BEGIN(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define EMULATOR_SWITCH_END(saved, stack, size) __sanitizer_finish_switch_fiber(saved, stack, size)
#else
#define EMULATOR_SWITCH_BEGIN(save, stack, size)
#define EMULATOR_SWITCH_END(saved, stack, size)
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Schedule { kAscending, kDescending, kShuffled };

struct Index {
  unsigned x;
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
  State state = State::kReady;
  const void* site = nullptr;  // of the barrier it waits at
  const char* operation = nullptr;
  unsigned mask = 0;
  int offset = 0;
  uint64_t value = 0;
};

constexpr size_t kStackBytes = 192 * 1024;
constexpr int kWarp = 32;

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  std::function<void()> body;
  std::exception_ptr error;
  Index thread{0}, block{0}, block_size{0}, grid_size{0};
  uint64_t block_epoch = 1;               // barriers of the block so far, over all blocks
  std::vector<uint64_t> warp_epoch;       // __syncwarp of each warp so far
};
inline Machine machine;

class SharedBase {
 public:
  SharedBase() { all().push_back(this); }
  virtual void start_block() = 0;
  static std::vector<SharedBase*>& all() {
    static std::vector<SharedBase*> variables;
    return variables;
  }

 protected:
  ~SharedBase() = default;
};

// An array in shared memory whose every access is checked.
template <class T, int kSize>
class Shared : public SharedBase {
 public:
  class Reference {
   public:
    Reference(Shared& array, int index) : array_(array), index_(index) {}
    operator T() const { return array_.read(index_); }
    Reference& operator=(T value) {
      array_.write(index_, value);
      return *this;
    }
    Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }

   private:
    Shared& array_;
    int index_;
  };

  Reference operator[](int index) {
    if (index < 0 || index >= kSize)
      throw Error("shared memory out of bounds: entry " + std::to_string(index) + " of " + std::to_string(kSize));
    return {*this, index};
  }
  void start_block() override { std::fill_n(entries_, kSize, Entry{}); }

 private:
  struct Access {
    int thread = -1;
    uint64_t block_epoch = 0, warp_epoch = 0;

    static Access now() {
      const int thread = static_cast<int>(machine.thread.x);
      return {thread, machine.block_epoch, machine.warp_epoch[thread / kWarp]};
    }
    // Whether a barrier lies between this access and one of the running thread.
    bool is_ordered() const {
      const Access other = now();
      return thread < 0 || thread == other.thread || block_epoch < other.block_epoch ||
             (thread / kWarp == other.thread / kWarp && warp_epoch < other.warp_epoch);
    }
  };
  struct Entry {
    T value{};
    bool written = false;
    Access write, read;
  };

  T read(int index) {
    Entry& entry = entries_[index];
    if (!entry.written) throw Error("shared memory read before it was written: entry " + std::to_string(index));
    if (!entry.write.is_ordered()) throw Error("race on shared memory: no barrier between write and read");
    entry.read = Access::now();
    return entry.value;
  }
  void write(int index, T value) {
    Entry& entry = entries_[index];
    if (!entry.write.is_ordered() || !entry.read.is_ordered())
      throw Error("race on shared memory: no barrier before an entry is written again");
    entry.value = value;
    entry.written = true;
    entry.write = Access::now();
  }

  Entry entries_[kSize];
};

inline Fiber& running() { return machine.fibers[machine.thread.x]; }

inline void leave(State state) {
  Fiber& fiber = running();
  fiber.state = state;
  EMULATOR_SWITCH_BEGIN(state == State::kDone ? nullptr : &fiber.sanitizer, machine.scheduler_stack,
                        machine.scheduler_stack_size);
  swapcontext(&fiber.context, &machine.scheduler);
  EMULATOR_SWITCH_END(fiber.sanitizer, &machine.scheduler_stack, &machine.scheduler_stack_size);
}

inline void enter() {
  EMULATOR_SWITCH_END(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
  try {
    machine.body();
  } catch (...) {
    machine.error = std::current_exception();
  }
  leave(State::kDone);
}

inline void run(int thread) {
  machine.thread.x = static_cast<unsigned>(thread);
  Fiber& fiber = machine.fibers[thread];
  EMULATOR_SWITCH_BEGIN(&machine.scheduler_sanitizer, fiber.stack.get(), kStackBytes);
  swapcontext(&machine.scheduler, &fiber.context);
  EMULATOR_SWITCH_END(machine.scheduler_sanitizer, nullptr, nullptr);
  if (machine.error) std::rethrow_exception(machine.error);
}

inline void barrier(const void* site) {
  running().site = site;
  leave(State::kAtBarrier);
}

inline uint64_t warp_operation(const char* operation, unsigned mask, int offset, uint64_t value) {
  Fiber& fiber = running();
  if (!(mask >> (machine.thread.x % kWarp) & 1)) throw Error(std::string(operation) + ": the mask leaves its caller out");
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.offset = offset;
  fiber.value = value;
  leave(State::kInWarp);
  return fiber.value;
}

// Complete the operation a warp waits in, once all lanes of its mask are there. Returns whether it was completed.
inline bool complete_warp(int warp) {
  const int first = warp * kWarp, threads = static_cast<int>(machine.fibers.size());
  const int lanes = std::min(kWarp, threads - first);
  const Fiber* waiting = nullptr;
  for (int lane = 0; lane < lanes && !waiting; ++lane)
    if (machine.fibers[first + lane].state == State::kInWarp) waiting = &machine.fibers[first + lane];
  if (!waiting) return false;
  const unsigned mask = waiting->mask;
  const std::string operation = waiting->operation;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes || machine.fibers[first + lane].state == State::kDone)
      throw Error(operation + ": the mask names a lane that has left");
    const Fiber& other = machine.fibers[first + lane];
    if (other.state == State::kAtBarrier) throw Error(operation + ": a lane of the mask waits at a barrier");
    if (other.state != State::kInWarp) return false;
    if (operation != other.operation || mask != other.mask) throw Error(operation + ": the lanes of the warp diverge");
  }
  uint64_t values[kWarp] = {};
  for (int lane = 0; lane < lanes; ++lane) values[lane] = machine.fibers[first + lane].value;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = machine.fibers[first + lane];
    const int from = lane + fiber.offset < kWarp ? lane + fiber.offset : lane;
    if (!(mask >> from & 1)) throw Error(operation + ": reads a lane that the mask leaves out");
    fiber.value = values[from];
    fiber.state = State::kReady;
  }
  if (operation == "__syncwarp") ++machine.warp_epoch[warp];
  return true;
}

inline std::vector<int> ordered(int count, Schedule schedule, std::mt19937& random) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = schedule == Schedule::kDescending ? count - 1 - i : i;
  if (schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random);
  return order;
}

inline void run_block(Schedule schedule, std::mt19937& random) {
  const int threads = static_cast<int>(machine.fibers.size());
  ++machine.block_epoch;
  for (SharedBase* variable : SharedBase::all()) variable->start_block();
  for (Fiber& fiber : machine.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
    fiber.state = State::kReady;
  }
  for (;;) {
    bool progressed = false;
    for (const int thread : ordered(threads, schedule, random)) {
      if (machine.fibers[thread].state != State::kReady) continue;
      run(thread);
      progressed = true;
    }
    for (int warp = 0; warp * kWarp < threads; ++warp) progressed |= complete_warp(warp);
    int waiting = 0, done = 0;
    const void* site = nullptr;
    for (const Fiber& fiber : machine.fibers) {
      done += fiber.state == State::kDone;
      if (fiber.state != State::kAtBarrier) continue;
      ++waiting;
      if (site && site != fiber.site) throw Error("__syncthreads: threads wait at different places");
      site = fiber.site;
    }
    if (done == threads) return;
    if (waiting == threads) {
      ++machine.block_epoch;
      for (Fiber& fiber : machine.fibers) fiber.state = State::kReady;
    } else if (waiting && waiting + done == threads) {
      throw Error("__syncthreads: " + std::to_string(done) + " threads have left without it");
    } else if (!progressed) {
      throw Error("deadlock");
    }
  }
}

// kernel<<<blocks, threads>>>(...), with the call in `body`.
inline void launch(int blocks, int threads, Schedule schedule, std::function<void()> body) {
  std::mt19937 random(threads * 7919 + blocks);
  machine.fibers.resize(threads);
  machine.warp_epoch.assign((threads + kWarp - 1) / kWarp, 1);
  machine.body = std::move(body);
  machine.error = nullptr;
  machine.block_size.x = static_cast<unsigned>(threads);
  machine.grid_size.x = static_cast<unsigned>(blocks);
  for (const int block : ordered(blocks, schedule, random)) {
    machine.block.x = static_cast<unsigned>(block);
    run_block(schedule, random);
  }
}

}  // namespace emulator

using emulator::Shared;

#define threadIdx (emulator::machine.thread)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.block_size)
#define gridDim (emulator::machine.grid_size)
#define __syncthreads() emulator::barrier([]() -> const void* { static char site; return &site; }())

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_operation("__syncwarp", mask, 0, 0); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  bits = emulator::warp_operation("__shfl_down_sync", mask, offset, bits);
  memcpy(&value, &bits, sizeof(value));
  return value;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float value) {
  if (value != value) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float value) { return {static_cast<_Float16>(value)}; }
