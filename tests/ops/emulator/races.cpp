#include "races.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "memory.h"
#include "reports.h"

namespace emulator::races {

bool enabled = false;

namespace {

struct Event {
  unsigned thread, segment;
  uintptr_t place;
};

// What has been done to a byte, or by its first byte to a word whose bytes have not been met one by one. It
// holds for one launch, or for shared memory for one block; what is older counts as nothing.
struct Cell {
  unsigned era;
  bool split, written, atomically;
  unsigned readers;  // 0, 1: `read`; more: `reads[many]`
  unsigned many;
  Event write, read;
};

constexpr size_t kWord = 4;

// The last read of each thread, and for a while earlier ones too.
class Readers {
 public:
  void add(const Event& event) {
    if (!events_.empty() && events_.back().thread == event.thread) {
      events_.back() = event;
      return;
    }
    events_.push_back(event);
    if (events_.size() < limit_) return;
    const auto later = [](const Event& a, const Event& b) {
      return a.thread != b.thread ? a.thread < b.thread : a.segment > b.segment;
    };
    std::sort(events_.begin(), events_.end(), later);
    const auto same = [](const Event& a, const Event& b) { return a.thread == b.thread; };
    events_.erase(std::unique(events_.begin(), events_.end(), same), events_.end());
    limit_ = std::max(limit_, 2 * events_.size());
  }
  const std::vector<Event>& events() const { return events_; }

