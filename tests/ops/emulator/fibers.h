// Fibers: functions that run in turn on one thread of the host, each on a stack of its own.
#pragma once

#include <setjmp.h>

#include <cstddef>
#include <functional>
#include <vector>

namespace emulator::fibers {

constexpr size_t kStack = size_t(1) << 16;

class Fiber {
 public:
  // Runs it from where it left, or from its start, until it leaves.
  void resume();

  // From inside: back to the host.
  void leave();

 private:
  friend class Pool;
  friend void enter();

  jmp_buf context_;
  std::function<void()> body_;
  char* stack_ = nullptr;
  bool started_ = false;
  void* fake_stack_ = nullptr;  // of AddressSanitizer
};

// Fibers that all run `body`, which never returns, but may leave for good.
class Pool {
 public:
  void make(size_t count, const std::function<void()>& body);

  // Forgets all of them, wherever they are. What their stacks hold is not destroyed.
  void clear() { fibers_.clear(); }

  size_t size() const { return fibers_.size(); }
  Fiber& operator[](size_t i) { return fibers_[i]; }

 private:
  std::vector<Fiber> fibers_;
};

// From inside of a fiber that will not run again: back to the host.
[[noreturn]] void abandon();

// Of a fiber, or of the host.
bool on_a_stack(const void* address);

}  // namespace emulator::fibers
