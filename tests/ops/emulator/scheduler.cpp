// Threads of a block as fibers of one thread of the host, some blocks at a time. A thread runs up to its next
// barrier, warp instruction or atomic; which one goes on is drawn, or without a seed the one that waits
// longest.
#include "scheduler.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>

#include "fibers.h"
#include "memory.h"
#include "reports.h"

namespace emulator {

Current current{};

namespace scheduler {

races::Clock* clock = nullptr;

namespace {

struct Block;

struct Thread {
  enum class State { kReady, kBarrier, kWarp, kDone } state;
  unsigned index;  // in its block
  Block* block;
  races::Clock clock;
  Where where;  // that it waits at
  // Its warp instruction.
  Collective kind;
  unsigned mask, source;
  size_t size;
  unsigned char value[16];
  void* result;

  fibers::Fiber* fiber;
};

struct Block {
  unsigned resident, index, alive, arrived;
  std::vector<Thread*> threads;
};

std::optional<std::mt19937_64> random;
fibers::Pool pool;
std::vector<Thread> threads;  // of all blocks under way, each on a fiber of the pool
std::vector<Block> blocks;
std::deque<Thread*> ready;
std::function<void()> kernel;
Thread* self = nullptr;
bool abandoned = false;

unsigned drawn(size_t below) {
  return static_cast<unsigned>((*random)() % below);
}

void resume(Thread& thread) {
  self = &thread;
  clock = &thread.clock;
  current.thread = thread.index;
  current.block = thread.block->index;
  thread.fiber->resume();
  self = nullptr;
}

// Lets another thread run; `self` goes on once it is ready again and its turn has come.
void leave() {
  self->fiber->leave();
}

void make_ready(Thread& thread) {
  thread.state = Thread::State::kReady;
  ready.push_back(&thread);
}

std::string lanes(unsigned mask) {
  std::string list;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  return list;
}

std::string name(const Thread& thread) {
  return name_of_thread(thread.clock.thread);
}

void release_barrier(Block& block) {
  if (block.alive == 0 || block.arrived < block.alive) return;
  std::vector<races::Clock*> clocks;
  const Thread* first = nullptr;
  for (Thread* thread : block.threads) {
    if (thread->state != Thread::State::kBarrier) continue;
    if (!first) first = thread;
    if (line(thread->where) != line(first->where))
      report("barrier", name(*thread) + " waits at the barrier of " + line(thread->where) + " while " +
                            name(*first) + " waits at that of " + line(first->where));
    clocks.push_back(&thread->clock);
  }
  if (block.alive < block.threads.size()) {
    const auto ended = std::find_if(block.threads.begin(), block.threads.end(),
                                    [](Thread* thread) { return thread->state == Thread::State::kDone; });
    report("barrier", name(**ended) + " has ended without the barrier of " + line(first->where) + ", where " +
                          name(*first) + " waits");
  }
  if (races::enabled) races::barrier(clocks);
  block.arrived = 0;
  for (Thread* thread : block.threads)
    if (thread->state == Thread::State::kBarrier) make_ready(*thread);
}

// Runs the warp instruction of `thread` once all lanes of its mask are there.
void release_warp(Thread& thread) {
  Block& block = *thread.block;
  const unsigned first = thread.index / kWarp * kWarp;
  unsigned there = 0, ended = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(thread.mask >> lane & 1)) continue;
    if (first + lane >= block.threads.size() || block.threads[first + lane]->state == Thread::State::kDone) {
      ended |= 1u << lane;
      continue;
    }
    const Thread& other = *block.threads[first + lane];
    if (other.state != Thread::State::kWarp) return;
    if (other.mask != thread.mask || other.kind != thread.kind || other.size != thread.size) return;
    there |= 1u << lane;
  }
  if (ended)
    report("mask", "the mask of " + name(thread) + " at " + line(thread.where) +
                       " names lanes that have ended or are none: " + lanes(ended));
  unsigned votes = 0;
  std::vector<Thread*> members;
  std::vector<races::Clock*> clocks;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(there >> lane & 1)) continue;
    Thread* member = block.threads[first + lane];
    members.push_back(member);
    clocks.push_back(&member->clock);
    if (thread.kind == Collective::kBallot) {
      unsigned vote;
      std::memcpy(&vote, member->value, sizeof vote);
      votes |= vote ? 1u << lane : 0;
    }
  }
  for (Thread* member : members) {
    if (member->kind == Collective::kBallot) std::memcpy(member->result, &votes, sizeof votes);
    if (member->kind != Collective::kShuffle) continue;
    if (there >> member->source & 1) {
      std::memcpy(member->result, block.threads[first + member->source]->value, member->size);
    } else {
      report("mask", name(*member) + " reads lane " + std::to_string(member->source) + " at " +
                         line(member->where) + ", which takes no part");
      std::memset(member->result, 0xff, member->size);
    }
  }
  if (thread.kind == Collective::kSync && races::enabled) races::warp_barrier(clocks);
  for (Thread* member : members) make_ready(*member);
}

