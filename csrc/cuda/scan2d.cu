// mmvmamba::scan2d and its backward on CUDA devices. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/scan2d/. Shapes were checked in Python; what protects memory is checked again here.

#include <algorithm>
#include <tuple>

#include "launch.h"

namespace mmvmamba {
namespace {

constexpr const char* kOp = "mmvmamba::scan2d";

// The inputs as the kernels read them, kept alive meanwhile.
struct Inputs {
  ScalarType element;  // what the kernels read
  Tensor x, projections, dt_weight, A;
  OptionalTensor dt_bias, D, permutation;
  ScanArgs args{};
  Problem problem{};
  int64_t pixels = 0, length = 0;

  Inputs(const Tensor& x_, const Tensor& projections_, const Tensor& dt_weight_, const OptionalTensor& dt_bias_,
         const Tensor& A_, const OptionalTensor& D_, const std::vector<int64_t>& orders,
         const OptionalTensor& permutation_, bool delta_softplus)
      : element(stream_type({x_, projections_}, kOp)),
        x(as_type(x_, element)),
        projections(as_type(projections_, element)),
        dt_weight(as_type(dt_weight_, ScalarType::Float)),
        A(as_type(A_, ScalarType::Float)),
        dt_bias(as_type(dt_bias_, ScalarType::Float)),
        D(as_type(D_, ScalarType::Float)) {
    check_devices(x_, {projections_, dt_weight_, dt_bias_, A_, D_, permutation_}, kOp);
    check_shapes();
    const bool per_route = x.dim() == 5;
    const int64_t channels = A.size(1), routes = A.size(0);
    pixels = x.size(1) * x.size(2);
    length = pixels;
    set_routes(orders, permutation_, routes);
    args.batch = checked_int(x.size(0), kOp, "the batch");
    args.height = checked_int(x.size(1), kOp, "the height");
    args.width = checked_int(x.size(2), kOp, "the width");
    args.pixels = checked_int(pixels, kOp, "the number of pixels");
    args.length = checked_int(length, kOp, "the length of the routes");
    args.channels = args.group_channels = checked_int(channels, kOp, "the number of channels");
    args.x_pixel = checked_int(per_route ? routes * channels : channels, kOp, "the size of a pixel");
    args.x_route = per_route ? args.channels : 0;
    args.groups = 1;
    args.routes = args.slots = static_cast<int>(routes);
    args.states = checked_int(A.size(2), kOp, "n");
    args.rank = checked_int(dt_weight.size(2), kOp, "r");
    args.features = args.rank + 2 * args.states;
    checked_int(routes * args.features * static_cast<int64_t>(sizeof(float)), kOp, "the size of a pixel's projections");
    args.chunks = (args.length + kChunk - 1) / kChunk;
    args.by_visit = permutation.has_value();
    args.delta_softplus = delta_softplus;
    args.by_height = make_divider(std::max(1, args.height));
    args.x = x.const_data_ptr();
    args.projections = projections.const_data_ptr();
    args.dt_weight = floats(dt_weight);
    args.dt_bias = floats(dt_bias);
    args.A = floats(A);
    args.D = floats(D);
    set_problem();
  }

  void check_shapes() const {
    STD_TORCH_CHECK((x.dim() == 4 || x.dim() == 5) && A.dim() == 3 && dt_weight.dim() == 3, kOp,
                    ": x must be (b, h, w, d) or (b, h, w, k, d), A (k, d, n), dt_weight (k, d, r)");
    STD_TORCH_CHECK(x.size(x.dim() - 1) == A.size(1) && (x.dim() == 4 || x.size(3) == A.size(0)), kOp,
                    ": x (b, h, w, d) or (b, h, w, k, d) does not belong to A (k, d, n)");
    const int64_t parameters = A.size(0) * A.size(1), n = A.size(2), r = dt_weight.size(2);
    STD_TORCH_CHECK(A.size(0) > 0 && A.size(0) <= kMaxRoutes && n > 0, kOp,
                    ": A (k, d, n) must have 1 <= k <= ", kMaxRoutes, " routes and n >= 1");
    STD_TORCH_CHECK(A.numel() == parameters * n && dt_weight.numel() == parameters * r &&
                        projections.numel() == x.size(0) * x.size(1) * x.size(2) * A.size(0) * (r + 2 * n) &&
                        (!dt_bias || dt_bias->numel() == parameters) && (!D || D->numel() == parameters),
                    kOp, ": the shapes of the arguments do not belong together");
  }

