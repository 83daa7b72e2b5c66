// mmvmamba::depthwise_conv2d and its backward on the CPU. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/depthwise_conv/. Shapes were checked in Python; what protects memory is checked again here.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace mmvmamba {
namespace {

// Codes of the activation; Activation in mmvmamba/ops/depthwise_conv/interface.py.
constexpr int64_t kNone = 0, kSilu = 1;

// The map itself where its channels lie beside each other, else a contiguous copy.
Tensor with_dense_channels(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() == 4, "mmvmamba::depthwise_conv2d: maps must be (b, h, w, d)");
  return map.stride(3) == 1 || map.size(3) == 1 ? map : torch::stable::contiguous(map);
}

MapView view_of(const Tensor& map) { return {map.const_data_ptr(), map.stride(0), map.stride(1), map.stride(2)}; }

// (d, 1, kh, kw) as (kh kw, d): lanes are channels.
template <typename T>
Tensor by_tap(const Tensor& weight) {
  const Tensor source = as_parameter<T>(weight);
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  Tensor turned = torch::stable::new_empty(source, {taps, channels});
  const T* from = data<T>(source);
  T* to = mutable_data<T>(turned);
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < channels; ++c) to[tap * channels + c] = from[c * taps + tap];
  return turned;
}

// The inputs as the kernels want them, kept alive while they read them.
template <typename T>
struct Inputs {
  Tensor x, weight;
  std::optional<Tensor> bias;
  DepthwiseConvArgs<T> args{};
  int64_t blocks = 0;

  Inputs(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, int64_t activation)
      : x(checked(x_, weight_, bias_, activation)),
        weight(by_tap<T>(weight_)),
        bias(bias_ ? std::optional<Tensor>(as_parameter<T>(*bias_)) : std::nullopt) {
    args.x = view_of(x);
    args.weight = data<T>(weight);
    args.bias = data_or_null<T>(bias);
    args.batch = x.size(0);
    args.height = x.size(1);
    args.width = x.size(2);
    args.channels = x.size(3);
    args.kernel_height = weight_.size(2);
    args.kernel_width = weight_.size(3);
    args.silu = activation == kSilu;
    args.storage = storage_of(x, "mmvmamba::depthwise_conv2d: the map");
    blocks = kernels<T>().depthwise_conv_blocks(args.channels);
  }

  static Tensor checked(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4,
                    "mmvmamba::depthwise_conv2d: x must be (b, h, w, d), weight (d, 1, kh, kw)");
    STD_TORCH_CHECK(weight.size(0) == x.size(3) && weight.size(1) == 1 && (!bias || bias->numel() == x.size(3)),
                    "mmvmamba::depthwise_conv2d: the shapes of the arguments do not belong together");
    STD_TORCH_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1,
                    "mmvmamba::depthwise_conv2d: the sides of the kernel must be odd");
    STD_TORCH_CHECK(activation == kNone || activation == kSilu, "mmvmamba::depthwise_conv2d: unknown activation ",
                    activation);
    return with_dense_channels(x);
  }

  // Cut maps into bands of at least `rows` rows until there are tasks enough to share. Decided by shapes alone.
  void cut(int64_t rows) {
    constexpr int64_t kEnough = 32;
    const int64_t tasks = std::max<int64_t>(args.batch * blocks, 1);
    const int64_t wanted = (kEnough + tasks - 1) / tasks;
    args.bands = std::clamp<int64_t>(args.height / rows, 1, wanted);
  }

  int64_t slices() const { return args.batch * args.bands; }
  bool empty_map() const { return x.numel() == 0; }
  Tensor empty_like_x() const {
    return torch::stable::new_empty(x, {args.batch, args.height, args.width, args.channels});
  }
  Tensor empty(std::vector<int64_t> shape) const { return torch::stable::new_empty(weight, shape); }

  void run(void (*kernel)(const DepthwiseConvArgs<T>&, int64_t, int64_t, T*)) const {
    if (empty_map()) return;
    run_with_scratch<T>(kernel, args, slices() * blocks, kernels<T>().depthwise_conv_workspace(args));
  }
};

template <typename T>
Tensor forward(Inputs<T> in) {
  constexpr int64_t kRows = 14;
  in.cut(kRows);
  Tensor out = in.empty_like_x();
  in.args.out = out.mutable_data_ptr();
  in.run(kernels<T>().depthwise_conv);
  return out;
}

Tensor depthwise_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation) {
  if (x.scalar_type() == ScalarType::Double) return forward<double>({x, weight, bias, activation});
  return forward<float>({x, weight, bias, activation});
}

// Add up the partial sums (slices, kh kw, d) and put the channels first again: (d, 1, kh, kw).
template <typename T>
Tensor finish_weight(const Tensor& partial, const Tensor& weight) {
  const Tensor sum = sum_partials<T>(partial);
  Tensor out = torch::stable::new_empty(sum, {weight.size(0), 1, weight.size(2), weight.size(3)});
  const int64_t taps = sum.size(0), channels = sum.size(1);
  const T* from = data<T>(sum);
  T* to = mutable_data<T>(out);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) to[c * taps + tap] = from[tap * channels + c];
  return as_gradient(out, weight);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_out_, const Tensor& weight, const std::optional<Tensor>& bias, Inputs<T> in,
                   bool need_x, bool need_weight, bool need_bias) {
  constexpr int64_t kRows = 28;  // the rows beside a band are computed twice
  in.cut(kRows);
  auto& a = in.args;
  const Tensor grad_out = with_dense_channels(grad_out_);
  STD_TORCH_CHECK(grad_out.scalar_type() == in.x.scalar_type() && grad_out.dim() == 4 && grad_out.size(0) == a.batch &&
                      grad_out.size(1) == a.height && grad_out.size(2) == a.width && grad_out.size(3) == a.channels,
                  "mmvmamba::depthwise_conv2d_backward: grad_out must have the shape and the dtype of x");
  need_bias = need_bias && bias.has_value();
  const int64_t slices = in.empty_map() ? 0 : in.slices();
  Tensor dx = need_x ? in.empty_like_x() : torch::stable::new_empty(in.x, {0});
  Tensor dweight = in.empty({slices, a.kernel_height * a.kernel_width, need_weight ? a.channels : 0});
  Tensor dbias = in.empty({slices, need_bias ? a.channels : 0});
  a.grad_out = view_of(grad_out);
  a.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  a.dweight = need_weight ? mutable_data<T>(dweight) : nullptr;
  a.dbias = need_bias ? mutable_data<T>(dbias) : nullptr;
  if (need_x || need_weight || need_bias) in.run(kernels<T>().depthwise_conv_backward);
  return {dx, need_weight ? finish_weight<T>(dweight, weight) : torch::stable::new_empty(weight, {0}),
          need_bias ? as_gradient(sum_partials<T>(dbias), *bias) : torch::stable::new_empty(weight, {0})};
}

Gradients depthwise_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& bias, int64_t activation, bool need_x,
                                    bool need_weight, bool need_bias) {
  if (x.scalar_type() == ScalarType::Double)
    return backward<double>(grad_out, weight, bias, {x, weight, bias, activation}, need_x, need_weight, need_bias);
  return backward<float>(grad_out, weight, bias, {x, weight, bias, activation}, need_x, need_weight, need_bias);
}

}  // namespace
}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&mmvmamba::depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&mmvmamba::depthwise_conv2d_backward));
}
