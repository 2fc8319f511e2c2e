// batch_norm_act for the common case, channels-last maps without gaps: activation and residual are known when
// a kernel is compiled, pointers move by one step, and a thread has several vectors in flight.
//
// Registers decide how many blocks a multiprocessor holds, and these how many bytes are in flight, which a
// GPU needs to reach its bandwidth: hence the numbers of vectors and of blocks below.
#pragma once

#include <cstdint>
#include <type_traits>

#include "batch_norm_act_reduce.h"
#include "batch_norm_act_walk.h"

namespace auglocal {

template <typename T>
constexpr int kVectorOf = 16 / sizeof(T);

// Calls f(vectors) for `count` vectors, kCount at a time and the rest one by one.
template <int kCount, typename F>
__device__ __forceinline__ void for_each_vector(int count, const F& f) {
#pragma unroll 1
  for (; count >= kCount; count -= kCount) f(std::integral_constant<int, kCount>());
  if constexpr (kCount > 1) {
#pragma unroll 1
    for (; count > 0; --count) f(std::integral_constant<int, 1>());
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) stats_rows_kernel(const Params params) {
  constexpr int kVector = kVectorOf<T>;
  const Rows<kVector> rows(params.walk);
  Shifted<float> sums[kVector] = {};
  float shift[kVector] = {};
  if (rows.count > 0) {
    Cursor<const T, kVector> x(params.x, rows);
    load<T, kVector>(shift, x.at);
    for_each_vector<4>(rows.count, [&](auto vectors) {
      constexpr int kCount = decltype(vectors)::value;
      Pack<T, kVector> values[kCount];
      x.read(values);
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) add(sums[v], element(values[u], v) - shift[v]);
      }
    });
  }
  finish_stats<T, kVector, true>(sums, shift, rows.count, rows.channel, params);
}

template <typename T, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(kThreads, 4) apply_rows_kernel(const Params params) {
  constexpr int kVector = kVectorOf<T>;
  const Rows<kVector> rows(params.walk);
  if (rows.count == 0) return;
  const Factors<kVector> factors(params.vectors, rows.channel);
  Cursor<const T, kVector> x(params.x, rows), residual(params.residual, rows);
  Cursor<T, kVector> out(params.out, rows);
  for_each_vector<2>(rows.count, [&](auto vectors) {
    constexpr int kCount = decltype(vectors)::value;
    Pack<T, kVector> values[kCount], added[kCount];
    x.read(values);
    if constexpr (kResidual) residual.read(added);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      Pack<T, kVector> made;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float z = normalised(factors[v], element(values[u], v));
        if constexpr (kResidual) z += element(added[u], v);
        made.values[v] = static_cast<T>(activated_by<kActivation>(z, z, params.slope));
      }
      out.write(made);
    }
  });
}

template <typename T, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3) reduce_rows_kernel(const Params params) {
  constexpr int kVector = kVectorOf<T>;
  const Rows<kVector> rows(params.walk);
  Sums found[kVector] = {};
  if (rows.count > 0) {
    const Factors<kVector> factors(params.vectors, rows.channel);
    Cursor<const T, kVector> x(params.x, rows), residual(params.residual, rows);
    RepeatedCursor<T, kVector> grad(params.grad, rows);
    for_each_vector<kResidual && kVector == 8 ? 1 : 2>(rows.count, [&](auto vectors) {
      constexpr int kCount = decltype(vectors)::value;
      Pack<T, kVector> values[kCount], grads[kCount], added[kCount];
      x.read(values);
      grad.read(grads, params.grad_rows);
      if constexpr (kResidual) residual.read(added);
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const float value = element(values[u], v);
          float z = normalised(factors[v], value);
          if constexpr (kResidual) z += element(added[u], v);
          const float g = activated_by<kActivation>(element(grads[u], v), z, params.slope);
          found[v].g += g;
          found[v].g_difference += g * (value - factors[v].mean);
        }
      }
    });
  }
  finish_reduce<kVector, true>(found, params);
}

// The gradient of the residual is wanted where out_residual is there. kConstant: statistics are constants.
template <typename T, Activation kActivation, bool kResidual, bool kConstant>
__device__ __forceinline__ void input_grad_rows(const Params& params, const Rows<kVectorOf<T>>& rows) {
  constexpr int kVector = kVectorOf<T>;
  const Factors<kVector> factors(params.vectors, rows.channel);
  const ThroughStatistics<kVector> through(params.vectors, rows.channel);
  Cursor<const T, kVector> x(params.x, rows), residual(params.residual, rows);
  RepeatedCursor<T, kVector> grad(params.grad, rows);
  Cursor<T, kVector> out(params.out, rows), out_residual(params.out_residual, rows);
  for_each_vector<kResidual && kVector == 8 ? 1 : 2>(rows.count, [&](auto vectors) {
    constexpr int kCount = decltype(vectors)::value;
    Pack<T, kVector> values[kCount], grads[kCount], added[kCount];
    x.read(values);
    grad.read(grads, params.grad_rows);
    if constexpr (kResidual) residual.read(added);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      Pack<T, kVector> made, kept;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float value = element(values[u], v);
        float z = normalised(factors[v], value);
        if constexpr (kResidual) z += element(added[u], v);
        const float g = activated_by<kActivation>(element(grads[u], v), z, params.slope);
        if constexpr (kResidual) kept.values[v] = static_cast<T>(g);
        made.values[v] = static_cast<T>(input_gradient_by<kConstant>(factors[v], through[v], g, value));
      }
      if constexpr (kResidual) {
        if (params.out_residual.data) out_residual.write(kept);
      }
      out.write(made);
    }
  });
}

template <typename T, Activation kActivation, bool kResidual>
__global__ void __launch_bounds__(kThreads, 3) input_grad_rows_kernel(const Params params) {
  const Rows<kVectorOf<T>> rows(params.walk);
  if (rows.count == 0) return;
  if (params.vectors.sum_g) input_grad_rows<T, kActivation, kResidual, false>(params, rows);
  else input_grad_rows<T, kActivation, kResidual, true>(params, rows);
}

}  // namespace auglocal
