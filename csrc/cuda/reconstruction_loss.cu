// reconstruction_loss on CUDA: loss and gradient element by element with a sum for each block, then their
// mean.
//
// Elements are walked through in the order in which the gradient lies in memory. Logits that lie in that
// order too are read in vectors; the image may lie in another one, and is then gathered.
#include "../reconstruction_loss.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <tuple>

#include "../divider.h"
#include "../reconstruction_loss_host.h"
#include "kernel.h"

namespace auglocal {
namespace {

// Blocks of a launch that fill any GPU several times over. The same on all of them, and so are the bits of a
// sum.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kLeastSteps = 2;   // of a thread, before a second block shares its work
constexpr int64_t kMostSteps = 512;  // of a thread that adds up in float32

struct Params {
  const void *logits, *image;
  OrderedStrides logit_step, image_step;
  bool dense_image;         // in the order, and aligned for vectors
  const float *mean, *std;  // (C,)
  void* grad;               // dense, or null
  float* sums;              // (blocks,)
  int64_t elements, chunk;  // chunk: vectors of a block
  Divider inner, outer;     // elements of a row, rows of an image
  bool channels_last;
};

// Where an element stands in the order.
struct Place {
  int64_t n, outer, inner;

  __device__ __forceinline__ Place(const Params& params, int64_t element) {
    const int64_t row = params.inner.divide(element);
    inner = element - row * params.inner.divisor;
    n = params.outer.divide(row);
    outer = row - n * params.outer.divisor;
  }

  __device__ __forceinline__ void next(const Params& params) {
    if (++inner < params.inner.divisor) return;
    inner = 0;
    if (++outer < params.outer.divisor) return;
    outer = 0;
    ++n;
  }

  __device__ __forceinline__ int64_t offset(const OrderedStrides& step) const {
    return n * step.n + outer * step.outer + inner * step.inner;
  }
};

// Logits of T, an image of U. With kVector == 1 any strides.
template <typename T, typename U, int kVector>
__global__ void __launch_bounds__(kThreads) pixels_kernel(const Params params) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * params.chunk, vectors = params.elements / kVector;
  const int64_t end = first + params.chunk < vectors ? first + params.chunk : vectors;
  const T* logits = static_cast<const T*>(params.logits);
  const U* image = static_cast<const U*>(params.image);
  float sum = 0;
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    Place place(params, i * kVector);
    float logit[kVector], pixel[kVector];
    load<T, kVector>(logit, logits + (kVector == 1 ? place.offset(params.logit_step) : i * kVector));
    const bool vector = kVector > 1 && params.dense_image;
    if (vector) load<U, kVector>(pixel, image + i * kVector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (!vector) pixel[v] = static_cast<float>(image[place.offset(params.image_step)]);
      const int64_t c = params.channels_last ? place.inner : place.outer;
      const PixelLoss<float> made = pixel_loss(logit[v], restored(pixel[v], params.mean[c], params.std[c]));
      sum += made.loss;
      pixel[v] = made.gradient;
      place.next(params);
    }
    if (params.grad) store<T, kVector>(static_cast<T*>(params.grad) + i * kVector, pixel);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) params.sums[blockIdx.x] = sum;
}

struct MeanParams {
  const float* sums;  // (count,)
  int64_t count;
  float elements;
  float* loss;  // ()
};

__global__ void __launch_bounds__(kThreads) mean_kernel(const MeanParams params) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < params.count; i += kThreads) sum += params.sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *params.loss = sum / params.elements;
}

template <typename V>
bool aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(V) == 0;
}

// Logits of T, an image of U.
template <typename U, typename T>
void run(const T* logits, ReconstructionProblem& problem, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  using Vector = Pack<T, kVector>;
  using ImageVector = Pack<U, kVector>;
  const U* image = problem.image.tensor.const_data_ptr<U>();
  T* grad = problem.grad.numel() ? problem.grad.mutable_data_ptr<T>() : nullptr;
  const int64_t elements = problem.count();
  const bool vectors = elements % kVector == 0 && problem.dense(problem.logits) && aligned<Vector>(logits) &&
                       aligned<Vector>(grad);
  const int64_t steps = ceil_div(vectors ? elements / kVector : elements, kThreads);
  const int64_t steps_a_block = std::clamp(ceil_div(steps, kBlocks), kLeastSteps, kMostSteps);
  const int64_t count = ceil_div(steps, steps_a_block);
  Tensor sums = torch::stable::new_empty(problem.loss, {count});
  const Params params{logits,
                      image,
                      problem.strides(problem.logits),
                      problem.strides(problem.image),
                      problem.dense(problem.image) && aligned<ImageVector>(image),
                      problem.mean.const_data_ptr<float>(),
                      problem.std.const_data_ptr<float>(),
                      grad,
                      sums.mutable_data_ptr<float>(),
                      elements,
                      steps_a_block * kThreads,
                      Divider(problem.order.inner),
                      Divider(problem.order.outer),
                      problem.order.channels_last};
  if (vectors) pixels_kernel<T, U, kVector><<<blocks(count), kThreads, 0, stream>>>(params);
  else pixels_kernel<T, U, 1><<<blocks(count), kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const MeanParams mean{sums.const_data_ptr<float>(), count, static_cast<float>(elements),
                        problem.loss.mutable_data_ptr<float>()};
  mean_kernel<<<1, kThreads, 0, stream>>>(mean);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void dispatch_image(ReconstructionProblem& problem, cudaStream_t stream) {
  const T* logits = problem.logits.tensor.const_data_ptr<T>();
  THO_DISPATCH_V2(problem.image.tensor.scalar_type(), "reconstruction_loss",
                  AT_WRAP([&] { run<scalar_t>(logits, problem, stream); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

std::tuple<Tensor, Tensor> forward(Tensor logits, Tensor image, Tensor mean, Tensor std, bool need_grad) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  ReconstructionProblem problem = make_problem(logits, image, mean, std, need_grad);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);
  THO_DISPATCH_V2(logits.scalar_type(), "reconstruction_loss",
                  AT_WRAP([&] { dispatch_image<scalar_t>(problem, stream); }), ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
  return {problem.loss, problem.grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CUDA, m) {
  m.impl("reconstruction_loss.cuda", TORCH_BOX(&forward));
}

}  // namespace auglocal
