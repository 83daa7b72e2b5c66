// mmvmamba::selective_scan and its backward on the CPU. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/selective_scan/. Shapes were checked in Python; what protects memory is checked again here.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dispatch.h"

namespace mmvmamba {
namespace {

// The inputs in the precision of the state, kept alive while the kernels read them.
template <typename T>
struct Inputs {
  Tensor u, delta, A, B, C;
  std::optional<Tensor> D, delta_bias;
  SelectiveScanArgs<T> args{};
  int64_t blocks = 0, tasks = 0, chunks = 0;

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const std::optional<Tensor>& D_, const std::optional<Tensor>& delta_bias_, bool delta_softplus)
      : u(as_input<T>(u_)),
        delta(as_input<T>(delta_)),
        A(as_input<T>(A_)),
        B(as_input<T>(B_)),
        C(as_input<T>(C_)),
        D(as_input<T>(D_)),
        delta_bias(as_input<T>(delta_bias_)) {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && B.dim() == 4 && C.dim() == 4,
                    "mmvmamba::selective_scan: u must be (b, d, l), A (d, n), B and C (b, g, n, l)");
    args.batch = u.size(0);
    args.channels = u.size(1);
    args.length = u.size(2);
    args.states = A.size(1);
    args.groups = B.size(1);
    args.delta_softplus = delta_softplus;
    STD_TORCH_CHECK(args.states > 0, "mmvmamba::selective_scan: A (d, n) must have n >= 1");
    const int64_t projected = args.batch * args.groups * args.states * args.length;
    STD_TORCH_CHECK(args.groups > 0 && args.channels % args.groups == 0,
                    "mmvmamba::selective_scan: the groups of B must divide the channels of u");
    STD_TORCH_CHECK(delta.numel() == u.numel() && A.numel() == args.channels * args.states && B.numel() == projected &&
                        C.numel() == projected && (!D || D->numel() == args.channels) &&
                        (!delta_bias || delta_bias->numel() == args.channels),
                    "mmvmamba::selective_scan: the shapes of the arguments do not belong together");
    args.u = data<T>(u);
    args.delta = data<T>(delta);
    args.A = data<T>(A);
    args.B = data<T>(B);
    args.C = data<T>(C);
    args.D = data_or_null<T>(D);
    args.delta_bias = data_or_null<T>(delta_bias);
    const int64_t per_group = args.channels / args.groups;
    const int64_t width = kernels<T>().block_width(per_group);
    blocks = (per_group + width - 1) / width;
    tasks = args.batch * args.groups * blocks;
    chunks = (args.length + kChunk - 1) / kChunk;
  }

  Tensor empty(std::vector<int64_t> shape) const { return torch::stable::new_empty(u, shape); }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(Inputs<T> in, ScalarType out_dtype, bool save_carries) {
  auto& a = in.args;
  Tensor out = in.empty({a.batch, a.channels, a.length});
  Tensor last_state = in.empty({a.batch, a.channels, a.states});
  Tensor carries = save_carries ? in.empty({a.batch, in.chunks, a.states, a.channels}) : in.empty({0});
  a.out = mutable_data<T>(out);
  a.last_state = mutable_data<T>(last_state);
  a.carries = save_carries ? mutable_data<T>(carries) : nullptr;
  run_tasks<T>(kernels<T>().selective_scan, a, in.tasks, 0);
  return {torch::stable::to(out, out_dtype), last_state, carries};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                                                  const std::optional<Tensor>& delta_bias, bool delta_softplus,
                                                  ScalarType out_dtype, bool save_carries) {
  if (u.scalar_type() == ScalarType::Double)
    return forward<double>({u, delta, A, B, C, D, delta_bias, delta_softplus}, out_dtype, save_carries);
  return forward<float>({u, delta, A, B, C, D, delta_bias, delta_softplus}, out_dtype, save_carries);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_out_, const std::optional<Tensor>& grad_last_state_, Inputs<T> in,
                   const Tensor& carries_) {
  auto& a = in.args;
  const Tensor grad_out = as_input<T>(grad_out_), carries = as_input<T>(carries_);
  const std::optional<Tensor> grad_last_state = as_input<T>(grad_last_state_);
  STD_TORCH_CHECK(
      grad_out.numel() == in.u.numel() && carries.numel() == a.batch * in.chunks * a.states * a.channels &&
          (!grad_last_state || grad_last_state->numel() == a.batch * a.channels * a.states),
      "mmvmamba::selective_scan_backward: grad_out, grad_last_state or carries do not belong to the inputs");
  Tensor du = in.empty({a.batch, a.channels, a.length}), ddelta = in.empty({a.batch, a.channels, a.length});
  Tensor dA = in.empty({a.batch, a.channels, a.states});
  Tensor dD = in.empty({in.D ? a.batch : 0, a.channels});
  Tensor dbias = in.empty({in.delta_bias ? a.batch : 0, a.channels});
  Tensor dB = in.empty({in.blocks, a.batch, a.groups, a.states, a.length});
  Tensor dC = in.empty({in.blocks, a.batch, a.groups, a.states, a.length});
  a.carries = const_cast<T*>(data<T>(carries));
  a.grad_out = data<T>(grad_out);
  a.grad_last_state = data_or_null<T>(grad_last_state);
  a.du = mutable_data<T>(du);
  a.ddelta = mutable_data<T>(ddelta);
  a.dA = mutable_data<T>(dA);
  a.dD = in.D ? mutable_data<T>(dD) : nullptr;
  a.dbias = in.delta_bias ? mutable_data<T>(dbias) : nullptr;
  a.dB = mutable_data<T>(dB);
  a.dC = mutable_data<T>(dC);
  run_tasks<T>(kernels<T>().selective_scan_backward, a, in.tasks, 0);
  return {du,
          ddelta,
          sum_partials<T>(dA),
          sum_partials<T>(dB),
          sum_partials<T>(dC),
          in.D ? sum_partials<T>(dD) : in.empty({0}),
          in.delta_bias ? sum_partials<T>(dbias) : in.empty({0})};
}

Gradients selective_scan_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_last_state, const Tensor& u,
                                  const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                  const std::optional<Tensor>& D, const std::optional<Tensor>& delta_bias,
                                  bool delta_softplus, const Tensor& carries) {
  auto [du, ddelta, dA, dB, dC, dD, dbias] =
      u.scalar_type() == ScalarType::Double
          ? backward<double>(grad_out, grad_last_state, {u, delta, A, B, C, D, delta_bias, delta_softplus}, carries)
          : backward<float>(grad_out, grad_last_state, {u, delta, A, B, C, D, delta_bias, delta_softplus}, carries);
  return {as_gradient(du, u),
          as_gradient(ddelta, delta),
          as_gradient(dA, A),
          as_gradient(dB, B),
          as_gradient(dC, C),
          D ? as_gradient(dD, *D) : dD,
          delta_bias ? as_gradient(dbias, *delta_bias) : dbias};
}

}  // namespace
}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&mmvmamba::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&mmvmamba::selective_scan_backward));
}
