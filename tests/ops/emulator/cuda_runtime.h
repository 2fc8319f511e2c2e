// Enough of CUDA on the host to run a kernel's logic: the threads of a block are fibers of one thread, each
// run in turn up to its next barrier or shuffle, and blocks run one after the other. What it cannot show is
// the hardware's own: races between barriers, the order of memory, occupancy.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline unsigned thread, block, blocks;
inline unsigned alive, arrived, generation;  // of the barrier of the block
inline char lanes[32][kWarp][16];            // what each lane of each warp hands over

inline void yield() {
  const unsigned self = thread;
  swapcontext(&fibers[self].context, &scheduler);
}

inline void run_thread() {
  kernel();
  fibers[thread].done = true;
  --alive;
  yield();
}

inline void barrier() {
  const unsigned mine = generation;
  if (++arrived == alive) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) yield();
}

inline void launch(unsigned grid, unsigned threads, std::function<void()> body) {
  kernel = std::move(body);
  blocks = grid;
  fibers.resize(threads);
  for (block = 0; block < grid; ++block) {
    alive = threads;
    arrived = 0;
    for (Fiber& fiber : fibers) {
      fiber.stack.resize(kStack);
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, run_thread, 0);
    }
    while (alive) {
      for (thread = 0; thread < threads; ++thread) {
        if (!fibers[thread].done) swapcontext(&scheduler, &fibers[thread].context);
      }
    }
  }
}

// Lanes run in step, so after one turn of all of them every value is there, and after a second one everybody
// has read.
template <typename V>
V exchange(V value, unsigned from) {
  const unsigned warp = thread / kWarp;
  std::memcpy(lanes[warp][thread % kWarp], &value, sizeof value);
  yield();
  V received;
  std::memcpy(&received, lanes[warp][from], sizeof received);
  yield();
  return received;
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::thread})
#define blockIdx (emulator::Index{emulator::block})
#define gridDim (emulator::Index{emulator::blocks})

inline void __syncthreads() {
  emulator::barrier();
}
inline void __syncwarp() {
  emulator::yield();
}

template <typename V>
V __shfl_down_sync(unsigned, V value, unsigned offset, unsigned width = emulator::kWarp) {
  const unsigned lane = emulator::thread % emulator::kWarp;
  return emulator::exchange(value, lane % width + offset < width ? lane + offset : lane);
}

template <typename V>
V __shfl_xor_sync(unsigned, V value, unsigned mask) {
  return emulator::exchange(value, (emulator::thread % emulator::kWarp) ^ mask);
}

template <typename V>
void __stwb(V* to, V value) {
  *to = value;
}

template <typename V>
V __ldcg(const V* from) {
  return *from;
}

// Blocks run one after the other, and threads only up to a barrier.
inline void __threadfence() {}

inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

// One device, one stream, and no capture.
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };

inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 0;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
