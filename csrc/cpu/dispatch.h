// Which instruction set runs, and the loop over tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace mmvmamba {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct InstructionSet {
  const char* name;  // as in ATEN_CPU_CAPABILITY, or neon
  const KernelTable& table;
};

// The best this processor can run; ATEN_CPU_CAPABILITY (default, avx2, avx512), PyTorch's own switch, lowers it.
const InstructionSet& instruction_set();

template <typename T>
const Kernels<T>& kernels();

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;

// A tensor as the kernels want it; the caller keeps the handle alive.
template <typename T>
Tensor as_input(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, kScalarType<T>));
}

template <typename T>
std::optional<Tensor> as_input(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return as_input<T>(*tensor);
}

// The same for an input that the kernel converts as it reads: bfloat16 and float16 stay where the state is float32.
template <typename T>
Tensor as_rows(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (sizeof(T) == sizeof(float) && (type == ScalarType::BFloat16 || type == ScalarType::Half))
    return torch::stable::contiguous(tensor);
  return as_input<T>(tensor);
}

template <typename T>
Input<T> rows(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const Element element = type == ScalarType::BFloat16 ? Element::kBFloat16
                          : type == ScalarType::Half   ? Element::kFloat16
                                                       : Element::kSame;
  return {tensor.const_data_ptr(), element};
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The type in memory of an input that a kernel of type float or double converts as it reads.
inline Element storage_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
      return Element::kSame;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// As as_input, but a parameter that is as wanted costs no trip through the dispatcher: small maps take microseconds.
template <typename T>
Tensor as_parameter(const Tensor& tensor) {
  return tensor.scalar_type() == kScalarType<T> && tensor.is_contiguous() ? tensor : as_input<T>(tensor);
}

// Run `kernel` over tasks 0 .. count - 1 in parallel, each thread with scratch memory of its own.
template <typename T, typename Args>
void run_with_scratch(void (*kernel)(const Args&, int64_t, int64_t, T*), const Args& args, int64_t count,
                      int64_t elements) {
  // Scratch rows are read and written by whole vectors: keep them within cache lines. A multiple of the alignment, as
  // std::aligned_alloc demands.
  const size_t bytes = (elements * sizeof(T) + 63) / 64 * 64;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<T, decltype(&std::free)> memory(static_cast<T*>(std::aligned_alloc(64, bytes)), &std::free);
    STD_TORCH_CHECK(memory != nullptr, "mmvmamba: out of memory for ", bytes, " bytes of scratch");
    kernel(args, begin, end, memory.get());
  });
}

// The same for the scans.
template <typename T, typename Args>
void run_tasks(void (*kernel)(const Args&, int64_t, int64_t, T*), const Args& args, int64_t count, int64_t rank) {
  run_with_scratch<T>(kernel, args, count, kernels<T>().workspace(args.states, rank));
}

// out[i] = partial[0][i] + partial[1][i] + ..., in that order whatever the number of threads.
template <typename T>
Tensor sum_partials(const Tensor& partial) {
  const int64_t parts = partial.size(0);
  std::vector<int64_t> shape(partial.sizes().begin() + 1, partial.sizes().end());
  Tensor out = torch::stable::new_empty(partial, shape);
  const T* source = data<T>(partial);
  T* target = mutable_data<T>(out);
  const int64_t count = out.numel();
  torch::stable::parallel_for(0, count, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = parts > 0 ? source[i] : T(0);
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = begin; i < end; ++i) target[i] += source[part * count + i];
  });
  return out;
}

// A gradient in the dtype of the tensor it belongs to.
inline Tensor as_gradient(const Tensor& gradient, const Tensor& input) {
  return torch::stable::to(gradient, input.scalar_type());
}

}  // namespace mmvmamba
