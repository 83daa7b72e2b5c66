// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

// GCC does not define its own macros (__AVX2__ ...) for a target set by a pragma.
#define MMVMAMBA_AVX2
#include "kernel_table.h"

namespace mmvmamba {

const KernelTable& avx2_kernels() {
  static const KernelTable table = {make_kernels<float>(), make_kernels<double>()};
  return table;
}

}  // namespace mmvmamba

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