  void set_routes(const std::vector<int64_t>& orders, const OptionalTensor& permutation_, int64_t routes) {
    if (permutation_.has_value()) {
      STD_TORCH_CHECK(permutation_->scalar_type() == ScalarType::Long && permutation_->dim() == 2 &&
                          permutation_->size(0) == routes,
                      kOp, ": the permutation must be int64 (k, l)");
      permutation = torch::stable::contiguous(*permutation_);
      length = permutation->size(1);
      args.permutation = static_cast<const int64_t*>(permutation->const_data_ptr());
      for (int64_t route = 0; route < routes; ++route) args.orders[route] = kPermuted;
      return;
    }
    STD_TORCH_CHECK(static_cast<int64_t>(orders.size()) == routes, kOp,
                    ": one scan order for each route of A is needed");
    for (int64_t route = 0; route < routes; ++route) {
      STD_TORCH_CHECK(orders[route] >= kRow && orders[route] <= kColumnReversed, kOp, ": unknown scan order ",
                      orders[route]);
      args.orders[route] = static_cast<uint8_t>(orders[route]);
      const bool column = orders[route] == kColumn || orders[route] == kColumnReversed;
      (column ? has_columns : has_rows) = true;
    }
  }

  void set_problem() {
    problem.batch = args.batch;
    problem.groups = 1;
    problem.group_channels = args.channels;
    problem.length = args.length;
    problem.states = args.states;
    problem.rank = args.rank;
    problem.features = args.features;
    problem.element_size = element == ScalarType::Float ? 4 : 2;
    problem.projected = true;
    problem.by_visit = args.by_visit;
    problem.softplus = args.delta_softplus;
    problem.pairs = args.channels % 2 == 0 && is_aligned(args.x, 2 * problem.element_size);
    problem.even_features = args.features % 2 == 0 && is_aligned(args.projections, 2 * problem.element_size);
    // The kernels for one state read one map.
    problem.small = pixels * args.channels < (int64_t{1} << 32) && args.x_route == 0;
    problem.both_axes = has_rows && has_columns;
  }

  // Of a map for each route the gradients are not merged.
  void keep_visits_apart() {
    if (args.x_route == 0) return;
    args.at_pixel = !args.by_visit;
    args.by_visit = problem.by_visit = true;
  }

