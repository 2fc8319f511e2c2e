// layer_norm on CUDA. A row belongs to some threads of a block, which keep it in registers; blocks take many
// rows, so that each has its own sums for the gradients of weight and bias, which are then merged.
//
// Rows that are too long for registers, or that do not lie on 16 bytes, are read again for each pass, from
// the caches as far as they go.
#include "../layer_norm.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "../layer_norm_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kKept =
    4;  // vectors of a row that a thread keeps; beside more its sums over rows find no registers

struct Params {
  const void *x, *residual;    // (R, C); residual, of backward grad_total, may be null
  const void* grad;            // (R, C)
  const void *weight, *bias;   // (C,), each may be null
  float *mean, *rstd;          // (R,); mean may be null
  void *out, *total;           // (R, C)
  float* sums;                 // (blocks, 2, C)
  int64_t rows, width, chunk;  // chunk: rows of a block
  int threads;                 // of a row, a power of two
  float eps;
};

// The threads of a row. All of a block's take part in every sum, also those whose row is not there.
struct RowThreads {
  int count, lane, group;

  __device__ __forceinline__ explicit RowThreads(int threads)
      : count(threads), lane(threadIdx.x % threads), group(threadIdx.x / threads) {}

  __device__ __forceinline__ int groups() const { return kThreads / count; }
};

// Sums over the threads of a row in a fixed order; the same bits in each of them.
template <int kCount>
__device__ __forceinline__ void row_sums(float (&sums)[kCount], const RowThreads& threads) {
  const int width = threads.count < kWarp ? threads.count : kWarp;
  for (int offset = width / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], offset);
  }
  if (threads.count <= kWarp) return;
  __shared__ float partial[kCount * kThreads / kWarp];
  const int warp = threadIdx.x / kWarp, first = threads.group * (threads.count / kWarp);
  __syncthreads();  // the sums before may still be read
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) partial[warp * kCount + i] = sums[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums[i] = 0;
    for (int other = 0; other < threads.count / kWarp; ++other)
      sums[i] += partial[(first + other) * kCount + i];
  }
}

// The part of a row that is a thread's: vectors that lie `threads` apart. With kPacks, so many at most, which
// are read at once; otherwise each is read where it is used.
template <typename T, int kVector, int kPacks>
struct RowPart {
  const T* row;
  int64_t vectors;
  int first, step;
  Pack<T, kVector> kept[kPacks > 0 ? kPacks : 1];

  __device__ __forceinline__ RowPart(const void* data, int64_t at, const Params& params, bool inside,
                                     const RowThreads& threads)
      : row(static_cast<const T*>(data) + at),
        vectors(inside ? params.width / kVector : 0),
        first(threads.lane),
        step(threads.count) {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (first + k * step < vectors) kept[k] = load_pack<T, kVector>(row + (first + k * step) * kVector);
    }
  }

  // Calls f(k, place in the row, vector) for each, the k-th of the thread.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) const {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (first + k * step < vectors) f(k, static_cast<int64_t>(first + k * step) * kVector, kept[k]);
    } else {
      for (int64_t i = first; i < vectors; i += step)
        f(0, i * kVector, load_pack<T, kVector>(row + i * kVector));
    }
  }
};

// kVector parameters from an element on, or the same number for each where there are none.
template <typename W, int kVector>
__device__ __forceinline__ void load_parameters(float (&out)[kVector], const void* data, int64_t element,
                                                float otherwise) {
  if (data) {
    constexpr int kPart = kVector * sizeof(W) > 16 ? 16 / sizeof(W) : kVector;
#pragma unroll
    for (int begin = 0; begin < kVector; begin += kPart) {
      float part[kPart];
      load<W, kPart>(part, static_cast<const W*>(data) + element + begin);
#pragma unroll
      for (int v = 0; v < kPart; ++v) out[begin + v] = part[v];
    }
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) out[v] = otherwise;
  }
}

// Statistics of a row that the threads hold a part of each; of x + residual the caller has written the sum.
template <typename T, int kVector, int kPacks, bool kRms>
__device__ __forceinline__ RowNorm<float> statistics(const RowPart<T, kVector, kPacks>& part,
                                                     const RowThreads& threads, const Params& params) {
  float origin[1] = {0};
  if constexpr (!kRms) {
    part.each([&](int, int64_t, const Pack<T, kVector>& pack) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) origin[0] += element(pack, v);
    });
    row_sums(origin, threads);
    origin[0] /= static_cast<float>(params.width);
  }
  float sums[2] = {0, 0};
  part.each([&](int, int64_t, const Pack<T, kVector>& pack) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float d = element(pack, v) - origin[0];
      if constexpr (!kRms) sums[0] += d;
      sums[1] += d * d;
    }
  });
  row_sums(sums, threads);
  return row_norm(origin[0], sums[0], sums[1], params.width, params.eps);
}

