// The statistics of batch_norm_act on the CPU, which batch_norm_act_max_pool takes too.
#pragma once

#include "../batch_norm_act_host.h"

namespace auglocal {

// mean and rstd (C,) of x; running statistics and the count of batches are updated where they are given.
TwoTensors batch_norm_factors_(const Tensor& x, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               double momentum, double eps);

}  // namespace auglocal
