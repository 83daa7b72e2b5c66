// mmvmamba::causal_conv1d and its backward on the CPU. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/causal_conv/. Shapes were checked in Python; what protects memory is checked again here.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace mmvmamba {
namespace {

// Codes of the activation; Activation in mmvmamba/ops/depthwise_conv/interface.py.
constexpr int64_t kNone = 0, kSilu = 1;
// Positions of a band: with their margins they stay in the nearest cache.
constexpr int64_t kBand = 64;

// The tensor itself where its channels lie beside each other, else a contiguous copy.
Tensor with_dense_channels(const Tensor& tensor, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions,
                  "mmvmamba::causal_conv1d: x must be (b, l, d) and gradients of the output (b, l, k, d)");
  const int64_t last = dimensions - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

SequenceView view_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.dim() == 4 ? tensor.stride(2) : 0};
}

// Exchange the last two axes: (k, d, taps) as (k, taps, d), so that lanes are channels, and back.
template <typename T>
Tensor turned(const Tensor& source) {
  const int64_t directions = source.size(0), rows = source.size(1), columns = source.size(2);
  Tensor result = torch::stable::new_empty(source, {directions, columns, rows});
  const T* from = data<T>(source);
  T* to = mutable_data<T>(result);
  for (int64_t i = 0; i < directions; ++i, from += rows * columns, to += rows * columns)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
  return result;
}

// The inputs as the kernels want them, kept alive while they read them.
template <typename T>
struct Inputs {
  Tensor x, weight;
  std::optional<Tensor> bias;
  const std::vector<int64_t>& reverse;
  CausalConvArgs<T> args{};
  int64_t blocks = 0;

  Inputs(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
         const std::vector<int64_t>& reverse_, int64_t activation)
      : x(checked(x_, weight_, bias_, reverse_, activation)),
        weight(turned<T>(as_parameter<T>(weight_))),
        bias(bias_ ? std::optional<Tensor>(as_parameter<T>(*bias_)) : std::nullopt),
        reverse(reverse_) {
    args.x = view_of(x);
    args.weight = data<T>(weight);
    args.bias = data_or_null<T>(bias);
    args.reverse = reverse.data();
    args.batch = x.size(0);
    args.length = x.size(1);
    args.channels = x.size(2);
    args.directions = weight_.size(0);
    args.taps = weight_.size(2);
    args.bands = std::max<int64_t>(1, (args.length + kBand - 1) / kBand);
    args.silu = activation == kSilu;
    args.storage = storage_of(x, "mmvmamba::causal_conv1d: the sequence");
    blocks = kernels<T>().causal_conv_blocks(args.channels);
  }

  static Tensor checked(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::vector<int64_t>& reverse, int64_t activation) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3,
                    "mmvmamba::causal_conv1d: x must be (b, l, d), weight (k, d, width)");
    STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(2) > 0,
                    "mmvmamba::causal_conv1d: weight (k, d, width) must have k >= 1 and width >= 1");
    STD_TORCH_CHECK(weight.size(1) == x.size(2) && (!bias || bias->numel() == weight.size(0) * x.size(2)) &&
                        static_cast<int64_t>(reverse.size()) == weight.size(0),
                    "mmvmamba::causal_conv1d: the shapes of the arguments do not belong together");
    STD_TORCH_CHECK(activation == kNone || activation == kSilu, "mmvmamba::causal_conv1d: unknown activation ",
                    activation);
    return with_dense_channels(x, 3);
  }

  int64_t slices() const { return args.batch * args.bands; }
  bool is_empty() const { return x.numel() == 0; }
  Tensor empty(std::vector<int64_t> shape) const { return torch::stable::new_empty(weight, shape); }

  void run(void (*kernel)(const CausalConvArgs<T>&, int64_t, int64_t, T*)) const {
    if (is_empty()) return;
    run_with_scratch<T>(kernel, args, slices() * blocks, kernels<T>().causal_conv_workspace(args));
  }
};

template <typename T>
Tensor forward(Inputs<T> in) {
  auto& a = in.args;
  Tensor out = torch::stable::new_empty(in.x, {a.batch, a.length, a.directions, a.channels});
  a.out = out.mutable_data_ptr();
  in.run(kernels<T>().causal_conv);
  return out;
}

Tensor causal_conv1d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     std::vector<int64_t> reverse, int64_t activation) {
  if (x.scalar_type() == ScalarType::Double) return forward<double>({x, weight, bias, reverse, activation});
  return forward<float>({x, weight, bias, reverse, activation});
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_out_, const Tensor& weight, const std::optional<Tensor>& bias, Inputs<T> in,
                   bool need_x, bool need_weight, bool need_bias) {
  auto& a = in.args;
  const Tensor grad_out = with_dense_channels(grad_out_, 4);
  STD_TORCH_CHECK(grad_out.scalar_type() == in.x.scalar_type() && grad_out.size(0) == a.batch &&
                      grad_out.size(1) == a.length && grad_out.size(2) == a.directions &&
                      grad_out.size(3) == a.channels,
                  "mmvmamba::causal_conv1d_backward: grad_out must have the shape of the output and the dtype of x");
  need_bias = need_bias && bias.has_value();
  const int64_t slices = in.is_empty() ? 0 : in.slices();
  Tensor dx = torch::stable::new_empty(
      in.x, need_x ? std::vector<int64_t>{a.batch, a.length, a.channels} : std::vector<int64_t>{0});
  Tensor dweight = in.empty({slices, a.directions, a.taps, need_weight ? a.channels : 0});
  Tensor dbias = in.empty({slices, a.directions, need_bias ? a.channels : 0});
  a.grad_out = view_of(grad_out);
  a.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  a.dweight = need_weight ? mutable_data<T>(dweight) : nullptr;
  a.dbias = need_bias ? mutable_data<T>(dbias) : nullptr;
  if (need_x || need_weight || need_bias) in.run(kernels<T>().causal_conv_backward);
  return {dx, need_weight ? as_gradient(turned<T>(sum_partials<T>(dweight)), weight) : in.empty({0}),
          need_bias ? as_gradient(sum_partials<T>(dbias), *bias) : in.empty({0})};
}

Gradients causal_conv1d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias, std::vector<int64_t> reverse, int64_t activation,
                                 bool need_x, bool need_weight, bool need_bias) {
  if (x.scalar_type() == ScalarType::Double)
    return backward<double>(grad_out, weight, bias, {x, weight, bias, reverse, activation}, need_x, need_weight,
                            need_bias);
  return backward<float>(grad_out, weight, bias, {x, weight, bias, reverse, activation}, need_x, need_weight,
                         need_bias);
}

}  // namespace
}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&mmvmamba::causal_conv1d));
  m.impl("causal_conv1d_backward", TORCH_BOX(&mmvmamba::causal_conv1d_backward));
}
