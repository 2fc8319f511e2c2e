// The vector instructions of the machine. Loops are compiled for each level (`each_level.h`), into a
// namespace of its name; a provider runs those of the highest level that the processor has. Every level
// computes the same bits.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

// Only GCC compiles parts of a file for other processors as this needs it. Elsewhere there is one level, that
// of the compiler's flags.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define AUGLOCAL_LEVELS 1
#include <cpuid.h>
#else
#define AUGLOCAL_LEVELS 0
#endif

namespace auglocal {

constexpr int kLanes = 32;    // elements that a loop computes side by side, at every level as many
constexpr int64_t kRun = 32;  // values that are added up in Real before the sum goes on in double

// The next multiple of kLanes.
inline int64_t whole_lanes(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

enum class Level { kBaseline, kAvx2, kAvx512 };

// As for torch's own kernels, no higher than the environment variable ATEN_CPU_CAPABILITY says.
inline Level level() {
  static const Level found = [] {
#if AUGLOCAL_LEVELS
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const auto is = [&](const char* name) { return wanted && std::strcmp(wanted, name) == 0; };
    // GCC knows the name "f16c" only since version 11.
    unsigned eax, ebx, ecx, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    if (is("default") || !f16c || !__builtin_cpu_supports("avx2")) return Level::kBaseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 && !is("avx2") ? Level::kAvx512 : Level::kAvx2;
#else
    return Level::kBaseline;
#endif
  }();
  return found;
}

}  // namespace auglocal

// Calls a function of the loops at the machine's level.
#if AUGLOCAL_LEVELS
#define AUGLOCAL_AT_LEVEL(...)    \
  do {                            \
    switch (level()) {            \
      case Level::kAvx512: {      \
        using namespace avx512;   \
        __VA_ARGS__;              \
      } break;                    \
      case Level::kAvx2: {        \
        using namespace avx2;     \
        __VA_ARGS__;              \
      } break;                    \
      case Level::kBaseline: {    \
        using namespace baseline; \
        __VA_ARGS__;              \
      }                           \
    }                             \
  } while (false)
#else
#define AUGLOCAL_AT_LEVEL(...) \
  do {                         \
    using namespace baseline;  \
    __VA_ARGS__;               \
  } while (false)
#endif
