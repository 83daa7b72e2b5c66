#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>

namespace mmvmamba {

namespace {

// PyTorch's names, weakest first; an unknown value is PyTorch's to complain about and limits nothing here.
int allowed_level() {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (limit == nullptr) return 2;
  if (std::strcmp(limit, "default") == 0) return 0;
  if (std::strcmp(limit, "avx2") == 0) return 1;
  return 2;
}

InstructionSet detect() {
#if defined(__x86_64__)
  const int level = allowed_level();
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && level >= 2) return {"avx512", avx512_kernels()};
  if (avx2 && level >= 1) return {"avx2", avx2_kernels()};
#endif
#if defined(__aarch64__)
  return {"neon", baseline_kernels()};  // part of every 64-bit Arm processor, so that the baseline has it
#else
  return {"default", baseline_kernels()};
#endif
}

std::string cpu_capability() { return instruction_set().name; }

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = detect();
  return chosen;
}

template <>
const Kernels<float>& kernels<float>() {
  return instruction_set().table.f32;
}

template <>
const Kernels<double>& kernels<double>() {
  return instruction_set().table.f64;
}

}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&mmvmamba::cpu_capability));
}
