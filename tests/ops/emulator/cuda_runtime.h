// Enough of CUDA on the host to run a kernel's logic, with the rules of the hardware checked.
//
// What it cannot show is the hardware's own: how threads interleave between two barriers (there the race
// detector speaks), occupancy, time.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

using cudaStream_t = void*;

#define threadIdx (emulator::Index{emulator::current.thread})
#define blockIdx (emulator::Index{emulator::current.block})
#define blockDim (emulator::Index{emulator::current.threads})
#define gridDim (emulator::Index{emulator::current.blocks})

namespace emulator {

inline const char library = 0;  // an address in the library that holds the kernels

template <typename V>
V shuffle(unsigned mask, V value, unsigned lane, const Where& where) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8, "a shuffle moves 4 or 8 bytes");
  V result;
  collective(Collective::kShuffle, mask, &value, sizeof value, lane, &result, where);
  return result;
}

inline unsigned lane() {
  return current.thread % kWarp;
}

inline unsigned ballot(unsigned mask, bool vote, const Where& where) {
  const unsigned value = vote;
  unsigned result;
  collective(Collective::kBallot, mask, &value, sizeof value, 0, &result, where);
  return result;
}

// Not inlined, so that the address it returns to is the kernel's, and without checks of its own.
template <typename V, typename Change>
__attribute__((noinline, no_sanitize("thread"))) V changed(V* address, Change change) {
  give_way();
  atomic(address, sizeof(V), __builtin_return_address(0));
  const V before = *address;
  *address = change(before);
  return before;
}

}  // namespace emulator

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// Hints for caches change nothing here.
#define EMULATOR_LOAD(name)               \
  template <typename V>                   \
  __forceinline__ V name(const V* from) { \
    return *from;                         \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name)                                               \
  template <typename V>                                                    \
  __forceinline__ void name(V* to, const std::type_identity_t<V>& value) { \
    *to = value;                                                           \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

inline void __syncthreads(const emulator::Where& where = emulator::Where::current()) {
  emulator::barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       const emulator::Where& where = emulator::Where::current()) {
  emulator::collective(emulator::Collective::kSync, mask, nullptr, 0, 0, nullptr, where);
}
inline void __threadfence() {
  emulator::fence();
}

template <typename V>
V __shfl_sync(unsigned mask, V value, int lane, int width = 32,
              const emulator::Where& where = emulator::Where::current()) {
  const int own = emulator::lane();
  return emulator::shuffle(mask, value, own / width * width + lane % width, where);
}
template <typename V>
V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32,
                 const emulator::Where& where = emulator::Where::current()) {
  const unsigned own = emulator::lane();
  return emulator::shuffle(mask, value, own % width >= delta ? own - delta : own, where);
}
template <typename V>
V __shfl_down_sync(unsigned mask, V value, unsigned delta, int width = 32,
                   const emulator::Where& where = emulator::Where::current()) {
  const unsigned own = emulator::lane();
  return emulator::shuffle(mask, value,
                           own % width + delta < static_cast<unsigned>(width) ? own + delta : own, where);
}
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int other, int width = 32,
                  const emulator::Where& where = emulator::Where::current()) {
  const unsigned own = emulator::lane(), from = own ^ other;
  return emulator::shuffle(mask, value, from / width <= own / width ? from : own, where);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              const emulator::Where& where = emulator::Where::current()) {
  return emulator::ballot(mask, vote, where);
}
inline int __any_sync(unsigned mask, int vote, const emulator::Where& where = emulator::Where::current()) {
  return emulator::ballot(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote, const emulator::Where& where = emulator::Where::current()) {
  return emulator::ballot(mask, !vote, where) == 0;
}

template <typename V>
V atomicAdd(V* address, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V before) { return static_cast<V>(before + value); });
}
template <typename V>
V atomicSub(V* address, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V before) { return static_cast<V>(before - value); });
}
template <typename V>
V atomicMax(V* address, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V before) { return std::max(before, value); });
}
template <typename V>
V atomicMin(V* address, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V before) { return std::min(before, value); });
}
template <typename V>
V atomicExch(V* address, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V) { return value; });
}
template <typename V>
V atomicCAS(V* address, std::type_identity_t<V> expected, std::type_identity_t<V> value) {
  return emulator::changed(address, [=](V before) { return before == expected ? value : before; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulator::changed(address, [=](unsigned before) { return before >= last ? 0 : before + 1; });
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
                                            unsigned long long* = nullptr) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, size_t size) {
  *data = emulator::cuda_malloc(size);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
  std::memset(data, value, size);
  emulator::written_by_host(data, size);
  return cudaSuccess;
}
