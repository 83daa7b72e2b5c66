#include "../kernels.h"
#include "../scan2d_aggregate.cuh"
#include "../scan2d_forward.cuh"

namespace mmvmamba {

const ScanKernels& forward_kernels_bfloat16() {
  // In the order of Variant.
  static const ScanKernels table = {
      {&scan2d_forward_kernel<BFloat16, 2, true, 1>, &scan2d_forward_kernel<BFloat16, 2, true, 0>,
       &scan2d_forward_kernel<BFloat16, 1, true, 1>, &scan2d_forward_kernel<BFloat16, 1, true, 0>,
       &scan2d_forward_kernel<BFloat16, 1, false, 0>, &scan2d_forward_kernel<BFloat16, 1, false, -1>},
      {&scan2d_aggregate_kernel<BFloat16, 2, true, 1, false>, &scan2d_aggregate_kernel<BFloat16, 2, true, 0, false>,
       &scan2d_aggregate_kernel<BFloat16, 1, true, 1, false>, &scan2d_aggregate_kernel<BFloat16, 1, true, 0, false>,
       &scan2d_aggregate_kernel<BFloat16, 1, false, 0, false>, &scan2d_aggregate_kernel<BFloat16, 1, false, -1, false>},
  };
  return table;
}

}  // namespace mmvmamba
