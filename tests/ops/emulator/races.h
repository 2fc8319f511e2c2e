// Which accesses are ordered, by vector clocks: two by different threads, one of them a write, are a race
// where nothing orders them.
//
// Each thread counts its own segments, which end at whatever orders memory. What it knows of others are, for
// a block, the segments that all its threads have ended, and for single threads the ones beyond. A barrier
// joins the threads of a block, __syncwarp lanes. Between blocks there is one way alone, that of the PTX
// memory model: a fence and then an atomic in the one, and an atomic on the same address and then a fence in
// the other, with barriers in between or not. Shuffles, votes and atomics by themselves order nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace emulator::races {

// Segments known to lie behind, each list sorted: (block, segment) and (thread of the grid, segment).
struct Knowledge {
  std::vector<std::pair<unsigned, unsigned>> blocks, threads;
};
using Known = std::shared_ptr<const Knowledge>;

struct Clock {
  unsigned thread = 0;   // of the grid
  unsigned segment = 1;  // 0 is before the start
  Known known;
  Known released;  // as of the last fence: what the next atomic hands on
  Known acquired;  // from atomics: known after the next fence
};

extern bool enabled;

void begin_launch(unsigned threads_of_a_block);
void begin_block(unsigned resident);

void barrier(const std::vector<Clock*>& threads);
void warp_barrier(const std::vector<Clock*>& lanes);
void fence(Clock& clock);
void atomic(Clock& clock, const void* address);

// Of `size` bytes in the arena, `at` bytes from its start.
void access(const Clock& clock, size_t at, size_t size, bool write, bool atomically, uintptr_t place);

}  // namespace emulator::races
