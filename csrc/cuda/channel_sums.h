// Reductions over all but the channels of a map: within a block, then over the blocks, of which the last one
// of a tile of channels has the result. Everything is merged in an order that the shape alone decides.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"
#include "tickets.h"

namespace auglocal {

// Of g and of g (x - mean).
struct Sums {
  float g, g_difference;
};

__device__ __forceinline__ Sums merged(const Sums& a, const Sums& b) {
  return {a.g + b.g, a.g_difference + b.g_difference};
}

// Values of a block in shared memory, their fields apart so that neighbours lie in different banks.
template <typename V, int kCount>
struct Apart {
  static constexpr int kFields = sizeof(V) / sizeof(float);
  float fields[kFields][kCount];

  __device__ __forceinline__ void set(int i, const V& value) {
    float all[kFields];
    std::memcpy(all, &value, sizeof all);
#pragma unroll
    for (int f = 0; f < kFields; ++f) fields[f][i] = all[f];
  }

  __device__ __forceinline__ V get(int i) const {
    float all[kFields];
#pragma unroll
    for (int f = 0; f < kFields; ++f) all[f] = fields[f][i];
    V value;
    std::memcpy(&value, all, sizeof all);
    return value;
  }
};

// Merges kValues values of each thread: value v of thread t belongs to column (t kValues + v) % width. Thread
// t < width gets that of column t. `width` is a power of two and at most kThreads.
template <int kValues, typename V>
__device__ __forceinline__ V merge_columns(const V (&values)[kValues], int width) {
  alignas(16) __shared__ Apart<V, kThreads * kValues> shared;
  const int i = threadIdx.x;
#pragma unroll
  for (int v = 0; v < kValues; ++v) shared.set(i * kValues + v, values[v]);
  __syncthreads();
  const int row = i / width * kValues, column = i % width;
  V all = shared.get(row * width + column);
#pragma unroll 1
  for (int v = 1; v < kValues; ++v) all = merged(all, shared.get((row + v) * width + column));
#pragma unroll 1
  for (int half = kThreads / 2; half >= width; half /= 2) {
    __syncthreads();
    shared.set(i, all);
    __syncthreads();
    if (i < half) all = merged(all, shared.get(i + half));
  }
  __syncthreads();
  return all;
}

// What the blocks of a reduction have found: `splits` of them for each tile of channels.
struct Partials {
  void* found;                              // (splits + groups, channels) of V
  unsigned* tickets;                        // (tiles, groups + 1)
  int64_t channels, splits, group, groups;  // `group` splits are merged by the last of them
};

// Merges column by column what lies `channels` apart, `count` times; `there` of the columns exist.
template <typename V>
__device__ __forceinline__ V merge_found(const V* found, int64_t channels, int64_t count, int width,
                                         int64_t there) {
  const int column = threadIdx.x % width;
  V all[1] = {};
  if (column < there) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / width; row < count; row += kThreads / width)
      all[0] = merged(all[0], load_fresh(found + row * channels + column));
  }
  return merge_columns<1>(all, width);
}

// Whether this block is the last of its tile, the same in all of its threads. In thread t < width `value`, so
// far that of this block's split, is then that of all splits for channel `first` + t.
template <typename V>
__device__ __forceinline__ bool merge_splits(V& value, const Partials& partials, int64_t tile, int64_t split,
                                             int64_t first, int width) {
  if (partials.splits == 1) return true;
  const int64_t channels = partials.channels, group = split / partials.group, begin = group * partials.group;
  const int64_t left = partials.splits - begin, members = left < partials.group ? left : partials.group;
  V* found = static_cast<V*>(partials.found) + first;
  unsigned* tickets = partials.tickets + tile * (partials.groups + 1);
  const bool own = threadIdx.x < width && first + threadIdx.x < channels;
  if (own) found[split * channels + threadIdx.x] = value;
  if (!comes_last(tickets + group, static_cast<unsigned>(members))) return false;
  value = merge_found(found + begin * channels, channels, members, width, channels - first);
  if (partials.groups == 1) return true;
  found += partials.splits * channels;
  if (own) found[group * channels + threadIdx.x] = value;
  if (!comes_last(tickets + partials.groups, static_cast<unsigned>(partials.groups))) return false;
  value = merge_found(found, channels, partials.groups, width, channels - first);
  return true;
}

// Splits up to which one block merges them all; more are merged by groups.
constexpr int64_t kMostAtOnce = 64, kGroup = 32;

inline Partials partials_of(int64_t tiles, int64_t splits, int64_t channels, cudaStream_t stream) {
  const int64_t group = splits <= kMostAtOnce ? splits : kGroup, groups = ceil_div(splits, group);
  return {nullptr, tickets(tiles * (groups + 1), stream), channels, splits, group, groups};
}

}  // namespace auglocal
