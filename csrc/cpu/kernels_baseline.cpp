// The kernels for whatever the compiler targets by default (SSE2 on x86-64, NEON on 64-bit Arm).

#include "kernel_table.h"

namespace mmvmamba {

const KernelTable& baseline_kernels() {
  static const KernelTable table = {make_kernels<float>(), make_kernels<double>()};
  return table;
}

}  // namespace mmvmamba