void end() {
  self->state = Thread::State::kDone;
  Block& block = *self->block;
  --block.alive;
  release_barrier(block);
  const unsigned first = self->index / kWarp * kWarp;
  for (unsigned lane = first; lane < std::min<size_t>(first + kWarp, block.threads.size()); ++lane)
    if (block.threads[lane]->state == Thread::State::kWarp) release_warp(*block.threads[lane]);
}

// One thread after the other.
[[noreturn]] void run_threads() {
  for (;;) {
    kernel();
    end();
    leave();
  }
}

void begin(Block& block, unsigned index) {
  block.index = index;
  block.arrived = 0;
  block.alive = current.threads;
  if (races::enabled) races::begin_block(block.resident);
  for (Thread* thread : block.threads) {
    thread->clock = races::Clock();
    thread->clock.thread = index * current.threads + thread->index;
    make_ready(*thread);
  }
}

void report_waiting() {
  std::set<std::string> places;  // one thread speaks for all that wait there
  for (const Block& block : blocks)
    for (const Thread* thread : block.threads) {
      const bool at_barrier = thread->state == Thread::State::kBarrier;
      if (block.alive == 0 || (!at_barrier && thread->state != Thread::State::kWarp)) continue;
      const std::string place =
          line(thread->where) + (at_barrier ? "" : " for the lanes " + lanes(thread->mask) + " of its warp");
      if (places.insert(place).second)
        report(at_barrier ? "barrier" : "mask", name(*thread) + " waits for ever at " + place);
    }
}

}  // namespace

void abandon() {
  abandoned = true;
  fibers::abandon();
}

void set_seed(std::optional<uint64_t> seed) {
  if (seed) random.emplace(*seed);
  else random.reset();
}

}  // namespace scheduler

using namespace scheduler;

void launch(const char* kernel_name, const void* library, unsigned count, unsigned block_size,
            std::function<void()> body) {
  if (clock) throw std::runtime_error("a launch within a launch");
  set_kernel(kernel_name, library);
  const size_t most = size_t(block_size) * memory::kResident;
  if (pool.size() < most) pool.make(most, run_threads);
  if (races::enabled) races::begin_launch(block_size);
  kernel = std::move(body);
  current = {0, block_size, 0, count};

  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (random) std::shuffle(order.begin(), order.end(), *random);
  const unsigned residents = std::min(count, random ? 1 + drawn(memory::kResident) : 1u);
  unsigned next = 0;
  ready.clear();
  blocks.assign(residents, {});
  threads.assign(size_t(block_size) * residents, {});
  for (unsigned resident = 0; resident < residents; ++resident) {
    Block& block = blocks[resident];
    block.resident = resident;
    for (unsigned i = 0; i < block_size; ++i) {
      Thread& thread = threads[resident * block_size + i];
      thread.fiber = &pool[resident * block_size + i];
      thread.block = &block;
      thread.index = i;
      block.threads.push_back(&thread);
    }
    begin(block, order[next++]);
  }

  abandoned = false;
  while (!ready.empty() && !abandoned) {
    if (random) std::swap(ready.front(), ready[drawn(ready.size())]);
    Thread& thread = *ready.front();
    ready.pop_front();
    resume(thread);
    Block& block = *thread.block;
    if (block.alive > 0) continue;
    memory::end_block(block.resident);
    if (next < count) begin(block, order[next++]);
  }
  clock = nullptr;
  const bool waiting =
      std::any_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.alive > 0; });
  if (!waiting) return;
  if (!abandoned) report_waiting();
  pool.clear();
  for (const Block& block : blocks) memory::end_block(block.resident);
  throw std::runtime_error("a launch did not come to its end: see the emulator's reports");
}

void barrier(const Where& where) {
  Thread& thread = *self;
  thread.state = Thread::State::kBarrier;
  thread.where = where;
  ++thread.block->arrived;
  release_barrier(*thread.block);
  leave();
}

void collective(Collective kind, unsigned mask, const void* value, size_t size, unsigned source, void* result,
                const Where& where) {
  Thread& thread = *self;
  if (!(mask >> thread.index % kWarp & 1))
    report("mask",
           name(thread) + " at " + line(where) + " is not in the mask it gives: lanes " + lanes(mask));
  thread.state = Thread::State::kWarp;
  thread.where = where;
  thread.kind = kind;
  thread.mask = mask | 1u << thread.index % kWarp;
  thread.source = source % kWarp;
  thread.size = size;
  thread.result = result;
  if (size) std::memcpy(thread.value, value, size);
  release_warp(thread);
  leave();
}

void fence() {
  if (races::enabled) races::fence(*clock);
}

void* shared(const SharedArray& array, size_t size) {
  return memory::shared_array(self->block->resident, array, size);
}

void give_way() {
  make_ready(*self);
  leave();
}

}  // namespace emulator
