// Includes the file AUGLOCAL_LOOPS once for each level of `level.h`, with AUGLOCAL_LEVEL as the name of its
// namespace. That file includes only others of its kind, which have no include guard: everything else comes
// before, compiled for any processor. What it defines is in an unnamed namespace, so that no other file's
// code is linked in its place.
#include "level.h"

#if AUGLOCAL_LEVELS
#include <immintrin.h>
#endif

// Before a loop whose results lie in memory that it does not read.
#if defined(__GNUC__) && !defined(__clang__)
#define AUGLOCAL_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(__clang__)
#define AUGLOCAL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define AUGLOCAL_INDEPENDENT
#endif

// A loop that is vectorised only as a function of its own.
#if defined(__GNUC__)
#define AUGLOCAL_NOT_INLINE __attribute__((noinline))
#define AUGLOCAL_INLINE inline __attribute__((always_inline))
#else
#define AUGLOCAL_NOT_INLINE
#define AUGLOCAL_INLINE inline
#endif

// AUGLOCAL_VECTOR: the bytes of a vector, 0 where the compiler has no type for one.
#define AUGLOCAL_LEVEL baseline
#if defined(__GNUC__)
#define AUGLOCAL_VECTOR 16
#else
#define AUGLOCAL_VECTOR 0
#endif
#include AUGLOCAL_LOOPS
#undef AUGLOCAL_VECTOR
#undef AUGLOCAL_LEVEL

#if AUGLOCAL_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#define AUGLOCAL_LEVEL avx2
#define AUGLOCAL_VECTOR 32
#include AUGLOCAL_LOOPS
#undef AUGLOCAL_VECTOR
#undef AUGLOCAL_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define AUGLOCAL_LEVEL avx512
#define AUGLOCAL_VECTOR 64
#include AUGLOCAL_LOOPS
#undef AUGLOCAL_VECTOR
#undef AUGLOCAL_LEVEL
#pragma GCC pop_options
#endif

#undef AUGLOCAL_LOOPS
#undef AUGLOCAL_INDEPENDENT
#undef AUGLOCAL_NOT_INLINE
#undef AUGLOCAL_INLINE
