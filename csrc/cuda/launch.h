// Between the operators' tensors and the kernels: allocation, launches, the passes of a scan.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "plan.h"

#ifdef MMVMAMBA_EMULATE_CUDA
#define MMVMAMBA_CUDA_LIBRARY mmvmamba_emulated
#define MMVMAMBA_CUDA_KEY CPU
#else
#define MMVMAMBA_CUDA_LIBRARY mmvmamba
#define MMVMAMBA_CUDA_KEY CUDA
#endif
// So that the macros above are replaced before they become names.
#define MMVMAMBA_REGISTER(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace mmvmamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The device of a tensor made current, and what is needed to launch there.
class Launcher {
 public:
  explicit Launcher(const Tensor& on);
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  const Limits& limits() const { return limits_; }
  cudaStream_t stream() const { return stream_; }

  // One scan kernel over all blocks of a plan.
  void scan(ScanKernel kernel, const ScanArgs& args, int warps, int shared_bytes) const;

  // A kernel with one thread for each of `count` elements.
  template <typename... Args>
  void elements(void (*kernel)(Args...), int64_t count, const Args&... args) const {
    if (count == 0) return;
    constexpr int kThreads = 256;
    const int64_t blocks = (count + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "mmvmamba: a tensor of ", count,
                    " elements is too large for one launch");
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream_, args...);
    check_launch();
  }

  void check_launch() const;

 private:
#ifndef MMVMAMBA_EMULATE_CUDA
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
  Limits limits_{};
};

// A tensor as the kernels want it: contiguous, in the given type. The caller keeps it.
inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(tensor, type));
}
inline OptionalTensor as_type(const OptionalTensor& tensor, ScalarType type) {
  if (!tensor.has_value()) return std::nullopt;
  return as_type(*tensor, type);
}

// The type the kernels read the per-position tensors in: theirs, or float32 where they differ.
ScalarType stream_type(const std::vector<Tensor>& streams, const char* op);

Tensor zeros(const Tensor& like, std::vector<int64_t> shape, ScalarType type);
inline Tensor zeros_like(const Tensor& like) {
  return zeros(like, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()), like.scalar_type());
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline const float* floats(const OptionalTensor& tensor) { return tensor.has_value() ? floats(*tensor) : nullptr; }
inline float* mutable_floats(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
}

// A new float32 tensor on the device of `like`.
inline Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// The lists of visits of permuted routes, see reduce.cuh.
struct Visits {
  Tensor head, next;
  Visits(const Launcher& launcher, const Tensor& permutation, int pixels);
};

// A scan with its plan: what scan2d and selective_scan share.
class Scan {
 public:
  Scan(const Launcher& launcher, const Tensor& like, ScalarType element, ScanArgs args, const Problem& problem,
       bool backward, const char* op);

  ScanArgs& args() { return args_; }
  const Plan& plan() const { return plan_; }
  // (b, bands, ...) and (b, bands, warps, ...) partial sums.
  int64_t parts() const { return static_cast<int64_t>(args_.batch) * plan_.bands; }
  int64_t warp_parts() const { return parts() * plan_.warps; }

  void run();

 private:
  void launch_parts(bool aggregate);

  const Launcher& launcher_;
  const ScanKernels& kernels_;
  ScanArgs args_;
  Plan plan_;
  bool backward_;
  std::vector<Tensor> keep_;
  bool both_axes_;
};

// all (parts, ...) summed in an order given by their number, in the given type and shape.
Tensor sum_partials(const Launcher& launcher, const Tensor& all, ScalarType type, std::vector<int64_t> shape);
// (b, routes, length, width) -> (b, pixels, width)
Tensor merge_visits(const Launcher& launcher, const Tensor& visits, const Visits& lists, ScalarType type,
                    int64_t pixels);
// (tiles, b, length, routes, width) -> (b, pixels, routes, width)
Tensor merge_slots(const Launcher& launcher, const Tensor& visits, const Visits& lists, ScalarType type,
                   int64_t pixels);

// Refuse tensors on another device than the first, before a kernel reads them.
void check_devices(const Tensor& first, const std::vector<OptionalTensor>& others, const char* op);
int checked_int(int64_t value, const char* op, const char* what);
bool is_aligned(const void* pointer, int64_t bytes);
Divider make_divider(int divisor);

}  // namespace mmvmamba