template <typename T, int kVector, int kPacks, typename W>
__device__ __forceinline__ void write_normalised(const RowPart<T, kVector, kPacks>& part, int64_t at,
                                                 const RowNorm<float>& norm, const Params& params) {
  part.each([&](int, int64_t i, const Pack<T, kVector>& pack) {
    float weight[kVector], bias[kVector], made[kVector];
    load_parameters<W>(weight, params.weight, i, 1);
    load_parameters<W>(bias, params.bias, i, 0);
#pragma unroll
    for (int v = 0; v < kVector; ++v) made[v] = affine(norm.normalised(element(pack, v)), weight[v], bias[v]);
    store<T, kVector>(static_cast<T*>(params.out) + at + i, made);
  });
}

enum Statistics { kMade, kRmsMade, kGiven };

// y of some rows; total = x + residual where there is a residual. kStatistics: what is made of mean and rstd,
// or that they are given.
template <typename T, typename W, int kVector, int kPacks, int kStatistics>
__global__ void __launch_bounds__(kThreads) rows_kernel(const Params params) {
  const RowThreads threads(params.threads);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * threads.groups() + threads.group;
  const bool inside = row < params.rows;
  const int64_t at = inside ? row * params.width : 0;
  RowPart<T, kVector, kPacks> part(params.x, at, params, inside, threads);
  RowNorm<float> norm{0, 0};
  if constexpr (kStatistics == kGiven) {
    if (inside) norm = {params.mean ? params.mean[row] : 0.0f, params.rstd[row]};
  } else {
    if (params.residual) {
      const RowPart<T, kVector, kPacks> added(params.residual, at, params, inside, threads);
      T* total = static_cast<T*>(params.total) + at;
      added.each([&](int k, int64_t i, const Pack<T, kVector>& pack) {
        const Pack<T, kVector> own = kPacks > 0 ? part.kept[k] : load_pack<T, kVector>(part.row + i);
        Pack<T, kVector> sum;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum.values[v] = static_cast<T>(element(own, v) + element(pack, v));
        store_pack(total + i, sum);
        if constexpr (kPacks > 0) part.kept[k] = sum;
      });
      part.row = total;  // what a thread reads again it has written itself
    }
    norm = statistics<T, kVector, kPacks, kStatistics == kRmsMade>(part, threads, params);
    if (inside && threads.lane == 0) {
      if (params.mean) params.mean[row] = norm.mean;
      params.rstd[row] = norm.rstd;
    }
  }
  write_normalised<T, kVector, kPacks, W>(part, at, norm, params);
}

// The sums over rows that a thread has for its own columns.
template <int kVector, int kPacks>
struct ColumnSums {
  float weight[kPacks][kVector] = {}, bias[kPacks][kVector] = {};
};

// Writes the sums of all groups of a block, (2, C), each column's in the order of the groups.
template <int kVector, int kPacks>
__device__ __forceinline__ void write_sums(const float (&own)[kPacks][kVector], const RowThreads& threads,
                                           int64_t width, float* to) {
  __shared__ float shared[kVector * kThreads];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t first = static_cast<int64_t>(k) * threads.count * kVector;
    if (first >= width) return;  // the same in all threads
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVector; ++v) shared[v * kThreads + threadIdx.x] = own[k][v];
    __syncthreads();
    const int columns = threads.count * kVector;
    for (int i = threadIdx.x; i < columns && first + i < width; i += kThreads) {
      const float* from = shared + i % kVector * kThreads + i / kVector;
      float all = 0;
      for (int group = 0; group < threads.groups(); ++group) all += from[group * threads.count];
      to[first + i] = all;
    }
  }
}

