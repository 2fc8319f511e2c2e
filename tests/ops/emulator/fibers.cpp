#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator::fibers {
namespace {

constexpr size_t kPage = 4096, kSlot = kStack + kPage, kMost = 4096;

char* stacks = nullptr;
jmp_buf host;
Fiber* self = nullptr;

// swapcontext would ask the kernel for the signal mask at every switch. AddressSanitizer has to know on which
// stack the program runs; its own longjmp clears all of one at every call, so the C library's is taken.
#ifdef __SANITIZE_ADDRESS__
void* host_fake_stack = nullptr;
const void* host_bottom = nullptr;
size_t host_size = 0;

void jump(jmp_buf to) {
  using Jump = void (*)(jmp_buf, int);
  static const auto libc = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  libc(to, 1);
}
void to_fiber(const char* stack) {
  __sanitizer_start_switch_fiber(&host_fake_stack, stack, kStack);
}
void in_host() {
  __sanitizer_finish_switch_fiber(host_fake_stack, nullptr, nullptr);
}
void to_host(void** fake_stack) {
  __sanitizer_start_switch_fiber(fake_stack, host_bottom, host_size);
}
void in_fiber(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &host_bottom, &host_size);
}
#else
void jump(jmp_buf to) {
  _longjmp(to, 1);
}
void to_fiber(const char*) {}
void in_host() {}
void to_host(void**) {}
void in_fiber(void*) {}
#endif

}  // namespace

void enter() {
  in_fiber(nullptr);
  self->body_();
}

void Fiber::resume() {
  self = this;
  to_fiber(stack_);
  if (!_setjmp(host)) {
    if (started_) jump(context_);
    started_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_;
    start.uc_stack.ss_size = kStack;
    makecontext(&start, enter, 0);
    setcontext(&start);
  }
  in_host();
}

void Fiber::leave() {
  to_host(&fake_stack_);
  if (!_setjmp(context_)) jump(host);
  in_fiber(fake_stack_);
}

void abandon() {
  to_host(nullptr);
  jump(host);
  __builtin_unreachable();
}

void Pool::make(size_t count, const std::function<void()>& body) {
  if (count > kMost) throw std::runtime_error("a block has at most 1024 threads");
  if (!stacks) {
    void* data = mmap(nullptr, kMost * kSlot, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
      throw std::runtime_error("the emulator gets no addresses for the stacks of its threads");
    stacks = static_cast<char*>(data);
    for (size_t i = 0; i < kMost; ++i) mprotect(stacks + i * kSlot, kPage, PROT_NONE);  // below each of them
  }
  fibers_ = std::vector<Fiber>(count);
  for (size_t i = 0; i < count; ++i) {
    fibers_[i].body_ = body;
    fibers_[i].stack_ = stacks + i * kSlot + kPage;
  }
}

bool on_a_stack(const void* address) {
  thread_local const char *bottom = nullptr, *end = nullptr;
  const char* at = static_cast<const char*>(address);
  if (at >= stacks && at < stacks + kMost * kSlot) return true;
  if (!bottom) {
    pthread_attr_t attributes;
    void* start = nullptr;
    size_t size = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &start, &size);
    pthread_attr_destroy(&attributes);
    bottom = static_cast<const char*>(start);
    end = bottom + size;
  }
  return at >= bottom && at < end;
}

}  // namespace emulator::fibers
