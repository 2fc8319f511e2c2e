// Counters by which the blocks of a launch find out which of them is the last, and their memory.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

namespace auglocal {

// Whether this block is the last of `count` that come to this counter, the same in all of its threads. The
// last one can then read, by load_fresh, what the others wrote before they came. The counter is zero again
// afterwards.
__device__ inline bool comes_last(unsigned* counter, unsigned count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, count - 1) == count - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// From the L2 cache: the multiprocessor's own may hold the line as it was before another block wrote to it.
template <typename V>
__device__ __forceinline__ V load_fresh(const V* from) {
  static_assert(sizeof(V) % sizeof(float) == 0);
  V value;
#pragma unroll
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i)
    reinterpret_cast<float*>(&value)[i] = __ldcg(reinterpret_cast<const float*>(from) + i);
  return value;
}

inline void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// cudaMalloc is then allowed on a thread that captures a graph: it is no part of the graph.
class AllocationDuringCapture {
 public:
  AllocationDuringCapture() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~AllocationDuringCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllocationDuringCapture(const AllocationDuringCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// `count` counters for a launch on this stream of the current device, all zero before it.
//
// Launches share them where they cannot run at the same time: on one stream, and within a capture on one
// stream of it, because a graph may be replayed beside whatever that stream does then. Their memory is not
// the allocator's, which would take them for a tensor that a graph's pool has lost, and is never given back,
// because nobody knows when the last graph has gone: some kilobytes for each stream and each capture.
inline unsigned* tickets(int64_t count, cudaStream_t stream) {
  constexpr int64_t kLeast = 4096, kSlab = int64_t(1) << 18;  // counters
  struct Counters {
    unsigned* first = nullptr;
    int64_t count = 0;
  };
  using Key = std::tuple<int, unsigned long long, unsigned long long>;  // device, stream, capture or 0
  static std::mutex mutex;
  static std::map<Key, Counters> owned;
  static std::map<int, Counters> slabs;  // what is left of each device's newest piece of memory

  int device = 0;
  unsigned long long stream_id = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaStreamGetId(stream, &stream_id));
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;

  const std::lock_guard<std::mutex> lock(mutex);
  Counters& mine = owned[{device, stream_id, capture}];
  if (mine.count < count) {
    const int64_t wanted = std::max(count, kLeast);
    Counters& slab = slabs[device];
    if (slab.count < wanted) {
      const AllocationDuringCapture allowed;
      const int64_t size = std::max(wanted, kSlab);
      void* memory = nullptr;
      check_cuda(cudaMalloc(&memory, size * sizeof(unsigned)));
      slab = {static_cast<unsigned*>(memory), size};
    }
    // In a capture it becomes part of the graph, before the first launch that needs it.
    check_cuda(cudaMemsetAsync(slab.first, 0, wanted * sizeof(unsigned), stream));
    mine = {slab.first, wanted};
    slab = {slab.first + wanted, slab.count - wanted};
  }
  return mine.first;
}

}  // namespace auglocal
