// Kernels with one defect each, which the emulator has to find, and beside them the same without it.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

constexpr int kThreads = 64;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Params {
  float* data;
  unsigned* counter;
  int elements;
  unsigned how;  // bits, each the absence of a defect
};

// Each thread reads what its neighbour wrote to shared memory. 1: behind a barrier.
__global__ void shared_race_kernel(const Params params) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (params.how & 1) __syncthreads();
  params.data[threadIdx.x] = partial[(threadIdx.x + 1) % kThreads];
}

// The same within a warp, whose lanes only seem to run in step. 1: behind __syncwarp; 2: behind a shuffle.
__global__ void warp_race_kernel(const Params params) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (params.how & 1) __syncwarp();
  if (params.how & 2) __shfl_xor_sync(kAllLanes, 1.0f, 1);
  params.data[threadIdx.x] = partial[threadIdx.x ^ 1];
}

// A barrier too few in a tree of sums: the next level reads what this one still writes. 1: it is there.
__global__ void tree_race_kernel(const Params params) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = 1;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    if (params.how & 1) __syncthreads();
  }
  if (threadIdx.x == 0) params.data[blockIdx.x] = partial[0];
}

// All threads write to one element. 1: one thread of each block; 2: of one block.
__global__ void global_race_kernel(const Params params) {
  if ((params.how & 1) && threadIdx.x != 0) return;
  if ((params.how & 2) && blockIdx.x != 0) return;
  params.data[0] = 1;
}

// Each block leaves a sum, and the last one to come adds them up in their order. 1: with a fence before the
// ticket; 2: with a fence behind it; 4: a barrier before the ticket; 8: an atomic ticket.
__global__ void last_block_kernel(const Params params) {
  __shared__ bool last;
  if (threadIdx.x < 2)
    params.data[1 + 2 * blockIdx.x + threadIdx.x] = 0.1f * static_cast<float>(blockIdx.x + 1);
  if (params.how & 1) __threadfence();
  if (params.how & 4) __syncthreads();
  if (threadIdx.x == 0) {
    unsigned ticket;
    if (params.how & 8) ticket = atomicInc(params.counter, gridDim.x - 1);
    else ticket = (*params.counter)++;
    last = ticket == gridDim.x - 1;
  }
  __syncthreads();
  if (params.how & 2) __threadfence();
  if (!last || threadIdx.x != kThreads - 1) return;
  float sum = 0;
  for (unsigned i = 0; i < 2 * gridDim.x; ++i) sum += __ldcg(params.data + 1 + i);
  params.data[0] = sum;
}

// A sum of floats in whatever order threads and blocks come: no race, but other bits.
__global__ void unordered_sum_kernel(const Params params) {
  atomicAdd(params.data, 1.0f / static_cast<float>(1 + threadIdx.x + blockIdx.x * kThreads));
}

// 1: all lanes that the mask names take part; 2: the lane that is read is one of the mask; 4: no lane has
// ended; 8: the mask of a lane names the lane.
__global__ void mask_kernel(const Params params) {
  const int lane = threadIdx.x % kWarp;
  if (!(params.how & 4) && lane == 31) return;
  if (!(params.how & 1)) {
    if (lane < 16) params.data[threadIdx.x] = __shfl_down_sync(kAllLanes, 1.0f, 1);
    return;
  }
  if (!(params.how & 2)) {
    if (lane < 16) params.data[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
    return;
  }
  const unsigned mask = params.how & 8 ? kAllLanes : lane < 16 ? 0xffff0000u : 0x0000ffffu;
  params.data[threadIdx.x] = static_cast<float>(__ballot_sync(mask, lane % 2));
}

// Half of a warp waits for the other half, which waits for all threads.
__global__ void stuck_kernel(const Params params) {
  if (threadIdx.x % kWarp < 16) __syncthreads();
  else params.data[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
}

// 1: all threads wait at the same barrier; 2: none has ended before.
__global__ void barrier_kernel(const Params params) {
  if (!(params.how & 2) && threadIdx.x == 5) return;
  if ((params.how & 1) || threadIdx.x % 2) __syncthreads();
  else params.data[threadIdx.x] = 1, __syncthreads();
  params.data[threadIdx.x] = 0;
}

// 1: the shared array is written; 2: the tensor is.
__global__ void unwritten_kernel(const Params params) {
  __shared__ float partial[kThreads];
  if (params.how & 1) partial[threadIdx.x] = 0;
  if (params.how & 2) params.data[threadIdx.x] = 0;
  const float found = partial[threadIdx.x];
  if (params.data[threadIdx.x] + found == 12345) params.counter[0] = 1;
}

// 1: inside of the tensor; 2: inside of the shared array; 4: inside of the array by its index.
__global__ void bounds_kernel(const Params params) {
  __shared__ float partial[kThreads];
  float* behind = partial + (params.how & 2 ? 0 : kThreads);
  behind[threadIdx.x] = 0;
  const int i = threadIdx.x + (params.how & 4 ? 0 : 1);
  partial[i] = 1;
  const int64_t at = static_cast<int64_t>(threadIdx.x) - (params.how & 1 ? 0 : 3);
  params.data[at] = params.data[params.how & 1 ? at : params.elements + 2];
}

// 1: a pointer to something.
__global__ void null_kernel(const Params params) {
  float* data = params.how & 1 ? params.data : nullptr;
  data[threadIdx.x] = 1;
}

struct alignas(16) Pack {
  float values[4];
};

// 1: at an address for vectors.
__global__ void alignment_kernel(const Params params) {
  float* from = params.data + 4 * threadIdx.x + (params.how & 1 ? 0 : 1);
  Pack pack = *reinterpret_cast<const Pack*>(from);
  pack.values[0] += 1;
  __stwb(reinterpret_cast<Pack*>(from), pack);
}

}  // namespace

// Whether the threads came to their end.
extern "C" __attribute__((visibility("default"))) bool run(const char* name, unsigned blocks, float* data,
                                                           unsigned* counter, int elements, unsigned how) {
  const Params params{data, counter, elements, how};
  const cudaStream_t stream = nullptr;
  const auto is = [&](const char* known) { return std::strcmp(name, known) == 0; };
  try {
    if (is("shared_race")) shared_race_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("warp_race")) warp_race_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("tree_race")) tree_race_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("global_race")) global_race_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("last_block")) last_block_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("unordered_sum")) unordered_sum_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("mask")) mask_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("stuck")) stuck_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("barrier")) barrier_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("unwritten")) unwritten_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("bounds")) bounds_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("null")) null_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else if (is("alignment")) alignment_kernel<<<blocks, kThreads, 0, stream>>>(params);
    else std::abort();
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}
