// mmvmamba::selective_scan and its backward on CUDA devices. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/selective_scan/. Shapes were checked in Python; what protects memory is checked again here.
//
// The kernels want channels last, so inputs (b, d, l) are transposed first and results afterwards; B and C become the
// features of a map with one row, one slot for each group.

#include <tuple>

#include "launch.h"

namespace mmvmamba {
namespace {

constexpr const char* kOp = "mmvmamba::selective_scan";

// (b, d, l) -> (b, l, d) and back, contiguous.
Tensor transposed(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(torch::stable::transpose(torch::stable::to(tensor, type), 1, 2));
}

struct Inputs {
  ScalarType element;  // what the kernels read
  Tensor u, delta, A, features;
  OptionalTensor D, delta_bias;
  ScanArgs args{};
  Problem problem{};

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B, const Tensor& C,
         const OptionalTensor& D_, const OptionalTensor& delta_bias_, bool delta_softplus)
      : element(stream_type({u_, delta_, B, C}, kOp)),
        u(transposed(u_, element)),
        delta(transposed(delta_, element)),
        A(as_type(A_, ScalarType::Float)),
        D(as_type(D_, ScalarType::Float)),
        delta_bias(as_type(delta_bias_, ScalarType::Float)) {
    check_devices(u_, {delta_, A_, B, C, D_, delta_bias_}, kOp);
    check_shapes(u_, delta_, B, C);
    args.batch = checked_int(u_.size(0), kOp, "the batch");
    args.channels = checked_int(u_.size(1), kOp, "the number of channels");
    args.length = args.pixels = args.width = checked_int(u_.size(2), kOp, "the length");
    args.height = args.routes = 1;
    args.groups = args.slots = static_cast<int>(B.size(1));
    args.group_channels = args.channels / args.groups;
    args.x_pixel = args.channels;
    args.states = checked_int(A.size(1), kOp, "n");
    args.features = 2 * args.states;
    checked_int(static_cast<int64_t>(args.groups) * args.features * 4, kOp, "the size of a position's B and C");
    args.chunks = (args.length + kChunk - 1) / kChunk;
    args.by_visit = true;
    args.delta_softplus = delta_softplus;
    args.by_height = make_divider(1);
    join_features(B, C);
    args.x = u.const_data_ptr();
    args.delta = delta.const_data_ptr();
    args.projections = features.const_data_ptr();
    args.A = floats(A);
    args.D = floats(D);
    args.dt_bias = floats(delta_bias);
    problem.batch = args.batch;
    problem.groups = args.groups;
    problem.group_channels = args.group_channels;
    problem.length = args.length;
    problem.states = args.states;
    problem.features = args.features;
    problem.element_size = element == ScalarType::Float ? 4 : 2;
    problem.by_visit = true;
    problem.softplus = delta_softplus;
  }

  void check_shapes(const Tensor& u_, const Tensor& delta_, const Tensor& B, const Tensor& C) const {
    STD_TORCH_CHECK(u_.dim() == 3 && A.dim() == 2 && B.dim() == 4 && C.dim() == 4, kOp,
                    ": u must be (b, d, l), A (d, n), B and C (b, g, n, l)");
    const int64_t d = u_.size(1), n = A.size(1), groups = B.size(1);
    STD_TORCH_CHECK(n > 0, kOp, ": A (d, n) must have n >= 1");
    STD_TORCH_CHECK(groups > 0 && d % groups == 0, kOp, ": the groups of B must divide the channels of u");
    const int64_t projected = u_.size(0) * groups * n * u_.size(2);
    STD_TORCH_CHECK(delta_.numel() == u_.numel() && A.size(0) == d && B.numel() == projected &&
                        C.numel() == projected && (!D || D->numel() == d) && (!delta_bias || delta_bias->numel() == d),
                    kOp, ": the shapes of the arguments do not belong together");
  }

  // B and C (b, g, n, l) -> (b, l, g, 2 n).
  void join_features(const Tensor& B, const Tensor& C) {
    const int64_t b = B.size(0), g = B.size(1), n = B.size(2), l = B.size(3);
    features = torch::stable::new_empty(B, std::vector<int64_t>{b, l, g, 2 * n}, element);
    int64_t first = 0;
    for (const Tensor& part : {B, C}) {
      Tensor target = torch::stable::narrow(features, 3, first, n);
      torch::stable::copy_(target, torch::stable::transpose(torch::stable::transpose(part, 1, 3), 2, 3));
      first += n;
    }
  }

