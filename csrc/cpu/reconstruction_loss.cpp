// reconstruction_loss on the CPU: blocks of elements are read into buffers, so that the arithmetic is one
// plain loop whatever dtypes and layouts meet.
#include "../reconstruction_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../reconstruction_loss_host.h"
#include "convert.h"

namespace auglocal {
namespace {

constexpr int64_t kBlock = 1024;  // elements that are added up in the narrow type
constexpr int64_t kGrain = 8;     // blocks worth a thread

}  // namespace
}  // namespace auglocal

#define AUGLOCAL_LOOPS "reconstruction_loss_loops.h"
#include "each_level.h"

namespace auglocal {
namespace {

template <typename T>
void dispatch_image(ReconstructionProblem& problem) {
  const T* logits = problem.logits.tensor.const_data_ptr<T>();
  THO_DISPATCH_V2(problem.image.tensor.scalar_type(), "reconstruction_loss",
                  AT_WRAP([&] { AUGLOCAL_AT_LEVEL(run<scalar_t>(logits, problem)); }), ScalarType::Double,
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

std::tuple<Tensor, Tensor> forward(Tensor logits, Tensor image, Tensor mean, Tensor std, bool need_grad) {
  ReconstructionProblem problem = make_problem(logits, image, mean, std, need_grad);
  THO_DISPATCH_V2(logits.scalar_type(), "reconstruction_loss",
                  AT_WRAP([&] { dispatch_image<scalar_t>(problem); }), ScalarType::Double, ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
  return {problem.loss, problem.grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(auglocal_ext, CPU, m) {
  m.impl("reconstruction_loss.cpu", TORCH_BOX(&forward));
}

}  // namespace auglocal
