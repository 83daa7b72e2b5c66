// Builds the table of one instruction set; included last by kernels_<instruction set>.cpp.
#pragma once

#include "causal_conv_impl.h"
#include "depthwise_conv_impl.h"
#include "scan2d_impl.h"
#include "selective_scan_impl.h"
#include "ssd_impl.h"
#include "ssd_scan_impl.h"

namespace mmvmamba {
namespace {

// Call a task function with the number of vectors per block as a constant.
#define MMVMAMBA_BY_BLOCK(function, args, channels, begin, end, memory) \
  switch (block_width<T>(channels) / kLanes<T>) {                       \
    case 1:                                                             \
      return function<T, 1>(args, begin, end, memory);                  \
    case 2:                                                             \
      return function<T, 2>(args, begin, end, memory);                  \
    case 3:                                                             \
      return function<T, 3>(args, begin, end, memory);                  \
    default:                                                            \
      return function<T, 4>(args, begin, end, memory);                  \
  }

template <typename T>
Kernels<T> make_kernels() {
  Kernels<T> kernels;
  kernels.block_width = block_width<T>;
  kernels.workspace = workspace<T>;
  kernels.selective_scan = [](const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
    MMVMAMBA_BY_BLOCK(selective_scan_tasks, a, a.channels / a.groups, begin, end, memory)
  };
  kernels.selective_scan_backward = [](const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
    MMVMAMBA_BY_BLOCK(selective_scan_backward_tasks, a, a.channels / a.groups, begin, end, memory)
  };
  kernels.scan2d = [](const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
    MMVMAMBA_BY_BLOCK(scan2d_tasks, a, a.channels, begin, end, memory)
  };
  kernels.scan2d_backward = [](const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
    MMVMAMBA_BY_BLOCK(scan2d_backward_tasks, a, a.channels, begin, end, memory)
  };
  kernels.depthwise_conv_blocks = depthwise_conv_blocks<T>;
  kernels.depthwise_conv_workspace = depthwise_conv_workspace<T>;
  kernels.depthwise_conv = depthwise_conv_by_storage<T>;
  kernels.depthwise_conv_backward = depthwise_conv_backward_by_storage<T>;
  kernels.causal_conv_blocks = causal_conv_blocks<T>;
  kernels.causal_conv_workspace = causal_conv_workspace<T>;
  kernels.causal_conv = causal_conv_by_storage<T>;
  kernels.causal_conv_backward = causal_conv_backward_by_storage<T>;
  kernels.ssd_workspace = ssd_workspace<T>;
  kernels.ssd_state = ssd_state_tasks<T>;
  kernels.ssd_read = ssd_read_tasks<T>;
  kernels.ssd_backward = ssd_backward_tasks<T>;
  kernels.ssd_scan_workspace = ssd_scan_workspace<T>;
  kernels.ssd_scan = ssd_scan_tasks<T>;
  kernels.ssd_scan_backward = ssd_scan_backward_tasks<T>;
  return kernels;
}

}  // namespace
}  // namespace mmvmamba