  bool is_empty() const { return x.numel() == 0 || length == 0; }
  bool has_rows = false, has_columns = false;
};

std::tuple<Tensor, Tensor> scan2d(const Tensor& x, const Tensor& projections, const Tensor& dt_weight,
                                  const OptionalTensor& dt_bias, const Tensor& A, const OptionalTensor& D,
                                  std::vector<int64_t> orders, const OptionalTensor& permutation, bool delta_softplus,
                                  ScalarType out_dtype, bool save_carries) {
  const Launcher launcher(x);
  Inputs in(x, projections, dt_weight, dt_bias, A, D, orders, permutation, delta_softplus);
  const ScanArgs& a = in.args;
  Tensor carries =
      save_carries ? new_floats(in.A, {a.batch, a.routes, a.chunks, a.states, a.channels}) : new_floats(in.A, {0});
  if (in.is_empty()) return {zeros(in.x, {a.batch, a.height, a.width, a.channels}, out_dtype), carries};
  Scan scan(launcher, in.A, in.element, a, in.problem, false, kOp);
  const std::vector<int64_t> shape{a.batch, a.height, a.width, a.channels};
  Tensor out = a.by_visit ? new_floats(in.A, {a.batch, a.routes, a.length, a.channels}) : new_floats(in.A, shape);
  scan.args().out = mutable_floats(out);
  scan.args().carries = mutable_floats(carries);
  scan.run();
  if (a.by_visit)
    out = torch::stable::view(
        merge_visits(launcher, out, Visits(launcher, *in.permutation, a.pixels), out_dtype, a.pixels), shape);
  return {torch::stable::to(out, out_dtype), carries};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients zero_gradients(const Inputs& in, const Tensor& x, const Tensor& projections, const Tensor& dt_weight,
                         const OptionalTensor& dt_bias, const Tensor& A, const OptionalTensor& D) {
  const Tensor none = new_floats(in.A, {0});
  return {zeros_like(x), zeros_like(projections),  zeros_like(dt_weight), dt_bias ? zeros_like(*dt_bias) : none,
          zeros_like(A), D ? zeros_like(*D) : none};
}

Gradients scan2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& projections, const Tensor& dt_weight,
                          const OptionalTensor& dt_bias, const Tensor& A, const OptionalTensor& D,
                          std::vector<int64_t> orders, const OptionalTensor& permutation, bool delta_softplus,
                          const Tensor& carries_) {
  const Launcher launcher(x);
  Inputs in(x, projections, dt_weight, dt_bias, A, D, orders, permutation, delta_softplus);
  if (in.is_empty()) return zero_gradients(in, x, projections, dt_weight, dt_bias, A, D);
  check_devices(x, {grad_out, carries_}, kOp);
  in.keep_visits_apart();
  const ScanArgs& a = in.args;
  const Tensor dy = as_type(grad_out, ScalarType::Float), carries = as_type(carries_, ScalarType::Float);
  const int64_t b = a.batch, k = a.routes, d = a.channels, n = a.states, r = a.rank;
  STD_TORCH_CHECK(dy.numel() == b * a.pixels * d && carries.numel() == b * k * a.chunks * n * d, kOp,
                  "_backward: grad_out or carries do not belong to the inputs");
  in.problem.pairs = in.problem.pairs && is_aligned(dy.const_data_ptr(), 8);
  Scan scan(launcher, in.A, in.element, a, in.problem, true, kOp);
  const int64_t parts = scan.parts(), warp_parts = scan.warp_parts(), rows = a.by_visit ? a.length : a.pixels;
  const bool apart = a.x_route != 0;
  Tensor dx = new_floats(in.A, apart        ? std::vector<int64_t>{1, b, rows, k, d}
                               : a.by_visit ? std::vector<int64_t>{b, k, a.length, d}
                                            : std::vector<int64_t>{b, a.height, a.width, d});
  Tensor dprojections = new_floats(in.A, {scan.plan().tiles, b, rows, k, a.features});
  Tensor ddt_weight = new_floats(in.A, {parts, k, d, r}), dA = new_floats(in.A, {warp_parts, k, d, n});
  Tensor ddt_bias = new_floats(in.A, {in.dt_bias ? parts : 0, k, d}),
         dD = new_floats(in.A, {in.D ? warp_parts : 0, k, d});
  ScanArgs& args = scan.args();
  args.grad_out = floats(dy);
  args.carries = const_cast<float*>(floats(carries));
  args.dx = mutable_floats(dx);
  args.dprojections = mutable_floats(dprojections);
  args.ddt_weight = mutable_floats(ddt_weight);
  args.ddt_bias = mutable_floats(ddt_bias);
  args.dA = mutable_floats(dA);
  args.dD = mutable_floats(dD);
  scan.run();
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), features{b, a.height, a.width, k, a.features};
  const ScalarType type = x.scalar_type(), feature_type = projections.scalar_type();
  if (a.by_visit && !a.at_pixel) {
    const Visits lists(launcher, *in.permutation, a.pixels);
    dx = torch::stable::view(
        apart ? merge_slots(launcher, dx, lists, type, a.pixels) : merge_visits(launcher, dx, lists, type, a.pixels),
        shape);
    dprojections = torch::stable::view(merge_slots(launcher, dprojections, lists, feature_type, a.pixels), features);
  } else {
    dx = torch::stable::to(torch::stable::view(dx, shape), type);
    dprojections = sum_partials(launcher, dprojections, feature_type, features);
  }
  const Tensor none = new_floats(in.A, {0});
  return {dx,
          dprojections,
          sum_partials(launcher, ddt_weight, dt_weight.scalar_type(), {k, d, r}),
          in.dt_bias ? sum_partials(launcher, ddt_bias, dt_bias->scalar_type(), {k, d}) : none,
          sum_partials(launcher, dA, A.scalar_type(), {k, d, n}),
          in.D ? sum_partials(launcher, dD, D->scalar_type(), {k, d}) : none};
}

}  // namespace
}  // namespace mmvmamba

MMVMAMBA_REGISTER(MMVMAMBA_CUDA_LIBRARY, MMVMAMBA_CUDA_KEY, m) {
  m.impl("scan2d", TORCH_BOX(&mmvmamba::scan2d));
  m.impl("scan2d_backward", TORCH_BOX(&mmvmamba::scan2d_backward));
}
