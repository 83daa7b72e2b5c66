// mmvmamba::scan2d and its backward on the CPU. Schemas and their meaning: mmvmamba/ops/library.py,
// mmvmamba/ops/scan2d/. Shapes were checked in Python; what protects memory is checked again here.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dispatch.h"

namespace mmvmamba {
namespace {

// The routes as given by the caller: codes, or a permutation whose entries are pixels of the map.
struct Routes {
  std::vector<int64_t> orders;
  std::optional<Tensor> permutation;

  Routes(std::vector<int64_t> orders_, const std::optional<Tensor>& permutation_) : orders(std::move(orders_)) {
    if (!permutation_.has_value()) {
      for (const int64_t order : orders)
        STD_TORCH_CHECK(order >= kRow && order <= kColumnReversed, "mmvmamba::scan2d: unknown scan order ", order);
      return;
    }
    STD_TORCH_CHECK(permutation_->scalar_type() == ScalarType::Long && permutation_->dim() == 2,
                    "mmvmamba::scan2d: the permutation must be int64 (k, l)");
    permutation = torch::stable::contiguous(*permutation_);
  }
};

// The inputs as the kernels read them, kept alive meanwhile.
template <typename T>
struct Inputs {
  Tensor x, projections, dt_weight, A;
  std::optional<Tensor> dt_bias, D;
  const Routes& routes;
  Scan2dArgs<T> args{};
  int64_t blocks = 0, tasks = 0, chunks = 0;

  Inputs(const Tensor& x_, const Tensor& projections_, const Tensor& dt_weight_, const std::optional<Tensor>& dt_bias_,
         const Tensor& A_, const std::optional<Tensor>& D_, const Routes& routes_, bool delta_softplus)
      : x(as_rows<T>(x_)),
        projections(as_rows<T>(projections_)),
        dt_weight(as_input<T>(dt_weight_)),
        A(as_input<T>(A_)),
        dt_bias(as_input<T>(dt_bias_)),
        D(as_input<T>(D_)),
        routes(routes_) {
    const bool per_route = x.dim() == 5;
    STD_TORCH_CHECK((x.dim() == 4 || per_route) && A.dim() == 3 && dt_weight.dim() == 3,
                    "mmvmamba::scan2d: x must be (b, h, w, d) or (b, h, w, k, d), A (k, d, n), dt_weight (k, d, r)");
    args.batch = x.size(0);
    args.height = x.size(1);
    args.width = x.size(2);
    args.channels = x.size(x.dim() - 1);
    args.routes = A.size(0);
    STD_TORCH_CHECK(!per_route || x.size(3) == args.routes,
                    "mmvmamba::scan2d: one map of x (b, h, w, k, d) for each route of A is needed");
    args.x_pixel = per_route ? args.routes * args.channels : args.channels;
    args.x_route = per_route ? args.channels : 0;
    args.states = A.size(2);
    args.rank = dt_weight.size(2);
    args.delta_softplus = delta_softplus;
    STD_TORCH_CHECK(args.routes > 0 && args.states > 0, "mmvmamba::scan2d: A (k, d, n) must have k >= 1 and n >= 1");
    const int64_t pixels = args.height * args.width, parameters = args.routes * args.channels;
    STD_TORCH_CHECK(A.numel() == parameters * args.states && dt_weight.numel() == parameters * args.rank &&
                        projections.numel() == args.batch * pixels * args.routes * (args.rank + 2 * args.states) &&
                        (!dt_bias || dt_bias->numel() == parameters) && (!D || D->numel() == parameters),
                    "mmvmamba::scan2d: the shapes of the arguments do not belong together");
    set_routes(pixels);
    args.x = rows<T>(x);
    args.projections = rows<T>(projections);
    args.dt_weight = data<T>(dt_weight);
    args.dt_bias = data_or_null<T>(dt_bias);
    args.A = data<T>(A);
    args.D = data_or_null<T>(D);
    const int64_t width = kernels<T>().block_width(args.channels);
    blocks = (args.channels + width - 1) / width;
    tasks = args.batch * blocks;
    chunks = (args.length + kChunk - 1) / kChunk;
  }

  void set_routes(int64_t pixels) {
    args.length = pixels;
    if (!routes.permutation) {
      STD_TORCH_CHECK(static_cast<int64_t>(routes.orders.size()) == args.routes,
                      "mmvmamba::scan2d: one scan order for each route of A is needed");
      args.orders = routes.orders.data();
      return;
    }
    STD_TORCH_CHECK(routes.permutation->size(0) == args.routes,
                    "mmvmamba::scan2d: one row of the permutation for each route of A is needed");
    args.length = routes.permutation->size(1);
    args.permutation = data<int64_t>(*routes.permutation);
    for (int64_t i = 0; i < args.routes * args.length; ++i)
      STD_TORCH_CHECK(args.permutation[i] >= 0 && args.permutation[i] < pixels,
                      "mmvmamba::scan2d: the permutation holds pixel ", args.permutation[i], ", the map has ", pixels);
  }

