// What the kernels of every op share: block size, loads and stores of 16 bytes, a block's sum,
// launch arithmetic.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace auglocal {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// kVector elements moved by one instruction.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T values[kVector];
};

template <typename T, int kVector>
__device__ __forceinline__ void load(float (&out)[kVector], const T* x) {
  if constexpr (kVector == 1) {
    out[0] = static_cast<float>(*x);
  } else {
    const Pack<T, kVector> pack = *reinterpret_cast<const Pack<T, kVector>*>(x);
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = static_cast<float>(pack.values[v]);
  }
}

template <typename T, int kVector>
__device__ __forceinline__ void store(T* y, const float (&in)[kVector]) {
  if constexpr (kVector == 1) {
    *y = static_cast<T>(in[0]);
  } else {
    Pack<T, kVector> pack;
#pragma unroll
    for (int v = 0; v < kVector; ++v) pack.values[v] = static_cast<T>(in[v]);
    *reinterpret_cast<Pack<T, kVector>*>(y) = pack;
  }
}

// Sum over the threads of a block in a fixed order; the result is valid in thread 0.
template <typename V>
__device__ V block_sum(V value) {
  __shared__ V partial[kThreads];
  __syncthreads();  // an earlier sum of the same type may still be read
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  return partial[0];
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int power_of_two(int64_t wanted, int most) {
  int lanes = 1;
  while (lanes < wanted && lanes < most) lanes *= 2;
  return lanes;
}

inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count < (int64_t(1) << 31), "the batch is too large for one launch");
  return static_cast<unsigned>(count);
}

}  // namespace auglocal
