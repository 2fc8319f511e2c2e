// What the compiler calls at every access to memory: -fsanitize=thread puts the calls, and these definitions
// take the place of ThreadSanitizer's. The last two are those of -fsanitize=alignment,bounds.
#include <link.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>

#include "fibers.h"
#include "memory.h"
#include "races.h"
#include "reports.h"
#include "scheduler.h"

namespace emulator {
namespace {

// Constants and variables of the loaded libraries.
bool in_a_library(const void* address) {
  static uintptr_t first = 0, end = 0;  // of the segment met last
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at >= first && at < end) return true;
  return dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* wanted) {
        const auto at = *static_cast<uintptr_t*>(wanted);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr) & header = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + header.p_vaddr;
          if (header.p_type != PT_LOAD || at < start || at >= start + header.p_memsz) continue;
          first = start;
          end = start + header.p_memsz;
          return 1;
        }
        return 0;
      },
      const_cast<uintptr_t*>(&at));
}

// Memory that is there, but that neither torch's allocator nor a kernel has made: nothing is known of it.
bool is_foreign(const void* address) {
  constexpr uintptr_t kPage = 4096;
  static uintptr_t known[1024];  // numbers of such pages
  const uintptr_t page = reinterpret_cast<uintptr_t>(address) / kPage;
  if (page == 0) return false;
  uintptr_t& place = known[page % 1024];
  if (place == page) return true;
  unsigned char resident;
  if (in_a_library(address) || mincore(reinterpret_cast<void*>(page * kPage), kPage, &resident) != 0)
    return false;
  place = page;
  return true;
}

std::string doing(const char* what, size_t size) {
  return name_of_thread(scheduler::clock->thread) + " " + what + " " + std::to_string(size) + " bytes at {0}";
}

void out_of_bounds(const void* address, size_t size, bool write, const void* code) {
  report("bounds", doing(write ? "writes" : "reads", size) + ", " + memory::describe(address),
         {place_of(code)});
}

// Whether the access is to memory that is there.
bool check_state(const void* address, size_t at, size_t size, bool write, const void* code) {
  uint8_t* state = memory::states + at;
  const uint8_t* outside = static_cast<const uint8_t*>(std::memchr(state, memory::kOutside, size));
  if (outside) {
    out_of_bounds(static_cast<const char*>(address) + (outside - state), size, write, code);
    return false;
  }
  if (write) {
    std::memset(state, memory::kWritten, size);
  } else if (const void* unwritten = std::memchr(state, memory::kUnwritten, size)) {
    report("unwritten",
           doing("reads", size) + ", which nobody wrote: " +
               memory::describe(static_cast<const char*>(address) +
                                (static_cast<const uint8_t*>(unwritten) - state)),
           {place_of(code)});
  }
  return true;
}

template <bool kWrite>
inline void access(const void* address, size_t size, const void* code, bool atomically = false) {
  if (!scheduler::clock || !memory::arena) return;
  const size_t at = memory::offset(address);
  if (at >= memory::kArena) {
    if (fibers::on_a_stack(address) || is_foreign(address) || (!kWrite && in_a_library(address))) return;
    out_of_bounds(address, size, kWrite, code);
    scheduler::abandon();
  }
  uint32_t word;
  std::memcpy(&word, memory::states + at, sizeof word);
  const bool usual = size == 4 && word == 0x01010101u * memory::kWritten;
  if (!usual && !check_state(address, at, size, kWrite, code)) return;
  if (races::enabled) races::access(*scheduler::clock, at, size, kWrite, atomically, place_of(code));
}

}  // namespace

void atomic(const void* address, size_t size, const void* code) {
  access<true>(address, size, code, true);
  if (races::enabled) races::atomic(*scheduler::clock, address);
}

}  // namespace emulator

using emulator::access;
#define HERE __builtin_return_address(0)

extern "C" {

#define ACCESSES(size)                                      \
  EMULATOR_API void __tsan_read##size(void* p) {            \
    access<false>(p, size, HERE);                           \
  }                                                         \
  EMULATOR_API void __tsan_write##size(void* p) {           \
    access<true>(p, size, HERE);                            \
  }                                                         \
  EMULATOR_API void __tsan_unaligned_read##size(void* p) {  \
    access<false>(p, size, HERE);                           \
  }                                                         \
  EMULATOR_API void __tsan_unaligned_write##size(void* p) { \
    access<true>(p, size, HERE);                            \
  }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

EMULATOR_API void __tsan_read_range(void* p, size_t size) {
  access<false>(p, size, HERE);
}
EMULATOR_API void __tsan_write_range(void* p, size_t size) {
  access<true>(p, size, HERE);
}
EMULATOR_API void __tsan_init() {}
EMULATOR_API void __tsan_func_entry(void*) {}
EMULATOR_API void __tsan_func_exit() {}
EMULATOR_API void __tsan_vptr_read(void*) {}
EMULATOR_API void __tsan_vptr_update(void*, void*) {}

// Clang's.
EMULATOR_API void* __tsan_memcpy(void* to, const void* from, size_t size) {
  access<false>(from, size, HERE);
  access<true>(to, size, HERE);
  return std::memcpy(to, from, size);
}
EMULATOR_API void* __tsan_memset(void* to, int value, size_t size) {
  access<true>(to, size, HERE);
  return std::memset(to, value, size);
}

// The host's own atomics, reference counts for example.
#define ATOMICS(bits)                                                                                       \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_load(const uint##bits##_t* p, int) {                    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                         \
  EMULATOR_API void __tsan_atomic##bits##_store(uint##bits##_t* p, uint##bits##_t v, int) {                 \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                         \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_exchange(uint##bits##_t* p, uint##bits##_t v, int) {    \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                         \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_fetch_add(uint##bits##_t* p, uint##bits##_t v, int) {   \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                         \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_fetch_sub(uint##bits##_t* p, uint##bits##_t v, int) {   \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                         \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_fetch_and(uint##bits##_t* p, uint##bits##_t v, int) {   \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                         \
  EMULATOR_API uint##bits##_t __tsan_atomic##bits##_fetch_or(uint##bits##_t* p, uint##bits##_t v, int) {    \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                         \
  EMULATOR_API int __tsan_atomic##bits##_compare_exchange_strong(                                           \
      uint##bits##_t* p, uint##bits##_t* expected, uint##bits##_t v, int, int) {                            \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }                                                                                                         \
  EMULATOR_API int __tsan_atomic##bits##_compare_exchange_weak(uint##bits##_t* p, uint##bits##_t* expected, \
                                                               uint##bits##_t v, int, int) {                \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }
ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)
EMULATOR_API void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
EMULATOR_API void __tsan_atomic_signal_fence(int) {}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

EMULATOR_API void __ubsan_handle_type_mismatch_v1(SourceLocation* where, void* address) {
  emulator::report("alignment",
                   "an access at " + std::string(where->file) + ":" + std::to_string(where->line) +
                       " is not aligned as its type asks: " + emulator::memory::describe(address));
  if (emulator::scheduler::clock) emulator::scheduler::abandon();
}

EMULATOR_API void __ubsan_handle_out_of_bounds(SourceLocation* where, void* index) {
  emulator::report("bounds", "the index " + std::to_string(reinterpret_cast<intptr_t>(index)) + " at " +
                                 std::string(where->file) + ":" + std::to_string(where->line) +
                                 " is outside of its array");
}
}
