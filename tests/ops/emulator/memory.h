// One range of addresses for all memory that kernels share, with a state for every byte: tensors, taken from
// torch's allocator, with a gap around each of them, and the shared arrays of the blocks under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "runtime.h"

namespace emulator::memory {

constexpr size_t kArena = size_t(1) << 36;
constexpr unsigned kResident = 4;               // blocks under way at a time
constexpr size_t kBlock = size_t(1) << 18;      // addresses for the shared arrays of one of them
constexpr size_t kShared = kResident * kBlock;  // at the start of the arena

enum State : uint8_t { kOutside, kUnwritten, kWritten };

extern char* arena;
extern uint8_t* states;

// Offset in the arena; kArena or more where an address is elsewhere.
inline size_t offset(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena);
}

// The arena takes the place of torch's allocator for the rest of the process.
void serve_torch();

void* allocate(size_t size);
void release(void* data);

void* shared_array(unsigned resident, const SharedArray& array, size_t size);
void end_block(unsigned resident);

// "byte 12 of the shared array partial (kernel.h:51)"
std::string describe(const void* address);

}  // namespace emulator::memory
