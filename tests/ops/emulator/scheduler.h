// The thread that runs now, as the detectors see it.
#pragma once

#include <cstdint>
#include <optional>

#include "races.h"

namespace emulator::scheduler {

extern races::Clock* clock;  // null outside of a launch

// Without a seed threads and blocks run in their order; with one they are drawn, and so is how many blocks
// are under way.
void set_seed(std::optional<uint64_t> seed);

// Ends the launch under way, from one of its threads: what that would do next would end the process.
[[noreturn]] void abandon();

}  // namespace emulator::scheduler
