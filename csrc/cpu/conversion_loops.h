// Elements side by side to the numbers they are computed in, and back. For `each_level.h`.
namespace auglocal {
namespace {
namespace AUGLOCAL_LEVEL {

constexpr int64_t kSome = 256;  // elements that are rounded at a time

inline void widen_row(const c10::Half* from, int64_t count, float* __restrict__ to) {
  int64_t i = 0;
#if AUGLOCAL_F16C
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = widened(from[i]);
}

inline void narrow_row(const float* from, int64_t count, c10::Half* __restrict__ to) {
  int64_t i = 0;
#if AUGLOCAL_F16C
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) to[i] = narrowed<c10::Half>(from[i]);
}

// Elements that lie `stride` apart, side by side and as loops read them: in `buffer`, unless they lie so
// already.
template <typename T>
const Held<T>* held(const T* from, int64_t stride, int64_t count, Held<T>* buffer) {
  if constexpr (std::is_same_v<T, Held<T>>) {
    if (stride == 1) return from;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * stride];
  } else if (stride == 1) {
    widen_row(from, count, buffer);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = widened(from[i * stride]);
  }
  return buffer;
}

// The same as numbers of another type.
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

// Numbers to those that elements of type T can be.
template <typename T, typename Real>
void round_row(Real* row, int64_t count) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    c10::Half some[kSome];
    for (int64_t first = 0; first < count; first += kSome) {
      const int64_t number = std::min(kSome, count - first);
      narrow_row(row + first, number, some);
      widen_row(some, number, row + first);
    }
  } else if constexpr (!std::is_same_v<T, Real>) {
    for (int64_t i = 0; i < count; ++i) row[i] = widened(narrowed<T>(row[i]));
  }
}

}  // namespace AUGLOCAL_LEVEL
}  // namespace
}  // namespace auglocal