// The gradient of x of a block's rows and, with kSums, their sums for the gradients of weight and bias.
template <typename T, typename W, int kVector, int kPacks, bool kSums>
__global__ void __launch_bounds__(kThreads, kSums ? 2 : 1) backward_kernel(const Params params) {
  static_assert(!kSums || kPacks > 0);
  const RowThreads threads(params.threads);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * params.chunk;
  const int64_t last = first + params.chunk < params.rows ? first + params.chunk : params.rows;
  ColumnSums<kVector, kSums ? kPacks : 1> all;
#pragma unroll 1
  for (int64_t begin = first; begin < last; begin += threads.groups()) {
    const int64_t row = begin + threads.group;
    const bool inside = row < last;
    const int64_t at = inside ? row * params.width : 0;
    const RowPart<T, kVector, kPacks> x(params.x, at, params, inside, threads);
    const RowPart<T, kVector, kPacks> grad(params.grad, at, params, inside, threads);
    RowNorm<float> norm{0, 0};
    if (inside) norm = {params.mean ? params.mean[row] : 0.0f, params.rstd[row]};
    float sums[2] = {0, 0};
    x.each([&](int k, int64_t i, const Pack<T, kVector>& pack) {
      const Pack<T, kVector> grads = kPacks > 0 ? grad.kept[k] : load_pack<T, kVector>(grad.row + i);
      float weight[kVector];
      load_parameters<W>(weight, params.weight, i, 1);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float upstream = element(grads, v), g = upstream * weight[v];
        const float xhat = norm.normalised(element(pack, v));
        sums[0] += g;
        sums[1] += g * xhat;
        if constexpr (kSums) {
          all.weight[k][v] += upstream * xhat;
          all.bias[k][v] += upstream;
        }
      }
    });
    row_sums(sums, threads);
    const float count = static_cast<float>(params.width);
    const RowMeans<float> means{params.mean ? sums[0] / count : 0.0f, sums[1] / count};
    x.each([&](int k, int64_t i, const Pack<T, kVector>& pack) {
      const Pack<T, kVector> grads = kPacks > 0 ? grad.kept[k] : load_pack<T, kVector>(grad.row + i);
      float weight[kVector], made[kVector], added[kVector] = {};
      load_parameters<W>(weight, params.weight, i, 1);
      if (params.residual) load<T, kVector>(added, static_cast<const T*>(params.residual) + at + i);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float xhat = norm.normalised(element(pack, v));
        made[v] = input_gradient(norm, means, element(grads, v) * weight[v], xhat) + added[v];
      }
      store<T, kVector>(static_cast<T*>(params.out) + at + i, made);
    });
  }
  if constexpr (kSums) {
    float* to = params.sums + static_cast<int64_t>(blockIdx.x) * 2 * params.width;
    write_sums(all.weight, threads, params.width, to);
    write_sums(all.bias, threads, params.width, to + params.width);
  }
}

// The sums over a block's rows for a tile of columns: kWarp threads side by side, rows dealt to the warps.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) columns_kernel(const Params params) {
  const int64_t tile = kWarp * kVector, tiles = (params.width + tile - 1) / tile;
  const int64_t part = blockIdx.x / tiles, first = blockIdx.x % tiles * tile;
  const int64_t begin = part * params.chunk;
  const int64_t last = begin + params.chunk < params.rows ? begin + params.chunk : params.rows;
  const RowThreads threads(kWarp);
  const int64_t column = first + threads.lane * kVector;
  ColumnSums<kVector, 1> all;
  if (column < params.width) {
#pragma unroll 2
    for (int64_t row = begin + threads.group; row < last; row += kThreads / kWarp) {
      const int64_t at = row * params.width + column;
      const RowNorm<float> norm{params.mean ? params.mean[row] : 0.0f, params.rstd[row]};
      float x[kVector], grad[kVector];
      load<T, kVector>(x, static_cast<const T*>(params.x) + at);
      load<T, kVector>(grad, static_cast<const T*>(params.grad) + at);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        all.weight[0][v] += grad[v] * norm.normalised(x[v]);
        all.bias[0][v] += grad[v];
      }
    }
  }
  float* to = params.sums + part * 2 * params.width + first;
  write_sums(all.weight, threads, params.width - first, to);
  write_sums(all.bias, threads, params.width - first, to + params.width);
}

struct MergeParams {
  const float* sums;     // (parts, 2, C)
  float *weight, *bias;  // (C,), or null
  int64_t parts, width;
};

// One block per kWarp columns of the (2, C); the parts are dealt to the warps.
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeParams params) {
  const RowThreads threads(kWarp);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp, columns = 2 * params.width;
  const int64_t column = first + threads.lane;
  float all[1][1] = {};
  if (column < columns) {
#pragma unroll 8
    for (int64_t part = threads.group; part < params.parts; part += kThreads / kWarp)
      all[0][0] += params.sums[part * columns + column];
  }
  __shared__ float merged[kThreads];
  merged[threadIdx.x] = all[0][0];
  __syncthreads();
  if (threads.group != 0 || column >= columns) return;
  float sum = 0;
  for (int group = 0; group < threads.groups(); ++group) sum += merged[group * kWarp + threads.lane];
  float* to = column < params.width ? params.weight : params.bias;
  if (to) to[column < params.width ? column : column - params.width] = sum;
}

// How the rows are read: in vectors or one by one, and how many of them a thread keeps, 0 for those that are
// too long.
struct Shape {
  bool vectors, kept;
  int threads;
};

bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <typename T>
Shape shape_of(const Params& params, bool aligned_parameters) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vectors = params.width % kVector == 0 && aligned(params.x) && aligned(params.residual) &&
                       aligned(params.grad) && aligned(params.out) && aligned(params.total) &&
                       aligned_parameters;
  const bool kept = vectors && params.width <= static_cast<int64_t>(kKept) * kVector * kThreads;
  return {vectors, kept, power_of_two(ceil_div(params.width, vectors ? kKept * kVector : kKept), kThreads)};
}

// Parameters of W: x's dtype, or float32.
struct Parameters {
  Tensor weight, bias;
  bool narrow;  // of x's dtype

  explicit Parameters(const NormInputs& in) : weight(in.weight), bias(in.bias) {
    const ScalarType dtype = in.x.scalar_type();
    const auto is = [&](const Tensor& given) { return !given.defined() || given.scalar_type() == dtype; };
    narrow = is(weight) && is(bias);
    if (narrow) return;
    for (Tensor* given : {&weight, &bias})
      if (given->defined()) *given = memory::packed(*given, ScalarType::Float);
  }

  const void* data(const Tensor& given) const { return given.defined() ? given.const_data_ptr() : nullptr; }
  bool aligned() const { return auglocal::aligned(data(weight)) && auglocal::aligned(data(bias)); }
};

template <typename T>
float* floats(const T& tensor) {
  return tensor.defined() && tensor.numel() ? tensor.template mutable_data_ptr<float>() : nullptr;
}

const void* data_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

