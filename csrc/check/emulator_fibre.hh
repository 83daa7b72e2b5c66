// Fibres: stacks of their own between which one thread of the system switches. The emulator gives one to every CUDA
// thread of a block, since a function can only be left in the middle if its stack stays where it is.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(MMVMAMBA_PORTABLE_FIBRES)
#define MMVMAMBA_USE_UCONTEXT
#include <ucontext.h>
#endif

namespace mmvmamba::emulator {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 64 * kPage;

#ifndef MMVMAMBA_USE_UCONTEXT
// Saves the registers a function must keep on the present stack, its pointer in *from, and goes on where `to` left.
#ifdef __clang__
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa))
#endif
inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %%rbp\n\tpushq %%rbx\n\tpushq %%r12\n\tpushq %%r13\n\tpushq %%r14\n\tpushq %%r15\n\t"
      "movq %%rsp, (%%rdi)\n\tmovq %%rsi, %%rsp\n\t"
      "popq %%r15\n\tpopq %%r14\n\tpopq %%r13\n\tpopq %%r12\n\tpopq %%rbx\n\tpopq %%rbp\n\tret" ::
          : "memory");
}
#endif

class Fibre {
 public:
  Fibre() = default;
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;
  ~Fibre() {
    if (memory_ != nullptr) munmap(memory_, kPage + kStackBytes);
  }

  // The next switch to this fibre calls `entry`, which must never return.
  void start(void (*entry)(), int index) {
    if (memory_ == nullptr) allocate();
    // Not all stacks at the same place within a page: they would compete for the same few lines of the cache.
    char* top = memory_ + kPage + kStackBytes - 192 * static_cast<size_t>(index % 32) - 64;
#ifdef MMVMAMBA_USE_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_ + kPage;
    context_.uc_stack.ss_size = static_cast<size_t>(top - memory_ - kPage);
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // As if `entry` had just been called: the stack pointer is 8 bytes off a multiple of 16 at its first instruction.
    void** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--frame = nullptr;
    *--frame = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--frame = nullptr;
    stack_ = frame;
#endif
  }

  void switch_to(Fibre& next) {
#ifdef MMVMAMBA_USE_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    switch_stack(&stack_, next.stack_);
#endif
  }

 private:
  // The page below the stack stays closed: a stack that is too small is a fault at once, not another thread's data.
  void allocate() {
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      std::fprintf(stderr, "cuda_emulator: no memory for the stack of a thread\n");
      std::abort();
    }
    memory_ = static_cast<char*>(memory);
  }

  char* memory_ = nullptr;
#ifdef MMVMAMBA_USE_UCONTEXT
  ucontext_t context_;
#else
  void* stack_ = nullptr;
#endif
};

}  // namespace mmvmamba::emulator
