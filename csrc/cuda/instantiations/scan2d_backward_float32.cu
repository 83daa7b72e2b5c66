#include "../kernels.h"
#include "../scan2d_aggregate.cuh"
#include "../scan2d_backward.cuh"

namespace mmvmamba {

const ScanKernels& backward_kernels_float32() {
  // In the order of Variant.
  static const ScanKernels table = {
      {&scan2d_backward_kernel<float, 2, true, 1>, &scan2d_backward_kernel<float, 2, true, 0>,
       &scan2d_backward_kernel<float, 1, true, 1>, &scan2d_backward_kernel<float, 1, true, 0>,
       &scan2d_backward_kernel<float, 1, false, 0>, &scan2d_backward_kernel<float, 1, false, -1>},
      {&scan2d_aggregate_kernel<float, 2, true, 1, true>, &scan2d_aggregate_kernel<float, 2, true, 0, true>,
       &scan2d_aggregate_kernel<float, 1, true, 1, true>, &scan2d_aggregate_kernel<float, 1, true, 0, true>,
       &scan2d_aggregate_kernel<float, 1, false, 0, true>, &scan2d_aggregate_kernel<float, 1, false, -1, true>},
  };
  return table;
}

}  // namespace mmvmamba