 private:
  std::vector<Event> events_;
  size_t limit_ = 64;
};

Cell* cells = nullptr;
unsigned threads_of_a_block, last_era = 0, launch_era, block_eras[memory::kResident];
std::vector<Readers> reads;
std::map<const void*, Known> atomics;

using List = std::vector<std::pair<unsigned, unsigned>>;

unsigned looked_up(const List& list, unsigned key) {
  const auto found = std::lower_bound(list.begin(), list.end(), std::make_pair(key, 0u));
  return found != list.end() && found->first == key ? found->second : 0;
}

void raise(List& list, unsigned key, unsigned segment) {
  const auto found = std::lower_bound(list.begin(), list.end(), std::make_pair(key, 0u));
  if (found == list.end() || found->first != key) list.insert(found, {key, segment});
  else found->second = std::max(found->second, segment);
}

List joined(const List& a, const List& b) {
  List all;
  all.reserve(a.size() + b.size());
  auto i = a.begin(), j = b.begin();
  while (i != a.end() || j != b.end()) {
    if (j == b.end() || (i != a.end() && i->first < j->first)) all.push_back(*i++);
    else if (i == a.end() || j->first < i->first) all.push_back(*j++);
    else {
      all.emplace_back(i->first, std::max(i->second, j->second));
      ++i, ++j;
    }
  }
  return all;
}

Known joined(const Known& a, const Known& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  return std::make_shared<const Knowledge>(
      Knowledge{joined(a->blocks, b->blocks), joined(a->threads, b->threads)});
}

bool ordered(const Event& earlier, const Clock& later) {
  if (earlier.thread == later.thread) return true;
  if (!later.known) return false;
  return looked_up(later.known->blocks, earlier.thread / threads_of_a_block) >= earlier.segment ||
         looked_up(later.known->threads, earlier.thread) >= earlier.segment;
}

// What some threads have by themselves, as one.
Known of_all(const std::vector<Clock*>& threads, Known Clock::* field) {
  Known all = threads.front()->*field;
  const Known* last = &(threads.front()->*field);
  for (const Clock* clock : threads) {
    if (clock->*field != *last) all = joined(all, clock->*field);
    last = &(clock->*field);
  }
  return all;
}

std::shared_ptr<Knowledge> copy(const Known& known) {
  return known ? std::make_shared<Knowledge>(*known) : std::make_shared<Knowledge>();
}

// What a barrier makes of its threads' knowledge. A fence before it stands for all of them, and so does an
// atomic before it for the fences behind it: __threadfence is sequentially consistent.
void join(const std::vector<Clock*>& threads, const std::shared_ptr<Knowledge>& all) {
  const Known released = of_all(threads, &Clock::released), acquired = of_all(threads, &Clock::acquired);
  for (Clock* clock : threads) {
    clock->known = all;
    clock->released = released;
    clock->acquired = acquired;
  }
}

void race(const Event& earlier, const char* did, const Clock& clock, const char* does, size_t at,
          uintptr_t place) {
  report("race",
         name_of_thread(clock.thread) + " " + does + " " + memory::describe(memory::arena + at) +
             " at {0}, which " + name_of_thread(earlier.thread) + " " + did +
             " at {1}: nothing orders the two",
         {place, earlier.place});
}

void meet(Cell& cell, const Clock& clock, size_t at, bool write, bool atomically, uintptr_t place) {
  const Event event{clock.thread, clock.segment, place};
  const char* does = atomically ? "changes (atomic)" : write ? "writes" : "reads";
  if (cell.written && !(atomically && cell.atomically) && !ordered(cell.write, clock))
    race(cell.write, cell.atomically ? "changed (atomic)" : "wrote", clock, does, at, place);
  if (!write) {
    if (cell.readers == 0 || (cell.readers == 1 && ordered(cell.read, clock))) {
      cell.readers = 1;
      cell.read = event;
      return;
    }
    if (cell.readers == 1) {
      cell.readers = 2;
      cell.many = static_cast<unsigned>(reads.size());
      reads.emplace_back().add(cell.read);
    }
    reads[cell.many].add(event);
    return;
  }
  if (cell.readers == 1 && !ordered(cell.read, clock)) race(cell.read, "read", clock, does, at, place);
  if (cell.readers > 1)
    for (const Event& read : reads[cell.many].events())
      if (!ordered(read, clock)) race(read, "read", clock, does, at, place);
  cell.written = true;
  cell.atomically = atomically;
  cell.write = event;
  cell.readers = 0;
}

}  // namespace

void begin_launch(unsigned threads) {
  if (!cells) {
    void* data = mmap(nullptr, memory::kArena * sizeof(Cell), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::runtime_error("the emulator gets no addresses for its race detector");
    cells = static_cast<Cell*>(data);
  }
  threads_of_a_block = threads;
  launch_era = ++last_era;
  reads.clear();
  atomics.clear();
}

void begin_block(unsigned resident) {
  block_eras[resident] = ++last_era;
}

void barrier(const std::vector<Clock*>& threads) {
  const std::shared_ptr<Knowledge> all = copy(of_all(threads, &Clock::known));
  unsigned segment = 0;
  for (const Clock* clock : threads) segment = std::max(segment, clock->segment);
  const unsigned block = threads.front()->thread / threads_of_a_block;
  std::erase_if(all->threads, [&](const auto& one) { return one.first / threads_of_a_block == block; });
  raise(all->blocks, block, segment);
  join(threads, all);
  for (Clock* clock : threads) clock->segment = segment + 1;
}

void warp_barrier(const std::vector<Clock*>& lanes) {
  const std::shared_ptr<Knowledge> all = copy(of_all(lanes, &Clock::known));
  for (const Clock* clock : lanes) raise(all->threads, clock->thread, clock->segment);
  join(lanes, all);
  for (Clock* clock : lanes) ++clock->segment;
}

void fence(Clock& clock) {
  const std::shared_ptr<Knowledge> all = copy(joined(clock.known, clock.acquired));
  raise(all->threads, clock.thread, clock.segment);
  clock.known = clock.released = all;
  clock.acquired = nullptr;
  ++clock.segment;
}

void atomic(Clock& clock, const void* address) {
  Known& there = atomics[address];
  clock.acquired = joined(clock.acquired, there);
  there = joined(there, clock.released);
}

void access(const Clock& clock, size_t at, size_t size, bool write, bool atomically, uintptr_t place) {
  const unsigned era = at < memory::kShared ? block_eras[at / memory::kBlock] : launch_era;
  for (const size_t end = at + size; at < end;) {
    Cell& word = cells[at / kWord * kWord];
    if (word.era != era) {
      word = Cell();
      word.era = era;
    }
    if (!word.split) {
      if (at % kWord == 0 && at + kWord <= end) {
        meet(word, clock, at, write, atomically, place);
        at += kWord;
        continue;
      }
      // Readers of the word may be many: each byte then has a list of its own.
      word.split = true;
      for (size_t byte = 1; byte < kWord; ++byte) {
        Cell& cell = (&word)[byte];
        cell = word;
        if (cell.readers < 2) continue;
        cell.many = static_cast<unsigned>(reads.size());
        reads.push_back(Readers(reads[word.many]));
      }
    }
    meet(cells[at], clock, at, write, atomically, place);
    ++at;
  }
}

}  // namespace emulator::races
