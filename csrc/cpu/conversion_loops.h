// Elements side by side to the numbers they are computed in, and back. For `each_level.h`.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

// kHalves elements of half precision, which one instruction converts where the processor has one.
#if AUGLOCAL_VECTOR == 64
constexpr int kHalves = 16;
inline void widen_halves(const c10::Half* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void narrow_halves(const float* from, c10::Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif AUGLOCAL_VECTOR == 32
constexpr int kHalves = 8;
inline void widen_halves(const c10::Half* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void narrow_halves(const float* from, c10::Half* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int kHalves = 1;
inline void widen_halves(const c10::Half* from, float* to) {
  *to = widened(*from);
}
inline void narrow_halves(const float* from, c10::Half* to) {
  *to = narrowed<c10::Half>(*from);
}
#endif

inline void widen_row(const c10::Half* from, int64_t count, float* __restrict__ to) {
  int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) widen_halves(from + i, to + i);
  for (; i < count; ++i) to[i] = widened(from[i]);
}

inline void narrow_row(const float* from, int64_t count, c10::Half* __restrict__ to) {
  int64_t i = 0;
  for (; i + kHalves <= count; i += kHalves) narrow_halves(from + i, to + i);
  for (; i < count; ++i) to[i] = narrowed<c10::Half>(from[i]);
}

// Elements that lie `stride` apart, side by side, as numbers.
template <typename T, typename To>
void load(const T* from, int64_t stride, int64_t count, To* __restrict__ to) {
  const auto converted = [](T value) {
    if constexpr (std::is_integral_v<T>) return static_cast<To>(value);
    else return static_cast<To>(widened(value));
  };
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = converted(from[i * stride]);
  } else if constexpr (std::is_same_v<T, c10::Half> && std::is_same_v<To, float>) {
    widen_row(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = converted(from[i]);
  }
}

template <typename From, typename T>
void store(const From* from, int64_t count, T* __restrict__ to) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    narrow_row(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_integral_v<T>) to[i] = static_cast<T>(from[i]);
      else to[i] = narrowed<T>(from[i]);
    }
  }
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal
