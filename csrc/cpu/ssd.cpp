// mmvmamba::ssd_state, ssd_read, ssd_non_causal and ssd, with their backwards, on the CPU. Schemas and their meaning:
// mmvmamba/ops/library.py, mmvmamba/ops/ssd/. Shapes were checked in Python; what protects memory is checked again
// here.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "dispatch.h"

namespace mmvmamba {
namespace {

using Optional = std::optional<Tensor>;

// As the kernels read rows: converted on the fly where it is half precision, in place where the last axis lies
// together.
template <typename T>
Tensor as_strided_rows(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, "mmvmamba::ssd: x must be (b, l, k, p), projections (b, l, g, n)");
  const ScalarType type = tensor.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  const Tensor converted = type == kScalarType<T> || (half && sizeof(T) == sizeof(float))
                               ? tensor
                               : torch::stable::to(tensor, kScalarType<T>);
  return converted.stride(3) == 1 || converted.size(3) == 1 ? converted : torch::stable::contiguous(converted);
}

template <typename T>
RowView view_of(const Tensor& rows) {
  return {rows.const_data_ptr(), mmvmamba::rows<T>(rows).element, rows.stride(0), rows.stride(1), rows.stride(2),
          rows.size(3)};
}

// A contiguous tensor of type T; one that is as wanted costs no trip through the dispatcher.
template <typename T>
Tensor as_dense(const Tensor& tensor) {
  return tensor.scalar_type() == kScalarType<T> && tensor.is_contiguous() ? tensor : as_input<T>(tensor);
}

template <typename T>
Optional as_dense(const Optional& tensor) {
  return tensor ? Optional(as_dense<T>(*tensor)) : std::nullopt;
}

bool is_shape(const Tensor& tensor, std::vector<int64_t> shape) {
  return tensor.dim() == static_cast<int64_t>(shape.size()) &&
         std::equal(shape.begin(), shape.end(), tensor.sizes().begin());
}

// An output of a dtype that the kernels write: T and, beside float32, the halves; finish() converts to others.
template <typename T>
struct Output {
  Tensor tensor;
  ScalarType wanted;
  RowOutput rows;

  Output(const Tensor& like, int64_t b, int64_t l, int64_t heads, int64_t width, ScalarType dtype)
      : tensor(torch::stable::new_empty(like, {b, l, heads, width}, written(dtype))), wanted(dtype) {
    rows = {tensor.mutable_data_ptr(), mmvmamba::rows<T>(tensor).element, heads, width};
  }
  static ScalarType written(ScalarType dtype) {
    const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
    return half && sizeof(T) == sizeof(float) ? dtype : kScalarType<T>;
  }
  Tensor finish() const { return tensor.scalar_type() == wanted ? tensor : torch::stable::to(tensor, wanted); }
};

template <typename T>
Tensor dense_empty(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, kScalarType<T>);
}

template <typename T>
Tensor nothing(const Tensor& like) {
  return dense_empty<T>(like, {0});
}

template <typename T, typename Args>
void run(void (*kernel)(const Args&, int64_t, int64_t, T*), const Args& args, int64_t count, int64_t elements) {
  const size_t bytes = (elements * sizeof(T) + 63) / 64 * 64;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<T, decltype(&std::free)> memory(static_cast<T*>(std::aligned_alloc(64, bytes)), &std::free);
    STD_TORCH_CHECK(memory != nullptr, "mmvmamba: out of memory for ", bytes, " bytes of scratch");
    kernel(args, begin, end, memory.get());
  });
}

// ---- without decay ----

template <typename T>
struct Sizes {
  int64_t b, l, k, p, g, n;

  SsdArgs<T> args(bool blocked) const {
    STD_TORCH_CHECK(g > 0 && k > 0 && n > 0 && k % g == 0,
                    "mmvmamba::ssd: the groups of the projections must divide the heads, and n must be at least 1");
    // Ranges of a few blocks of rows, shorter where there would be too few to share. Decided by shapes alone.
    constexpr int64_t kLong = 240, kShort = 96, kEnough = 16;
    SsdArgs<T> a{};
    a.batch = b;
    a.length = l;
    a.heads = k;
    a.channels = p;
    a.groups = g;
    a.states = n;
    a.blocked = blocked;
    a.range = std::min(b * g * (l / kLong) >= kEnough ? kLong : kShort, std::max<int64_t>(l, 1));
    a.ranges = (l + a.range - 1) / a.range;
    return a;
  }
};

template <typename T>
void run_ranges(void (*kernel)(const SsdArgs<T>&, int64_t, int64_t, T*), const SsdArgs<T>& a) {
  if (a.channels > 0) run<T>(kernel, a, a.batch * a.ranges * a.groups, kernels<T>().ssd_workspace(a));
}

// Sums over all positions: those of the ranges, added up in order.
template <typename T>
Tensor run_state(SsdArgs<T> a, const Tensor& like) {
  Tensor partial = dense_empty<T>(like, {a.ranges, a.batch, a.heads, a.states, a.channels});
  a.partial_state = mutable_data<T>(partial);
  run_ranges(kernels<T>().ssd_state, a);
  return sum_partials<T>(partial);
}

// The inputs of the half that makes a state, kept alive while the kernels read them.
template <typename T>
struct Made {
  Tensor x, b_in;
  Optional weight;

  Made(const Tensor& x_, const Optional& weight_, const Tensor& b_in_)
      : x(as_strided_rows<T>(x_)), b_in(as_strided_rows<T>(b_in_)), weight(as_dense<T>(weight_)) {
    STD_TORCH_CHECK(is_shape(b_in, {x.size(0), x.size(1), b_in.size(2), b_in.size(3)}) &&
                        (!weight || is_shape(*weight, {x.size(0), x.size(1), x.size(2)})),
                    "mmvmamba::ssd: the shapes of the arguments do not belong together");
  }
  Sizes<T> sizes() const { return {x.size(0), x.size(1), x.size(2), x.size(3), b_in.size(2), b_in.size(3)}; }
  void fill(SsdArgs<T>& a) const {
    a.x = view_of<T>(x);
    a.b_in = view_of<T>(b_in);
    a.weight = data_or_null<T>(weight);
  }
};

template <typename T>
Tensor state_of(const Tensor& x, const Optional& weight, const Tensor& b_in, bool blocked) {
  const Made<T> made(x, weight, b_in);
  SsdArgs<T> a = made.sizes().args(blocked);
  made.fill(a);
  return run_state<T>(a, x);
}

Tensor ssd_state(const Tensor& x, const Optional& weight, const Tensor& b_in, bool blocked) {
  if (x.scalar_type() == ScalarType::Double) return state_of<double>(x, weight, b_in, blocked);
  return state_of<float>(x, weight, b_in, blocked);
}

// The gradients of the inputs of a state, once `a` has everything else.
template <typename T>
struct MadeGradients {
  Output<T> dx, db;
  Tensor dweight, dskip;

  MadeGradients(SsdArgs<T>& a, const Made<T>& made, ScalarType x_type, ScalarType b_type, bool skip)
      : dx(made.x, a.batch, a.length, a.heads, a.channels, x_type),
        db(made.x, a.batch, a.length, a.groups, a.states, b_type),
        dweight(made.weight ? dense_empty<T>(made.x, {a.batch, a.length, a.heads}) : nothing<T>(made.x)),
        dskip(dense_empty<T>(made.x, {skip ? a.ranges * a.batch : 0, a.heads})) {
    a.dx = dx.rows;
    a.db = db.rows;
    a.dweight = made.weight ? mutable_data<T>(dweight) : nullptr;
    a.dskip = skip ? mutable_data<T>(dskip) : nullptr;
  }
  // Without channels nothing runs that would write the sums over them.
  void clear() {
    for (const Tensor* tensor : {&db.tensor, &dweight, &dskip}) torch::stable::zero_(const_cast<Tensor&>(*tensor));
  }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Three state_gradients(const Tensor& grad_state_, const Tensor& x, const Optional& weight, const Tensor& b_in,
                      bool blocked) {
  const Made<T> made(x, weight, b_in);
  SsdArgs<T> a = made.sizes().args(blocked);
  made.fill(a);
  const Tensor grad_state = as_dense<T>(grad_state_);
  STD_TORCH_CHECK(is_shape(grad_state, {a.batch, a.heads, a.states, a.channels}),
                  "mmvmamba::ssd_state_backward: grad_state does not belong to the inputs");
  a.grad_state = data<T>(grad_state);
  MadeGradients<T> grads(a, made, x.scalar_type(), b_in.scalar_type(), false);
  if (a.channels == 0) grads.clear();
  run_ranges(kernels<T>().ssd_backward, a);
  return {grads.dx.finish(), weight ? as_gradient(grads.dweight, *weight) : grads.dweight, grads.db.finish()};
}

Three ssd_state_backward(const Tensor& grad_state, const Tensor& x, const Optional& weight, const Tensor& b_in,
                         bool blocked) {
  if (x.scalar_type() == ScalarType::Double) return state_gradients<double>(grad_state, x, weight, b_in, blocked);
  return state_gradients<float>(grad_state, x, weight, b_in, blocked);
}

// The inputs of the half that reads a state.
template <typename T>
struct Read {
  Tensor state, c_out;

  Read(const Tensor& state_, const Tensor& c_out_) : state(as_dense<T>(state_)), c_out(as_strided_rows<T>(c_out_)) {
    STD_TORCH_CHECK(state.dim() == 4 && c_out.size(0) == state.size(0) && c_out.size(3) == state.size(2),
                    "mmvmamba::ssd_read: state must be (b, k, n, p) and c_out (b, l, g, n)");
  }
  Sizes<T> sizes() const {
    return {state.size(0), c_out.size(1), state.size(1), state.size(3), c_out.size(2), state.size(2)};
  }
  void fill(SsdArgs<T>& a) const {
    a.state = data<T>(state);
    a.c_out = view_of<T>(c_out);
  }
};

template <typename T>
Tensor run_read(SsdArgs<T> a, const Tensor& like, ScalarType out_dtype) {
  Output<T> out(like, a.batch, a.length, a.heads, a.channels, out_dtype);
  a.out = out.rows;
  run_ranges(kernels<T>().ssd_read, a);
  return out.finish();
}

template <typename T>
Tensor read_of(const Tensor& state, const Tensor& c_out, bool blocked, ScalarType out_dtype) {
  const Read<T> read(state, c_out);
  SsdArgs<T> a = read.sizes().args(blocked);
  read.fill(a);
  return run_read<T>(a, state, out_dtype);
}

Tensor ssd_read(const Tensor& state, const Tensor& c_out, bool blocked, ScalarType out_dtype) {
  if (state.scalar_type() == ScalarType::Double) return read_of<double>(state, c_out, blocked, out_dtype);
  return read_of<float>(state, c_out, blocked, out_dtype);
}

template <typename T>
Tensor checked_grad(const Tensor& grad_out, const SsdArgs<T>& a) {
  const Tensor rows = as_strided_rows<T>(grad_out);
  STD_TORCH_CHECK(is_shape(rows, {a.batch, a.length, a.heads, a.channels}),
                  "mmvmamba::ssd: grad_out does not belong to the inputs");
  return rows;
}

using Two = std::tuple<Tensor, Tensor>;

template <typename T>
Two read_gradients(const Tensor& grad_out_, const Tensor& state, const Tensor& c_out, bool blocked) {
  const Read<T> read(state, c_out);
  SsdArgs<T> a = read.sizes().args(blocked);
  read.fill(a);
  const Tensor grad_out = checked_grad<T>(grad_out_, a);
  a.grad_out = view_of<T>(grad_out);
  Tensor dstate = run_state<T>(a, state);
  Output<T> dc(state, a.batch, a.length, a.groups, a.states, c_out.scalar_type());
  a.dc = dc.rows;
  if (a.channels == 0) torch::stable::zero_(dc.tensor);
  run_ranges(kernels<T>().ssd_backward, a);
  return {as_gradient(dstate, state), dc.finish()};
}

Two ssd_read_backward(const Tensor& grad_out, const Tensor& state, const Tensor& c_out, bool blocked) {
  if (state.scalar_type() == ScalarType::Double) return read_gradients<double>(grad_out, state, c_out, blocked);
  return read_gradients<float>(grad_out, state, c_out, blocked);
}

template <typename T>
Two non_causal(const Tensor& x, const Optional& weight, const Tensor& b_in, const Tensor& c_out, const Optional& skip_,
               bool blocked, ScalarType out_dtype) {
  const Made<T> made(x, weight, b_in);
  SsdArgs<T> a = made.sizes().args(blocked);
  made.fill(a);
  const Tensor state = run_state<T>(a, x);
  const Read<T> read(state, c_out);
  const Optional skip = as_dense<T>(skip_);
  STD_TORCH_CHECK(is_shape(c_out, {a.batch, a.length, a.groups, a.states}) && (!skip || is_shape(*skip, {a.heads})),
                  "mmvmamba::ssd_non_causal: the shapes of the arguments do not belong together");
  read.fill(a);
  a.skip = data_or_null<T>(skip);
  return {run_read<T>(a, x, out_dtype), state};
}

Two ssd_non_causal(const Tensor& x, const Optional& weight, const Tensor& b_in, const Tensor& c_out,
                   const Optional& skip, bool blocked, ScalarType out_dtype) {
  if (x.scalar_type() == ScalarType::Double)
    return non_causal<double>(x, weight, b_in, c_out, skip, blocked, out_dtype);
  return non_causal<float>(x, weight, b_in, c_out, skip, blocked, out_dtype);
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Five non_causal_gradients(const Tensor& grad_out_, const Tensor& x, const Optional& weight, const Tensor& b_in,
                          const Tensor& c_out, const Optional& skip_, bool blocked, const Tensor& state) {
  const Made<T> made(x, weight, b_in);
  SsdArgs<T> a = made.sizes().args(blocked);
  made.fill(a);
  const Read<T> read(state, c_out);
  read.fill(a);
  const Optional skip = as_dense<T>(skip_);
  STD_TORCH_CHECK(is_shape(c_out, {a.batch, a.length, a.groups, a.states}) && (!skip || is_shape(*skip, {a.heads})) &&
                      is_shape(state, {a.batch, a.heads, a.states, a.channels}),
                  "mmvmamba::ssd_non_causal_backward: the shapes of the arguments do not belong together");
  a.skip = data_or_null<T>(skip);
  const Tensor grad_out = checked_grad<T>(grad_out_, a);
  a.grad_out = view_of<T>(grad_out);
  const Tensor grad_state = run_state<T>(a, x);
  a.grad_state = data<T>(grad_state);
  MadeGradients<T> grads(a, made, x.scalar_type(), b_in.scalar_type(), skip.has_value());
  Output<T> dc(x, a.batch, a.length, a.groups, a.states, c_out.scalar_type());
  a.dc = dc.rows;
  if (a.channels == 0) {
    grads.clear();
    torch::stable::zero_(dc.tensor);
  }
  run_ranges(kernels<T>().ssd_backward, a);
  return {grads.dx.finish(), weight ? as_gradient(grads.dweight, *weight) : grads.dweight, grads.db.finish(),
          dc.finish(), skip_ ? as_gradient(sum_partials<T>(grads.dskip), *skip_) : nothing<T>(x)};
}

Five ssd_non_causal_backward(const Tensor& grad_out, const Tensor& x, const Optional& weight, const Tensor& b_in,
                             const Tensor& c_out, const Optional& skip, bool blocked, const Tensor& state) {
  if (x.scalar_type() == ScalarType::Double)
    return non_causal_gradients<double>(grad_out, x, weight, b_in, c_out, skip, blocked, state);
  return non_causal_gradients<float>(grad_out, x, weight, b_in, c_out, skip, blocked, state);
}

// ---- with decay ----

template <typename T>
struct Scan {
  Tensor x, dt, decay, b_in, c_out;
  Optional skip, dt_bias, initial_state;
  SsdScanArgs<T> args{};
  int64_t tasks = 0, chunks = 0;

  Scan(const Tensor& x_, const Tensor& dt_, const Tensor& decay_, const Tensor& b_in_, const Tensor& c_out_,
       const Optional& skip_, const Optional& dt_bias_, const Optional& initial_state_, bool dt_softplus, bool blocked)
      : x(as_strided_rows<T>(x_)),
        dt(as_dense<T>(dt_)),
        decay(as_dense<T>(decay_)),
        b_in(as_strided_rows<T>(b_in_)),
        c_out(as_strided_rows<T>(c_out_)),
        skip(as_dense<T>(skip_)),
        dt_bias(as_dense<T>(dt_bias_)),
        initial_state(as_dense<T>(initial_state_)) {
    auto& a = args;
    a.batch = x.size(0);
    a.length = x.size(1);
    a.heads = x.size(2);
    a.channels = x.size(3);
    a.groups = b_in.size(2);
    a.states = b_in.size(3);
    STD_TORCH_CHECK(a.groups > 0 && a.heads > 0 && a.states > 0 && a.heads % a.groups == 0,
                    "mmvmamba::ssd: the groups of the projections must divide the heads, and n must be at least 1");
    STD_TORCH_CHECK(is_shape(dt, {a.batch, a.length, a.heads}) && is_shape(decay, {a.heads}) &&
                        is_shape(b_in, {a.batch, a.length, a.groups, a.states}) &&
                        is_shape(c_out, {a.batch, a.length, a.groups, a.states}) &&
                        (!skip || is_shape(*skip, {a.heads})) && (!dt_bias || is_shape(*dt_bias, {a.heads})) &&
                        (!initial_state || is_shape(*initial_state, {a.batch, a.heads, a.states, a.channels})),
                    "mmvmamba::ssd: the shapes of the arguments do not belong together");
    a.blocked = blocked;
    a.softplus = dt_softplus;
    a.x = view_of<T>(x);
    a.b_in = view_of<T>(b_in);
    a.c_out = view_of<T>(c_out);
    a.dt = data<T>(dt);
    a.decay = data<T>(decay);
    a.skip = data_or_null<T>(skip);
    a.dt_bias = data_or_null<T>(dt_bias);
    a.initial_state = data_or_null<T>(initial_state);
    // Heads of one task share a product, but tasks should be many. Decided by shapes alone.
    constexpr int64_t kEnough = 16;
    const int64_t per_group = a.heads / a.groups;
    a.task_heads = kMaxTaskHeads;
    while (a.task_heads > 1 && a.batch * a.groups * (per_group / a.task_heads) < kEnough) a.task_heads /= 2;
    a.parts = (per_group + a.task_heads - 1) / a.task_heads;
    tasks = a.channels > 0 ? a.batch * a.groups * a.parts : 0;
    chunks = (a.length + kSsdChunk - 1) / kSsdChunk;
  }

  Tensor empty(std::vector<int64_t> shape) const { return dense_empty<T>(x, shape); }
};

template <typename T>
Three scan(Scan<T> in, ScalarType out_dtype, bool save_carries) {
  auto& a = in.args;
  Output<T> out(in.x, a.batch, a.length, a.heads, a.channels, out_dtype);
  Tensor last_state = in.empty({a.batch, a.heads, a.states, a.channels});
  Tensor carries = save_carries ? in.empty({a.batch, in.chunks, a.heads, a.states, a.channels}) : in.empty({0});
  a.out = out.rows;
  a.last_state = mutable_data<T>(last_state);
  a.carries = save_carries ? mutable_data<T>(carries) : nullptr;
  run<T>(kernels<T>().ssd_scan, a, in.tasks, kernels<T>().ssd_scan_workspace(a, false));
  return {out.finish(), last_state, carries};
}

Three ssd(const Tensor& x, const Tensor& dt, const Tensor& decay, const Tensor& b_in, const Tensor& c_out,
          const Optional& skip, const Optional& dt_bias, const Optional& initial_state, bool dt_softplus, bool blocked,
          ScalarType out_dtype, bool save_carries) {
  if (x.scalar_type() == ScalarType::Double)
    return scan<double>({x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked}, out_dtype,
                        save_carries);
  return scan<float>({x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked}, out_dtype,
                     save_carries);
}

using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Eight scan_gradients(const Optional& grad_out_, const Optional& grad_last_, Scan<T> in, const Tensor& carries_,
                     ScalarType x_type) {
  auto& a = in.args;
  const Optional grad_out = grad_out_ ? Optional(as_strided_rows<T>(*grad_out_)) : std::nullopt;
  const Optional grad_last = as_dense<T>(grad_last_);
  const Tensor carries = as_dense<T>(carries_);
  STD_TORCH_CHECK((!grad_out || is_shape(*grad_out, {a.batch, a.length, a.heads, a.channels})) &&
                      (!grad_last || is_shape(*grad_last, {a.batch, a.heads, a.states, a.channels})) &&
                      is_shape(carries, {a.batch, in.chunks, a.heads, a.states, a.channels}),
                  "mmvmamba::ssd_backward: grad_out, grad_last_state or carries do not belong to the inputs");
  Output<T> dx(in.x, a.batch, a.length, a.heads, a.channels, x_type);
  Tensor ddt = in.empty({a.batch, a.length, a.heads});
  Tensor db = in.empty({a.parts, a.batch, a.length, a.groups, a.states});
  Tensor dc = in.empty({a.parts, a.batch, a.length, a.groups, a.states});
  Tensor ddecay = in.empty({a.batch, a.heads});
  Tensor dskip = in.empty({in.skip ? a.batch : 0, a.heads}), dbias = in.empty({in.dt_bias ? a.batch : 0, a.heads});
  Tensor dinitial = in.initial_state ? in.empty({a.batch, a.heads, a.states, a.channels}) : in.empty({0});
  if (in.tasks == 0)
    for (Tensor* tensor : {&ddt, &db, &dc, &ddecay, &dskip, &dbias}) torch::stable::zero_(*tensor);
  a.carries = const_cast<T*>(data<T>(carries));
  if (grad_out) a.grad_out = view_of<T>(*grad_out);
  a.grad_last_state = data_or_null<T>(grad_last);
  a.dx = dx.rows;
  a.ddt = mutable_data<T>(ddt);
  a.db = mutable_data<T>(db);
  a.dc = mutable_data<T>(dc);
  a.ddecay = mutable_data<T>(ddecay);
  a.dskip = in.skip ? mutable_data<T>(dskip) : nullptr;
  a.dbias = in.dt_bias ? mutable_data<T>(dbias) : nullptr;
  a.dinitial = in.initial_state ? mutable_data<T>(dinitial) : nullptr;
  run<T>(kernels<T>().ssd_scan_backward, a, in.tasks, kernels<T>().ssd_scan_workspace(a, true));
  return {dx.finish(),
          ddt,
          sum_partials<T>(ddecay),
          sum_partials<T>(db),
          sum_partials<T>(dc),
          in.skip ? sum_partials<T>(dskip) : in.empty({0}),
          in.dt_bias ? sum_partials<T>(dbias) : in.empty({0}),
          dinitial};
}

Eight ssd_backward(const Optional& grad_out, const Optional& grad_last_state, const Tensor& x, const Tensor& dt,
                   const Tensor& decay, const Tensor& b_in, const Tensor& c_out, const Optional& skip,
                   const Optional& dt_bias, const Optional& initial_state, bool dt_softplus, bool blocked,
                   const Tensor& carries) {
  auto [dx, ddt, ddecay, db, dc, dskip, dbias, dinitial] =
      x.scalar_type() == ScalarType::Double
          ? scan_gradients<double>(grad_out, grad_last_state,
                                   {x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked},
                                   carries, x.scalar_type())
          : scan_gradients<float>(grad_out, grad_last_state,
                                  {x, dt, decay, b_in, c_out, skip, dt_bias, initial_state, dt_softplus, blocked},
                                  carries, x.scalar_type());
  return {dx,
          as_gradient(ddt, dt),
          as_gradient(ddecay, decay),
          as_gradient(db, b_in),
          as_gradient(dc, c_out),
          skip ? as_gradient(dskip, *skip) : dskip,
          dt_bias ? as_gradient(dbias, *dt_bias) : dbias,
          initial_state ? as_gradient(dinitial, *initial_state) : dinitial};
}

}  // namespace
}  // namespace mmvmamba

STABLE_TORCH_LIBRARY_IMPL(mmvmamba, CPU, m) {
  m.impl("ssd_state", TORCH_BOX(&mmvmamba::ssd_state));
  m.impl("ssd_state_backward", TORCH_BOX(&mmvmamba::ssd_state_backward));
  m.impl("ssd_read", TORCH_BOX(&mmvmamba::ssd_read));
  m.impl("ssd_read_backward", TORCH_BOX(&mmvmamba::ssd_read_backward));
  m.impl("ssd_non_causal", TORCH_BOX(&mmvmamba::ssd_non_causal));
  m.impl("ssd_non_causal_backward", TORCH_BOX(&mmvmamba::ssd_non_causal_backward));
  m.impl("ssd", TORCH_BOX(&mmvmamba::ssd));
  m.impl("ssd_backward", TORCH_BOX(&mmvmamba::ssd_backward));
}
