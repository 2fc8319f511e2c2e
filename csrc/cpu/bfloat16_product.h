// A matrix product of bfloat16 factors with float32 sums and results, by the instruction that some processors
// have for it. Torch's own products of such factors round their results to bfloat16.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "level.h"

#if AUGLOCAL_LEVELS
#include <immintrin.h>
#endif

namespace auglocal {

inline bool multiplies_bfloat16() {
#if AUGLOCAL_LEVELS
  return level() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if AUGLOCAL_LEVELS
namespace bfloat16_product {

constexpr int kTile = 16;  // rows of each factor whose products are summed side by side

// A pair of neighbours, of which the second is zero where `depth` ends with the first.
inline uint32_t pair_at(const c10::BFloat16* row, int64_t k, int64_t depth) {
  uint32_t pair = row[k].x;
  if (k + 1 < depth) std::memcpy(&pair, row + k, sizeof pair);
  return pair;
}

// kTile rows, of which `count` are there, pair by pair of elements; zeros behind them.
inline void pack(const c10::BFloat16* rows, int64_t count, int64_t depth, uint32_t* panel) {
  if (count < kTile) std::fill(panel, panel + (depth + 1) / 2 * kTile, 0);
  for (int64_t i = 0; i < count; ++i, rows += depth)
    for (int64_t k = 0; k < depth; k += 2) panel[k / 2 * kTile + i] = pair_at(rows, k, depth);
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
// sums (kTile, kTile): each row is of one of `rows`, and has the elements of a panel's rows.
inline void tile(const uint32_t* panel, const c10::BFloat16* const* rows, int64_t depth, float* sums) {
  __m512 all[kTile];
  for (auto& sum : all) sum = _mm512_setzero_ps();
  const auto add = [&](int64_t k, const auto& pair) {
    const __m512bh own = (__m512bh)_mm512_loadu_si512(panel + k / 2 * kTile);
    for (int j = 0; j < kTile; ++j)
      all[j] = _mm512_dpbf16_ps(all[j], own, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair(rows[j]))));
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2)
    add(k, [&](const c10::BFloat16* row) {
      uint32_t two;
      std::memcpy(&two, row + k, sizeof two);
      return two;
    });
  if (k < depth) add(k, [&](const c10::BFloat16* row) { return pair_at(row, k, depth); });
  for (int j = 0; j < kTile; ++j) _mm512_storeu_ps(sums + j * kTile, all[j]);
}
#pragma GCC pop_options

}  // namespace bfloat16_product
#endif

// out (R, V) = a (R, C) b (V, C)^T, all contiguous. Only where `multiplies_bfloat16`.
inline void multiply_bfloat16(const c10::BFloat16* a, const c10::BFloat16* b, int64_t rows, int64_t columns,
                              int64_t depth, float* out) {
#if AUGLOCAL_LEVELS
  using namespace bfloat16_product;
  const bool turned = columns <= rows;  // the smaller factor is copied
  const c10::BFloat16 *copied = turned ? b : a, *other = turned ? a : b;
  const int64_t number = turned ? columns : rows, others = turned ? rows : columns;
  const int64_t size = (depth + 1) / 2 * kTile, tiles = (number + kTile - 1) / kTile;
  std::vector<uint32_t> panels(tiles * size);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack(copied + i * kTile * depth, std::min<int64_t>(kTile, number - i * kTile), depth,
           panels.data() + i * size);
  });
  torch::stable::parallel_for(0, (others + kTile - 1) / kTile, 1, [&](int64_t begin, int64_t end) {
    float sums[kTile * kTile];
    for (int64_t first = begin * kTile; first < std::min(others, end * kTile); first += kTile) {
      const int64_t high = std::min<int64_t>(kTile, others - first);
      const c10::BFloat16* own[kTile];
      for (int64_t j = 0; j < kTile; ++j)
        own[j] = other + (first + std::min(j, high - 1)) * depth;  // beyond the last one it is read again
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t wide = std::min<int64_t>(kTile, number - i * kTile);
        tile(panels.data() + i * size, own, depth, sums);
        float* to = turned ? out + first * columns + i * kTile : out + i * kTile * columns + first;
        if (turned) {
          for (int64_t j = 0; j < high; ++j) std::copy_n(sums + j * kTile, wide, to + j * columns);
        } else {
          for (int64_t k = 0; k < wide; ++k)
            for (int64_t j = 0; j < high; ++j) to[k * columns + j] = sums[j * kTile + k];
        }
      }
    }
  });
#endif
}

}  // namespace auglocal
