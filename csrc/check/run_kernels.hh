// Calls of the scans of one instruction set, through the same structs as csrc/cpu/<op>.cpp.
#pragma once

#include <cstdlib>
#include <vector>

#include "scalar_scan.hh"

namespace check {

using mmvmamba::kChunk;
using mmvmamba::Kernels;
using mmvmamba::Scan2dArgs;
using mmvmamba::SelectiveScanArgs;

// How the tasks are dealt out, and what fresh memory holds: results may depend on neither.
struct Execution {
  std::vector<int64_t> cuts;  // first task of every range but the first, ascending
  unsigned char pattern;      // of scratch and outputs before the call; 255: NaN
};

template <typename T, typename Args>
void run_tasks(void (*kernel)(const Args&, int64_t, int64_t, T*), const Args& args, int64_t count, int64_t elements,
               const Execution& execution) {
  int64_t begin = 0;
  for (size_t i = 0; i <= execution.cuts.size(); ++i) {
    const int64_t end = i < execution.cuts.size() ? execution.cuts[i] : count;
    const size_t bytes = static_cast<size_t>(elements) * sizeof(T);
    void* memory = nullptr;  // std::aligned_alloc would not give any size
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    T* scratch = static_cast<T*>(memory);
    std::memset(scratch, execution.pattern, bytes);
    if (begin < end) kernel(args, begin, end, scratch);
    std::free(scratch);
    begin = end;
  }
}

inline int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

template <typename T>
mmvmamba::Input<T> input(const Buffer<T>& values, Element element, const Buffer<uint16_t>& bits) {
  if (element == Element::kSame) return {values.data(), element};
  return {bits.data(), element};
}

template <typename T>
std::vector<T> as_vector(const Buffer<T>& buffer) {
  return buffer.size() == 0 ? std::vector<T>() : std::vector<T>(buffer.data(), buffer.data() + buffer.size());
}

// Sum of `count` slices in order.
template <typename T>
std::vector<T> sum_slices(const Buffer<T>& slices, int64_t count) {
  std::vector<T> sum(count > 0 ? slices.size() / count : 0);
  for (int64_t part = 0; part < count; ++part)
    for (size_t i = 0; i < sum.size(); ++i) {
      const T value = slices[part * static_cast<int64_t>(sum.size()) + static_cast<int64_t>(i)];
      sum[i] = part == 0 ? value : sum[i] + value;
    }
  return sum;
}

template <typename T>
int64_t task_count(const Kernels<T>& kernels, const ScanProblem<T>& p) {
  const int64_t per_group = p.d / p.g;
  return p.b * p.g * parts(per_group, kernels.block_width(per_group));
}

template <typename T>
int64_t task_count(const Kernels<T>& kernels, const MapProblem<T>& p) {
  return p.b * parts(p.d, kernels.block_width(p.d));
}

// Forward twice, without and with saved states (the second must repeat the first), then backward.
template <typename T>
Results<T> run(const Kernels<T>& kernels, const ScanProblem<T>& p, const Execution& execution) {
  const int64_t per_group = p.d / p.g, blocks = parts(per_group, kernels.block_width(per_group));
  const int64_t tasks = task_count(kernels, p), scratch = kernels.workspace(p.n, 0);
  auto empty = [&](int64_t count) { return Buffer<T>(count, 0, execution.pattern); };
  Buffer<T> out = empty(p.b * p.d * p.l), last = empty(p.b * p.d * p.n), plain = empty(p.b * p.d * p.l);
  Buffer<T> carries = empty(p.b * parts(p.l, kChunk) * p.n * p.d);
  Buffer<T> du = empty(p.b * p.d * p.l), ddelta = empty(p.b * p.d * p.l), dA = empty(p.b * p.d * p.n);
  Buffer<T> dB = empty(blocks * p.b * p.g * p.n * p.l), dC = empty(blocks * p.b * p.g * p.n * p.l);
  Buffer<T> dD = empty(p.has_D ? p.b * p.d : 0), dbias = empty(p.has_bias ? p.b * p.d : 0);
  SelectiveScanArgs<T> args{};
  args.u = p.u.data();
  args.delta = p.delta.data();
  args.A = p.A.data();
  args.B = p.B.data();
  args.C = p.C.data();
  args.D = p.D.data();
  args.delta_bias = p.bias.data();
  args.batch = p.b;
  args.channels = p.d;
  args.length = p.l;
  args.states = p.n;
  args.groups = p.g;
  args.delta_softplus = p.softplus;
  args.last_state = last.data();
  args.out = plain.data();
  run_tasks(kernels.selective_scan, args, tasks, scratch, execution);
  args.out = out.data();
  args.carries = carries.data();
  run_tasks(kernels.selective_scan, args, tasks, scratch, execution);
  args.grad_out = p.grad_out.data();
  args.grad_last_state = p.grad_last_state.data();
  args.du = du.data();
  args.ddelta = ddelta.data();
  args.dA = dA.data();
  args.dD = p.has_D ? dD.data() : nullptr;
  args.dbias = p.has_bias ? dbias.data() : nullptr;
  args.dB = dB.data();
  args.dC = dC.data();
  run_tasks(kernels.selective_scan_backward, args, tasks, scratch, execution);
  Results<T> results = {
      {"out", Bound::kForward, as_vector(out)},       {"last_state", Bound::kForward, as_vector(last)},
      {"du", Bound::kStream, as_vector(du)},          {"ddelta", Bound::kStream, as_vector(ddelta)},
      {"dA", Bound::kParameter, sum_slices(dA, p.b)}, {"dB", Bound::kStream, sum_slices(dB, blocks)},
      {"dC", Bound::kStream, sum_slices(dC, blocks)}};
  if (p.has_D) results.push_back({"dD", Bound::kParameter, sum_slices(dD, p.b)});
  if (p.has_bias) results.push_back({"ddelta_bias", Bound::kParameter, sum_slices(dbias, p.b)});
  results.push_back({"out without carries", Bound::kForward, as_vector(plain)});
  return results;
}

template <typename T>
Results<T> run(const Kernels<T>& kernels, const MapProblem<T>& p, const Execution& execution) {
  const int64_t blocks = parts(p.d, kernels.block_width(p.d)), map = p.h * p.w, features = p.r + 2 * p.n;
  const int64_t tasks = task_count(kernels, p), scratch = kernels.workspace(p.n, p.r);
  auto empty = [&](int64_t count) { return Buffer<T>(count, 0, execution.pattern); };
  Buffer<T> out = empty(p.b * map * p.d), plain = empty(p.b * map * p.d), dx = empty(p.x.size());
  Buffer<T> carries = empty(p.b * p.k * parts(p.l, kChunk) * p.n * p.d);
  Buffer<T> dprojections = empty(blocks * p.b * map * p.k * features), ddt_weight = empty(p.b * p.k * p.d * p.r);
  Buffer<T> ddt_bias = empty(p.has_bias ? p.b * p.k * p.d : 0), dA = empty(p.b * p.k * p.d * p.n);
  Buffer<T> dD = empty(p.has_D ? p.b * p.k * p.d : 0);
  Scan2dArgs<T> args{};
  args.x = input(p.x, p.x_element, p.x_bits);
  args.projections = input(p.projections, p.projections_element, p.projections_bits);
  args.dt_weight = p.dt_weight.data();
  args.dt_bias = p.dt_bias.data();
  args.A = p.A.data();
  args.D = p.D.data();
  args.orders = p.has_permutation ? nullptr : p.orders.data();
  args.permutation = p.has_permutation ? p.permutation.data() : nullptr;
  args.batch = p.b;
  args.height = p.h;
  args.width = p.w;
  args.channels = p.d;
  args.routes = p.k;
  args.rank = p.r;
  args.states = p.n;
  args.length = p.l;
  args.x_pixel = p.maps() * p.d;
  args.x_route = p.per_route ? p.d : 0;
  args.delta_softplus = p.softplus;
  args.out = plain.data();
  run_tasks(kernels.scan2d, args, tasks, scratch, execution);
  args.out = out.data();
  args.carries = carries.data();
  run_tasks(kernels.scan2d, args, tasks, scratch, execution);
  args.grad_out = input(p.grad_out, p.grad_element, p.grad_bits);
  args.dx = dx.data();
  args.dprojections = dprojections.data();
  args.ddt_weight = ddt_weight.data();
  args.ddt_bias = p.has_bias ? ddt_bias.data() : nullptr;
  args.dA = dA.data();
  args.dD = p.has_D ? dD.data() : nullptr;
  run_tasks(kernels.scan2d_backward, args, tasks, scratch, execution);
  Results<T> results = {{"out", Bound::kForward, as_vector(out)},
                        {"dx", Bound::kStream, as_vector(dx)},
                        {"dprojections", Bound::kStream, sum_slices(dprojections, blocks)},
                        {"ddt_weight", Bound::kParameter, sum_slices(ddt_weight, p.b)},
                        {"dA", Bound::kParameter, sum_slices(dA, p.b)}};
  if (p.has_bias) results.push_back({"ddt_bias", Bound::kParameter, sum_slices(ddt_bias, p.b)});
  if (p.has_D) results.push_back({"dD", Bound::kParameter, sum_slices(dD, p.b)});
  results.push_back({"out without carries", Bound::kForward, as_vector(plain)});
  return results;
}

}  // namespace check
