// What the detectors have found.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

struct Report {
  std::string kind;    // race, unwritten, bounds, mask, barrier, alignment
  std::string kernel;  // or the op
  std::string text;    // "{0}" and "{1}" stand for the lines of `places`
  std::string library;
  std::vector<uintptr_t> places;  // of instructions, from the start of the library
  int64_t count;                  // how often the same was found
};

inline std::vector<Report> reports;

// Adds a report, or counts it where the same one is there: of one kind and kernel, with the same places, and
// the same text where there are none.
void report(const std::string& kind, const std::string& text, const std::vector<uintptr_t>& places = {});

// Of the launch under way, or of the op whose results are checked.
void set_kernel(const std::string& kernel, const void* library);

// A code address as one from the start of the library.
uintptr_t place_of(const void* code);

inline std::string line(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// "thread 3 of block 1"
std::string name_of_thread(unsigned thread_of_grid);

}  // namespace emulator