  Tensor empty(std::vector<int64_t> shape) const { return torch::stable::new_empty(A, shape); }
};

template <typename T>
std::tuple<Tensor, Tensor> forward(Inputs<T> in, ScalarType out_dtype, bool save_carries) {
  auto& a = in.args;
  Tensor out = in.empty({a.batch, a.height, a.width, a.channels});
  Tensor carries = save_carries ? in.empty({a.batch, a.routes, in.chunks, a.states, a.channels}) : in.empty({0});
  a.out = mutable_data<T>(out);
  a.carries = save_carries ? mutable_data<T>(carries) : nullptr;
  run_tasks<T>(kernels<T>().scan2d, a, in.tasks, a.rank);
  return {torch::stable::to(out, out_dtype), carries};
}

std::tuple<Tensor, Tensor> scan2d(const Tensor& x, const Tensor& projections, const Tensor& dt_weight,
                                  const std::optional<Tensor>& dt_bias, const Tensor& A, const std::optional<Tensor>& D,
                                  std::vector<int64_t> orders, const std::optional<Tensor>& permutation,
                                  bool delta_softplus, ScalarType out_dtype, bool save_carries) {
  const Routes routes(std::move(orders), permutation);
  if (x.scalar_type() == ScalarType::Double)
    return forward<double>({x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus}, out_dtype, save_carries);
  return forward<float>({x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus}, out_dtype, save_carries);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Tensor& grad_out_, Inputs<T> in, const Tensor& carries_) {
  auto& a = in.args;
  const Tensor grad_out = as_rows<T>(grad_out_), carries = as_input<T>(carries_);
  STD_TORCH_CHECK(grad_out.numel() == a.batch * a.height * a.width * a.channels &&
                      carries.numel() == a.batch * a.routes * in.chunks * a.states * a.channels,
                  "mmvmamba::scan2d_backward: grad_out or carries do not belong to the inputs");
  Tensor dx = in.empty(std::vector<int64_t>(in.x.sizes().begin(), in.x.sizes().end()));
  Tensor dprojections = in.empty({in.blocks, a.batch, a.height, a.width, a.routes, a.rank + 2 * a.states});
  Tensor ddt_weight = in.empty({a.batch, a.routes, a.channels, a.rank});
  Tensor dA = in.empty({a.batch, a.routes, a.channels, a.states});
  Tensor ddt_bias = in.empty({in.dt_bias ? a.batch : 0, a.routes, a.channels});
  Tensor dD = in.empty({in.D ? a.batch : 0, a.routes, a.channels});
  a.carries = const_cast<T*>(data<T>(carries));
  a.grad_out = rows<T>(grad_out);
  a.dx = mutable_data<T>(dx);
  a.dprojections = mutable_data<T>(dprojections);
  a.ddt_weight = mutable_data<T>(ddt_weight);
  a.dA = mutable_data<T>(dA);
  a.ddt_bias = in.dt_bias ? mutable_data<T>(ddt_bias) : nullptr;
  a.dD = in.D ? mutable_data<T>(dD) : nullptr;
  run_tasks<T>(kernels<T>().scan2d_backward, a, in.tasks, a.rank);
  return {dx,
          sum_partials<T>(dprojections),
          sum_partials<T>(ddt_weight),
          in.dt_bias ? sum_partials<T>(ddt_bias) : in.empty({0}),
          sum_partials<T>(dA),
          in.D ? sum_partials<T>(dD) : in.empty({0})};
}

Gradients scan2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& projections, const Tensor& dt_weight,
                          const std::optional<Tensor>& dt_bias, const Tensor& A, const std::optional<Tensor>& D,
                          std::vector<int64_t> orders, const std::optional<Tensor>& permutation, bool delta_softplus,
                          const Tensor& carries) {
  const Routes routes(std::move(orders), permutation);
  auto [dx, dprojections, ddt_weight, ddt_bias, dA, dD] =
      x.scalar_type() == ScalarType::Double
          ? backward<double>(grad_out, {x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus}, carries)
          : backward<float>(grad_out, {x, projections, dt_weight, dt_bias, A, D, routes, delta_softplus}, carries);
  return {as_gradient(dx, x),
          as_gradient(dprojections, projections),
          as_gradient(ddt_weight, dt_weight),
          dt_bias ? as_gradient(ddt_bias, *dt_bias) : ddt_bias,
          as_gradient(dA, A),
          D ? as_gradient(dD, *D) : dD};
}

}  // namespace
}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("scan2d", TORCH_BOX(&mmvmamba::scan2d));
  m.impl("scan2d_backward", TORCH_BOX(&mmvmamba::scan2d_backward));
}
