// What the kernels of every op share: block size, loads and stores of 16 bytes, a block's sum,
// launch arithmetic.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace auglocal {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// kVector elements moved by one instruction.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T values[kVector];
};

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <typename T, int kVector>
__device__ __forceinline__ Pack<T, kVector> load_pack(const T* x) {
  return *reinterpret_cast<const Pack<T, kVector>*>(x);
}

// One element as a float. Two bfloat16 are taken out of their word by one instruction each, which the
// conversion from 16 bits needs one and a half for.
template <typename T, int kVector>
__device__ __forceinline__ float element(const Pack<T, kVector>& pack, int v) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16> && kVector % 2 == 0) {
    uint32_t words[kVector / 2];
    std::memcpy(words, &pack, sizeof words);
    const uint32_t bits = v % 2 == 0 ? words[v / 2] << 16 : words[v / 2] & 0xffff0000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return static_cast<float>(pack.values[v]);
  }
}

// The compiler splits the assignment of a pack, or of a word, into its elements; a store with a cache
// operator (here the one that is the default) it leaves whole.
template <typename T, int kVector>
__device__ __forceinline__ void store_pack(T* y, const Pack<T, kVector>& pack) {
  if constexpr (sizeof(pack) == 1) {
    *y = pack.values[0];
  } else {
    using Whole = typename Word<sizeof(pack)>::Type;
    Whole word;
    std::memcpy(&word, &pack, sizeof word);
    __stwb(reinterpret_cast<Whole*>(y), word);
  }
}

template <typename T, int kVector>
__device__ __forceinline__ void load(float (&out)[kVector], const T* x) {
  if constexpr (kVector == 1) {
    out[0] = static_cast<float>(*x);
  } else {
    const Pack<T, kVector> pack = load_pack<T, kVector>(x);
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = element(pack, v);
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
    store_pack(y, pack);
  }
}

// kCount consecutive float32 values of a tensor that lies on 16 bytes, such as the factors of some channels.
template <int kCount>
__device__ __forceinline__ void load_floats(float (&out)[kCount], const float* in) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int first = 0; first < kCount; first += 4) {
      const Pack<float, 4> pack = load_pack<float, 4>(in + first);
#pragma unroll
      for (int v = 0; v < 4; ++v) out[first + v] = pack.values[v];
    }
  } else {
#pragma unroll
    for (int v = 0; v < kCount; ++v) out[v] = in[v];
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
