#include "reports.h"

#include <dlfcn.h>

namespace emulator {
namespace {

constexpr size_t kMost = 200;  // that are kept: a defect repeats itself

std::string kernel_name, library_path;
uintptr_t library_base;

}  // namespace

void set_kernel(const std::string& kernel, const void* library) {
  kernel_name = kernel;
  Dl_info info{};
  if (library && dladdr(library, &info)) {
    library_path = info.dli_fname;
    library_base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  }
}

uintptr_t place_of(const void* code) {
  return reinterpret_cast<uintptr_t>(code) - library_base - 1;  // the call before the address it returns to
}

void report(const std::string& kind, const std::string& text, const std::vector<uintptr_t>& places) {
  for (Report& known : reports) {
    if (known.kind == kind && known.kernel == kernel_name && known.places == places &&
        (!places.empty() || known.text == text)) {
      ++known.count;
      return;
    }
  }
  if (reports.size() < kMost) reports.push_back({kind, kernel_name, text, library_path, places, 1});
}

std::string name_of_thread(unsigned thread_of_grid) {
  return "thread " + std::to_string(thread_of_grid % current.threads) + " of block " +
         std::to_string(thread_of_grid / current.threads);
}

}  // namespace emulator
