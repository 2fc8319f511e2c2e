// What a kernel compiled for the host calls: the scheduler of its threads and the memory they share. Defined
// in the module `emulator_runtime`.
#pragma once

#include <cstddef>
#include <functional>
#include <source_location>

#define EMULATOR_API __attribute__((visibility("default")))

namespace emulator {

using Where = std::source_location;

constexpr unsigned kWarp = 32;

struct Index {
  unsigned x;
};

// The thread that runs now.
struct Current {
  unsigned thread, threads, block, blocks;
};
extern EMULATOR_API Current current;

// Runs a grid. Throws std::runtime_error where it does not come to its end: its threads wait for each other
// for ever, or one of them does what would end the process.
EMULATOR_API void launch(const char* kernel, const void* library, unsigned blocks, unsigned threads,
                         std::function<void()> body);

EMULATOR_API void barrier(const Where& where);

enum class Collective { kSync, kShuffle, kBallot };

// A warp instruction of all lanes of `mask`. kShuffle: `size` bytes of the lane `source` come into `result`;
// kBallot: `result`, an unsigned, gets a bit for each lane whose value, an unsigned, is not 0.
EMULATOR_API void collective(Collective kind, unsigned mask, const void* value, size_t size, unsigned source,
                             void* result, const Where& where);

// Before an atomic: another thread may come first.
EMULATOR_API void give_way();
// An atomic of one value by the instruction at `code`. It orders nothing by itself; fences around it do.
EMULATOR_API void atomic(const void* address, size_t size, const void* code);
EMULATOR_API void fence();

// A declaration of shared memory, each instantiation of a template by itself.
struct SharedArray {
  const char* name;
  Where where = Where::current();
};
EMULATOR_API void* shared(const SharedArray& array, size_t size);

// Memory that an op has made and that nobody has written, and memory that the host has written.
EMULATOR_API void made_empty(void* data, size_t size, const Where& where);
EMULATOR_API void written_by_host(void* data, size_t size);

// Memory that is no tensor's, as cudaMalloc gives it.
EMULATOR_API void* cuda_malloc(size_t size);

// The result number `index` of an op.
EMULATOR_API void check_result(const char* op, int index, const void* data, size_t size);

}  // namespace emulator