  bool is_empty() const { return u.numel() == 0; }
};

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const OptionalTensor& D,
                                                  const OptionalTensor& delta_bias, bool delta_softplus,
                                                  ScalarType out_dtype, bool save_carries) {
  const Launcher launcher(u);
  Inputs in(u, delta, A, B, C, D, delta_bias, delta_softplus);
  const ScanArgs& a = in.args;
  Tensor carries = save_carries ? new_floats(in.A, {a.batch, a.chunks, a.states, a.channels}) : new_floats(in.A, {0});
  Tensor last_state = new_floats(in.A, {a.batch, a.channels, a.states});
  if (in.is_empty()) {
    torch::stable::zero_(last_state);
    return {zeros(u, {a.batch, a.channels, a.length}, out_dtype), last_state, carries};
  }
  Scan scan(launcher, in.A, in.element, a, in.problem, false, kOp);
  Tensor out = new_floats(in.A, {a.batch, a.length, a.channels});
  scan.args().out = mutable_floats(out);
  scan.args().carries = mutable_floats(carries);
  scan.args().last_state = mutable_floats(last_state);
  scan.run();
  return {transposed(out, out_dtype), last_state, carries};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients zero_gradients(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                         const OptionalTensor& D, const OptionalTensor& delta_bias) {
  const Tensor none = new_floats(A, {0});
  return {zeros_like(u),
          zeros_like(delta),
          zeros_like(A),
          zeros_like(B),
          zeros_like(C),
          D ? zeros_like(*D) : none,
          delta_bias ? zeros_like(*delta_bias) : none};
}

// One half of the gradient of the features (b, l, g, 2 n) as that of B or C (b, g, n, l).
Tensor feature_half(Tensor gradient, int64_t first, int64_t n, ScalarType type) {
  const Tensor half = torch::stable::narrow(gradient, 3, first, n);
  return torch::stable::contiguous(
      torch::stable::to(torch::stable::transpose(torch::stable::transpose(half, 2, 3), 1, 3), type));
}

Gradients selective_scan_backward(const Tensor& grad_out, const OptionalTensor& grad_last_state_, const Tensor& u,
                                  const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                                  const OptionalTensor& D, const OptionalTensor& delta_bias, bool delta_softplus,
                                  const Tensor& carries_) {
  const Launcher launcher(u);
  Inputs in(u, delta, A, B, C, D, delta_bias, delta_softplus);
  if (in.is_empty()) return zero_gradients(u, delta, A, B, C, D, delta_bias);
  check_devices(u, {grad_out, grad_last_state_, carries_}, kOp);
  const ScanArgs& a = in.args;
  const int64_t b = a.batch, d = a.channels, n = a.states, l = a.length, g = a.groups;
  const Tensor dy = transposed(grad_out, ScalarType::Float), carries = as_type(carries_, ScalarType::Float);
  const OptionalTensor grad_last_state = as_type(grad_last_state_, ScalarType::Float);
  STD_TORCH_CHECK(dy.numel() == in.u.numel() && carries.numel() == b * a.chunks * n * d &&
                      (!grad_last_state || grad_last_state->numel() == b * d * n),
                  kOp, "_backward: grad_out, grad_last_state or carries do not belong to the inputs");
  Scan scan(launcher, in.A, in.element, a, in.problem, true, kOp);
  const int64_t warp_parts = scan.warp_parts();
  Tensor du = new_floats(in.A, {b, l, d}), ddelta = new_floats(in.A, {b, l, d});
  Tensor dfeatures = new_floats(in.A, {scan.plan().tiles, b, l, g, 2 * n});
  Tensor dA = new_floats(in.A, {warp_parts, d, n}), dD = new_floats(in.A, {in.D ? warp_parts : 0, d});
  Tensor dbias = new_floats(in.A, {in.delta_bias ? warp_parts : 0, d});
  ScanArgs& args = scan.args();
  args.grad_out = floats(dy);
  args.grad_last_state = floats(grad_last_state);
  args.carries = const_cast<float*>(floats(carries));
  args.dx = mutable_floats(du);
  args.ddelta = mutable_floats(ddelta);
  args.dprojections = mutable_floats(dfeatures);
  args.dA = mutable_floats(dA);
  args.dD = mutable_floats(dD);
  args.ddt_bias = mutable_floats(dbias);
  scan.run();
  const Tensor both = sum_partials(launcher, dfeatures, ScalarType::Float, {b, l, g, 2 * n}),
               none = new_floats(in.A, {0});
  return {transposed(du, u.scalar_type()),
          transposed(ddelta, delta.scalar_type()),
          sum_partials(launcher, dA, A.scalar_type(), {d, n}),
          feature_half(both, 0, n, B.scalar_type()),
          feature_half(both, n, n, C.scalar_type()),
          in.D ? sum_partials(launcher, dD, D->scalar_type(), {d}) : none,
          in.delta_bias ? sum_partials(launcher, dbias, delta_bias->scalar_type(), {d}) : none};
}

}  // namespace
}  // namespace mmvmamba

MMVMAMBA_REGISTER(MMVMAMBA_CUDA_LIBRARY, MMVMAMBA_CUDA_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&mmvmamba::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&mmvmamba::selective_scan_backward));
}
