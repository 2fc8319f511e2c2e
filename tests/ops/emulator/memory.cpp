#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "reports.h"

namespace emulator::memory {

char* arena = nullptr;
uint8_t* states = nullptr;

namespace {

constexpr size_t kGap = 4096;  // at least, before and behind an allocation
constexpr size_t kLarge = size_t(1) << 20;
constexpr int kPoison = 0xff;  // a NaN in every floating-point dtype, -1 in int64

struct Allocation {
  size_t size;
  std::string made;
};

struct BlockArray {
  const SharedArray* declared;
  char* data;
  size_t size;
};

std::mutex mutex;
std::map<char*, Allocation> allocations;
std::deque<char*> free_slots[64];  // by the logarithm of their size; the oldest is used again first
size_t top = kShared;
std::vector<BlockArray> arrays[kResident];

void* reserve(size_t size) {
  void* data =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::runtime_error("the emulator gets no addresses for its memory");
  return data;
}

void make_arena() {
  if (arena) return;
  states = static_cast<uint8_t*>(reserve(kArena));
  arena = static_cast<char*>(reserve(kArena));
}

int slot_of(size_t size) {
  int slot = 13;
  while ((size_t(1) << slot) < size + 2 * kGap) ++slot;
  return slot;
}

struct TorchAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = memory::allocate(size);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

std::string byte_of(const char* address, const char* data, size_t size, const std::string& what) {
  const auto at = address - data;
  if (at >= 0 && static_cast<size_t>(at) < size)
    return "byte " + std::to_string(at) + " of " + what + " of " + std::to_string(size) + " bytes";
  if (at < 0) return std::to_string(-at) + " bytes before " + what + " of " + std::to_string(size) + " bytes";
  return std::to_string(at - static_cast<int64_t>(size)) + " bytes behind the end of " + what + " of " +
         std::to_string(size) + " bytes";
}

}  // namespace

void* allocate(size_t size) {
  if (size == 0) return nullptr;
#ifdef __SANITIZE_ADDRESS__
  return std::malloc(size);
#else
  const std::lock_guard lock(mutex);
  make_arena();
  const int slot = slot_of(size);
  char* start;
  if (!free_slots[slot].empty()) {
    start = free_slots[slot].front();
    free_slots[slot].pop_front();
  } else {
    if (top + (size_t(1) << slot) > kArena) throw std::runtime_error("the emulator's memory is used up");
    start = arena + top;
    top += size_t(1) << slot;
  }
  char* data = start + kGap;
  std::memset(states + offset(data), kWritten, size);
  allocations[data] = {size, ""};
  return data;
#endif
}

void release(void* data) {
  if (!data) return;
#ifdef __SANITIZE_ADDRESS__
  std::free(data);
#else
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(data));
  const size_t size = found->second.size;
  allocations.erase(found);
  if (size < kLarge) {
    std::memset(states + offset(data), kOutside, size);
  } else {  // pages given back are zero when they are met again, which is kOutside
    madvise(data, size, MADV_DONTNEED);
    madvise(states + offset(data), size, MADV_DONTNEED);
  }
  free_slots[slot_of(size)].push_back(static_cast<char*>(data) - kGap);
#endif
}

void serve_torch() {
  static TorchAllocator allocator;
  make_arena();
  c10::SetCPUAllocator(&allocator, /*priority=*/1);
}

void* shared_array(unsigned resident, const SharedArray& array, size_t size) {
  auto& known = arrays[resident];
  for (const BlockArray& one : known)
    if (one.declared == &array) return one.data;
#ifdef __SANITIZE_ADDRESS__
  char* data = static_cast<char*>(std::malloc(size));
#else
  make_arena();
  const char* end = known.empty() ? arena + resident * kBlock : known.back().data + known.back().size;
  char* data = arena + (offset(end) + kGap) / 256 * 256;
  if (data + size + kGap > arena + (resident + 1) * kBlock)
    throw std::runtime_error("the shared arrays of a block do not fit into the emulator's memory");
  std::memset(states + offset(data), kUnwritten, size);
#endif
  std::memset(data, kPoison, size);
  known.push_back({&array, data, size});
  return data;
}

void end_block(unsigned resident) {
  for (const BlockArray& one : arrays[resident]) {
#ifdef __SANITIZE_ADDRESS__
    std::free(one.data);
#else
    std::memset(states + offset(one.data), kOutside, one.size);
#endif
  }
  arrays[resident].clear();
}

std::string describe(const void* pointer) {
  const char* address = static_cast<const char*>(pointer);
  const size_t at = offset(address);
  if (at < kShared) {
    const BlockArray* nearest = nullptr;
    for (const BlockArray& one : arrays[at / kBlock])
      if (!nearest || one.data <= address) nearest = &one;
    if (!nearest) return "shared memory that no array has";
    return byte_of(address, nearest->data, nearest->size,
                   std::string("the shared array ") + nearest->declared->name + " (" +
                       line(nearest->declared->where) + ")");
  }
  const std::lock_guard lock(mutex);
  auto behind = allocations.upper_bound(const_cast<char*>(address));
  const bool before =
      behind != allocations.begin() &&
      (behind == allocations.end() ||
       address - (std::prev(behind)->first + std::prev(behind)->second.size) < behind->first - address);
  if (at >= kArena || (!before && behind == allocations.end()))
    return "an address that belongs to no tensor and no shared array";
  const auto& [data, allocation] = before ? *std::prev(behind) : *behind;
  return byte_of(address, data, allocation.size,
                 allocation.made.empty() ? "a tensor" : "a tensor made at " + allocation.made);
}

}  // namespace emulator::memory

namespace emulator {

using namespace memory;

void made_empty(void* data, size_t size, const Where& where) {
  std::memset(data, kPoison, size);
  if (offset(data) >= kArena) return;
  std::memset(states + offset(data), kUnwritten, size);
  const std::lock_guard lock(mutex);
  const auto found = allocations.find(static_cast<char*>(data));
  if (found != allocations.end() && where.line()) found->second.made = line(where);
}

void* cuda_malloc(size_t size) {
  void* data = allocate(size);
  made_empty(data, size, Where());
  return data;
}

void written_by_host(void* data, size_t size) {
  if (offset(data) < kArena) std::memset(states + offset(data), kWritten, size);
}

void check_result(const char* op, int index, const void* data, size_t size) {
  if (offset(data) >= kArena) return;
  const uint8_t* first = states + offset(data);
  const auto* found = static_cast<const uint8_t*>(std::memchr(first, kUnwritten, size));
  if (!found) return;
  set_kernel(op, nullptr);
  report("unwritten", "result " + std::to_string(index) + " leaves the op with memory that nobody wrote: " +
                          describe(static_cast<const char*>(data) + (found - first)));
}

}  // namespace emulator