template <typename T, typename W, int kStatistics>
void launch_rows(Params params, bool aligned_parameters, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Shape shape = shape_of<T>(params, aligned_parameters);
  params.threads = shape.threads;
  const unsigned grid = blocks(ceil_div(params.rows, kThreads / shape.threads));
  if (shape.kept) rows_kernel<T, W, kVector, kKept, kStatistics><<<grid, kThreads, 0, stream>>>(params);
  else if (shape.vectors) rows_kernel<T, W, kVector, 0, kStatistics><<<grid, kThreads, 0, stream>>>(params);
  else rows_kernel<T, W, 1, 0, kStatistics><<<grid, kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Rows of a block, by the shape alone, and so are the bits of a sum: enough that the sums of a block are
// small beside what it reads, and that many blocks fill any GPU.
int64_t chunk_of(int64_t rows, int groups) {
  constexpr int64_t kLeast = 16, kMostBlocks = 1024;
  const int64_t chunk = std::max({kLeast, int64_t{2} * groups, ceil_div(rows, kMostBlocks)});
  return ceil_div(chunk, groups) * groups;
}

template <typename T, typename W>
void launch_backward(Params params, bool aligned_parameters, const NormInputs& in, NormGradients& out,
                     cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const auto& [grad_x, grad_weight, grad_bias] = out;
  float *weight = floats(grad_weight), *bias = floats(grad_bias);
  const bool need_x = params.out, need_sums = weight || bias;
  const Shape shape = shape_of<T>(params, aligned_parameters);
  params.threads = shape.threads;
  const bool together = need_x && need_sums && shape.kept;
  params.chunk = chunk_of(params.rows, together ? kThreads / shape.threads : kThreads / kWarp);
  const int64_t parts = ceil_div(params.rows, params.chunk);
  const Tensor sums = in.empty({need_sums ? parts : 0, 2, params.width});
  params.sums = floats(sums);
  if (together) {
    backward_kernel<T, W, kVector, kKept, true><<<blocks(parts), kThreads, 0, stream>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else if (need_x) {
    Params own = params;
    own.chunk = kThreads / shape.threads;
    const unsigned grid = blocks(ceil_div(params.rows, own.chunk));
    if (shape.kept) backward_kernel<T, W, kVector, kKept, false><<<grid, kThreads, 0, stream>>>(own);
    else if (shape.vectors) backward_kernel<T, W, kVector, 0, false><<<grid, kThreads, 0, stream>>>(own);
    else backward_kernel<T, W, 1, 0, false><<<grid, kThreads, 0, stream>>>(own);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (!need_sums) return;
  if (!together) {
    const int64_t tiles = ceil_div(params.width, kWarp * (shape.vectors ? kVector : 1));
    const unsigned grid = blocks(tiles * parts);
    if (shape.vectors) columns_kernel<T, kVector><<<grid, kThreads, 0, stream>>>(params);
    else columns_kernel<T, 1><<<grid, kThreads, 0, stream>>>(params);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const MergeParams merge{params.sums, weight, bias, parts, params.width};
  const unsigned tiles = blocks(ceil_div(2 * params.width, kWarp));
  merge_kernel<<<tiles, kThreads, 0, stream>>>(merge);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f with an element of x's dtype and one of the parameters'.
template <typename F>
void dispatch(const NormInputs& in, const Parameters& parameters, const F& f) {
  THO_DISPATCH_V2(in.x.scalar_type(), "layer_norm", AT_WRAP([&] {
                    if (parameters.narrow) f(scalar_t(), scalar_t());
                    else f(scalar_t(), float());
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

cudaStream_t stream_of(const Tensor& x) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &current));
  return static_cast<cudaStream_t>(current);
}

Params params_of(const NormInputs& in, const Parameters& parameters) {
  Params params{};
  params.x = in.x.const_data_ptr();
  params.weight = data_of(parameters.weight);
  params.bias = data_of(parameters.bias);
  params.rows = in.rows;
  params.width = in.width;
  return params;
}

NormOutputs forward(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> weight,
                    std::optional<Tensor> bias, double eps, bool rms) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const NormInputs in = norm_inputs(x, weight, bias);
  const Tensor added = in.beside(residual, "residual");
  const Parameters parameters(in);
  NormOutputs out{in.map(), added.defined() ? in.map() : memory::new_empty(x, {0}),
                  in.empty({rms ? 0 : in.rows}), in.empty({in.rows})};
  const auto& [y, total, mean, rstd] = out;
  Params params = params_of(in, parameters);
  params.residual = data_of(added);
  params.mean = floats(mean);
  params.rstd = floats(rstd);
  params.out = y.mutable_data_ptr();
  params.total = added.defined() ? total.mutable_data_ptr() : nullptr;
  params.eps = static_cast<float>(eps);
  const cudaStream_t stream = stream_of(x);
  dispatch(in, parameters, [&](auto element, auto parameter) {
    using T = decltype(element);
    using W = decltype(parameter);
    if (rms) launch_rows<T, W, kRmsMade>(params, parameters.aligned(), stream);
    else launch_rows<T, W, kMade>(params, parameters.aligned(), stream);
  });
  return out;
}

Tensor apply(Tensor x, Tensor mean, Tensor rstd, std::optional<Tensor> weight, std::optional<Tensor> bias,
             bool rms) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const NormInputs in = norm_inputs(x, mean, rstd, weight, bias, rms);
  const Parameters parameters(in);
  Tensor y = in.map();
  Params params = params_of(in, parameters);
  params.mean = floats(in.mean);
  params.rstd = floats(in.rstd);
  params.out = y.mutable_data_ptr();
  const cudaStream_t stream = stream_of(x);
  dispatch(in, parameters, [&](auto element, auto parameter) {
    launch_rows<decltype(element), decltype(parameter), kGiven>(params, parameters.aligned(), stream);
  });
  return y;
}

NormGradients backward(Tensor grad, std::optional<Tensor> grad_total, Tensor x, Tensor mean, Tensor rstd,
                       std::optional<Tensor> weight, bool rms, bool need_x, bool need_weight,
                       bool need_bias) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const NormInputs in = norm_inputs(x, mean, rstd, weight, std::nullopt, rms);
  const Tensor upstream = in.beside(grad, "grad"), added = in.beside(grad_total, "grad_total");
  const Parameters parameters(in);
  NormGradients out{need_x ? in.map() : memory::new_empty(x, {0}), in.empty({need_weight ? in.width : 0}),
                    in.empty({need_bias ? in.width : 0})};
  Params params = params_of(in, parameters);
  params.residual = data_of(added);
  params.grad = upstream.const_data_ptr();
  params.mean = floats(in.mean);
  params.rstd = floats(in.rstd);
  params.out = need_x ? std::get<0>(out).mutable_data_ptr() : nullptr;
  const cudaStream_t stream = stream_of(x);
  dispatch(in, parameters, [&](auto element, auto parameter) {
    launch_backward<decltype(element), decltype(parameter)>(params, parameters.aligned(), in, out, stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("layer_norm_forward.cuda", TORCH_BOX(&forward));
  m.impl("layer_norm_apply.cuda", TORCH_BOX(&apply));
  m.impl("layer_norm_backward.cuda", TORCH_BOX(&backward));
}

}  // namespace auglocal
