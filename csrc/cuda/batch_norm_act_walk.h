// What the kernels of batch_norm_act are told, and the way of a thread through a map.
//
// All kernels walk a map in the same way. Along the positions a block has one channel and a chunk of images,
// along the channels a tile of channels and a chunk of rows (n, p); either way a thread keeps its channels,
// and with them its factors in registers, for all elements it meets.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../batch_norm_act.h"
#include "../divider.h"
#include "channel_factors.h"
#include "channel_sums.h"
#include "kernel.h"

namespace auglocal {

struct Map {
  void* data;  // null: not there
  int64_t stride_n, stride_outer, stride;
};

struct Walk {
  int64_t images, channels, positions;
  int64_t chunk;  // images or rows of a block
  int64_t tiles;  // blocks side by side: channels, or tiles of them
  int64_t splits;
  int lanes;  // threads side by side along the positions or along the channels, a power of two
};

struct Params {
  Map x, residual, grad;
  Map out, out_residual;  // y, or the gradients of x and of the residual
  Divider grad_rows;      // rows of the maps for one of grad: those of an image where it is the same for all
                          // positions
  Vectors vectors;
  float slope;
  Walk walk;

  // Of a reduction: what its last blocks write.
  Partials partials;
  float *first, *second;  // (C,): mean and var, or mean and rstd, or sum_g and sum_g_xhat
  bool updates;           // make rstd, and update the running statistics that are there
  Update<float> update;
  float *running_mean, *running_var;  // (C,) or null
  int64_t* batches;                   // how many have been seen, or null
};

// One thread's way through its chunk of maps of any strides.
template <int kVector, bool kChannels>
struct Walker {
  int64_t n, outer, inner;  // image, then position and first channel, or channel and first position
  int64_t row, end;
  int64_t step_n, step_p, positions, first;
  int64_t channel;  // the first of the thread; of a thread beside the last channel any other
  int step;

  __device__ explicit Walker(const Walk& walk) {
    const int lane = threadIdx.x % walk.lanes, group = threadIdx.x / walk.lanes;
    const int64_t tile = blockIdx.x % walk.tiles, split = blockIdx.x / walk.tiles;
    const int64_t rows = kChannels ? walk.images * walk.positions : walk.images;
    positions = walk.positions;
    row = split * walk.chunk + group;
    end = (split + 1) * walk.chunk < rows ? (split + 1) * walk.chunk : rows;
    if constexpr (kChannels) {
      inner = (tile * walk.lanes + lane) * kVector;
      if (inner >= walk.channels) end = row;
      channel = inner < walk.channels ? inner : 0;
      n = row / positions;
      outer = row % positions;
      step = static_cast<int>(kThreads / walk.lanes);
      step_n = step / positions;
      step_p = step % positions;
    } else {
      first = static_cast<int64_t>(lane) * kVector;
      if (first >= positions) end = row;
      n = row;
      outer = channel = tile;
      inner = first;
      step = walk.lanes * kVector;
      step_n = kThreads / walk.lanes;
    }
  }

  __device__ __forceinline__ bool more() const { return row < end; }

  __device__ __forceinline__ void next() {
    if constexpr (kChannels) {
      row += step;
      n += step_n;
      outer += step_p;
      if (outer >= positions) {
        outer -= positions;
        ++n;
      }
    } else {
      inner += step;
      if (inner >= positions) {
        inner = first;
        n += step_n;
        row = n;
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ T* at(const Map& map) const {
    return static_cast<T*>(map.data) + n * map.stride_n + outer * map.stride_outer + inner * map.stride;
  }

  // A map that is the same for all positions is read once for the whole vector.
  template <typename T>
  __device__ __forceinline__ void read(float (&out)[kVector], const Map& map) const {
    const T* x = at<const T>(map);
    if (!kChannels && kVector > 1 && map.stride == 0) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) out[v] = static_cast<float>(*x);
    } else {
      load<T, kVector>(out, x);
    }
  }
};

// One thread's way through its chunk of channels-last maps whose rows, all N P of them, have one common step.
template <int kVector>
struct Rows {
  int64_t channel, first;  // first channel, first row
  int count, step;  // rows of this thread, and from one of them to the next; none beside the last channel

  __device__ __forceinline__ explicit Rows(const Walk& walk) {
    const int lane = threadIdx.x % walk.lanes, group = threadIdx.x / walk.lanes;
    const int64_t tile = blockIdx.x % walk.tiles, split = blockIdx.x / walk.tiles;
    const int64_t rows = walk.images * walk.positions, next = (split + 1) * walk.chunk;
    const int left = static_cast<int>((next < rows ? next : rows) - split * walk.chunk) - group;
    channel = (tile * walk.lanes + lane) * kVector;
    first = split * walk.chunk + group;
    step = kThreads / walk.lanes;
    count = channel < walk.channels && left > 0 ? (left + step - 1) / step : 0;
  }
};

// A thread's place in one of those maps.
template <typename T, int kVector>
struct Cursor {
  using Vector = Pack<std::remove_const_t<T>, kVector>;
  T* at;
  int step;

  __device__ __forceinline__ Cursor(const Map& map, const Rows<kVector>& rows)
      : at(static_cast<T*>(map.data) + rows.first * map.stride_outer + rows.channel),
        step(rows.step * static_cast<int>(map.stride_outer)) {}

  // kCount vectors from here on, all of them asked for before the first is used.
  template <int kCount>
  __device__ __forceinline__ void read(Vector (&out)[kCount]) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) out[u] = *reinterpret_cast<const Vector*>(at + u * step);
    at += kCount * step;
  }

  __device__ __forceinline__ void write(const Vector& vector) {
    store_pack(at, vector);
    at += step;
  }
};

// The same in a map of which a row may stand for several.
template <typename T, int kVector>
struct RepeatedCursor {
  const char* from;
  int stride, row, step;  // stride in bytes, so that a place is one multiplication and addition

  __device__ __forceinline__ RepeatedCursor(const Map& map, const Rows<kVector>& rows)
      : from(reinterpret_cast<const char*>(static_cast<const T*>(map.data) + rows.channel)),
        stride(static_cast<int>(map.stride_outer * sizeof(T))),
        row(static_cast<int>(rows.first)),
        step(rows.step) {}

  template <int kCount>
  __device__ __forceinline__ void read(Pack<T, kVector> (&out)[kCount], const Divider& divider) {
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      out[u] = *reinterpret_cast<const Pack<T, kVector>*>(
          from + static_cast<int64_t>(divider.divide(row + u * step)) * stride);
    row += kCount * step;
  }
};

}  // namespace auglocal
