// The causal convolution: random problems, a plain scalar version, and calls of the kernels of one instruction set.
#pragma once

#include <string>
#include <vector>

#include "depthwise_conv.hh"

namespace check {

using mmvmamba::CausalConvArgs;
using mmvmamba::SequenceView;

template <typename T>
struct CausalProblem {
  int64_t b, l, d, k, taps, bands;
  bool silu, has_bias, need_x, need_weight, need_bias;
  Element storage;
  Values values;
  double slack = 1;
  Buffer<T> weight, bias;  // (k, taps, d), (k, d)
  Buffer<int64_t> reverse;
  StoredMap<T> x, grad_out;  // (b, 1, l, d), (b, l, k, d)

  explicit CausalProblem(Random& random) {
    d = random.chance(0.3) ? random.between(1, 100) : random.magnitude(100);
    b = random.between(1, 3);
    l = random.magnitude(200);
    k = random.between(1, 3);
    taps = random.chance(0.5) ? 4 : random.between(1, 9);
    limit_work(random, {&b, &l, &d, &k}, 10000);
    bands = random.between(1, l < 5 ? l : 5);
    silu = random.chance(0.5);
    has_bias = random.chance(0.6);
    const int64_t needs = random.between(1, has_bias ? 7 : 3);
    need_x = needs & 1;
    need_weight = needs & 2;
    need_bias = needs & 4;
    const int64_t type = sizeof(T) == sizeof(float) ? random.between(0, 2) : 0;
    storage = type == 0 ? Element::kSame : type == 1 ? Element::kBFloat16 : Element::kFloat16;
    values = pick_values(random);
    InputMaker<T> inputs(random, values);
    weight = inputs.make(k * taps * d, 1);
    bias = inputs.maybe(has_bias, k * d, 1);
    reverse = Buffer<int64_t>(k, 0);
    for (int64_t i = 0; i < k; ++i) reverse[i] = random.chance(0.5);
    x = StoredMap<T>(random, inputs, b, 1, l, d, storage);
    grad_out = StoredMap<T>(random, inputs, b, l, k, d, storage);
  }

  std::string describe() const {
    std::string directions;
    for (int64_t i = 0; i < k; ++i) directions += reverse[i] ? "<" : ">";
    return "causal_conv1d b=" + std::to_string(b) + " l=" + std::to_string(l) + " d=" + std::to_string(d) +
           " taps=" + std::to_string(taps) + " " + directions + " bands=" + std::to_string(bands) +
           (silu ? " silu" : "") + (has_bias ? " bias" : "") + (need_x ? " dx" : "") + (need_weight ? " dweight" : "") +
           (need_bias ? " dbias" : "") + ", storage " + name_of(storage) + ", " + name_of(values) + " values";
  }

  Bound bound(Bound unrounded) const { return bound_of_stored(storage, unrounded); }
};

// Calls visit(sequence, t, other, i, tap) for every tap: `other` is the position under the tap, or -1.
template <typename T, typename Visit>
void for_each_causal_tap(const CausalProblem<T>& p, const Visit& visit) {
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t t = 0; t < p.l; ++t)
      for (int64_t i = 0; i < p.k; ++i)
        for (int64_t tap = 0; tap < p.taps; ++tap) {
          const int64_t back = p.taps - 1 - tap, other = p.reverse[i] ? t + back : t - back;
          visit(b, t, other < 0 || other >= p.l ? -1 : other, i, tap);
        }
}

// Zeros beyond the ends take part, so that a NaN or an infinity beside them does what it does in the kernels.
template <typename T>
std::vector<Expected> scalar_causal_conv(const CausalProblem<T>& p) {
  const int64_t d = p.d, row = p.k * d, size = p.b * p.l * row;
  Sums z(size), out(size), dz(size), dx(p.b * p.l * d), dweight(p.k * p.taps * d), dbias(row);
  for (int64_t j = 0; j < size; ++j) z[j] = p.has_bias ? static_cast<double>(p.bias[j % row]) : 0.0;
  for_each_causal_tap(p, [&](int64_t b, int64_t t, int64_t other, int64_t i, int64_t tap) {
    for (int64_t c = 0; c < d; ++c)
      z[(b * p.l + t) * row + i * d + c] +=
          Sum(p.weight[(i * p.taps + tap) * d + c]) * (other < 0 ? 0.0 : double(p.x.values[(b * p.l + other) * d + c]));
  });
  for (int64_t j = 0; j < size; ++j) {
    const double grad = p.grad_out.values[j], logistic = 1 / (1 + std::exp(-z[j].value));
    out[j] = z[j];
    dz[j] = grad;
    if (p.silu) {  // neither its slope nor that of its slope is above 1.1
      out[j].value *= logistic;
      out[j].magnitude *= 1.1;
      dz[j].value *= logistic * (1 + z[j].value * (1 - logistic));
      dz[j].magnitude *= 1.1 * (1 + z[j].magnitude);
    }
    dbias[j % row] += dz[j];
  }
  for_each_causal_tap(p, [&](int64_t b, int64_t t, int64_t other, int64_t i, int64_t tap) {
    const int64_t back = p.taps - 1 - tap, source = p.reverse[i] ? t - back : t + back;  // whose output x_t goes to
    for (int64_t c = 0; c < d; ++c) {
      const int64_t at = (i * p.taps + tap) * d + c;
      dweight[at] +=
          dz[(b * p.l + t) * row + i * d + c] * (other < 0 ? 0.0 : double(p.x.values[(b * p.l + other) * d + c]));
      dx[(b * p.l + t) * d + c] +=
          (source < 0 || source >= p.l ? Sum(0.0) : dz[(b * p.l + source) * row + i * d + c]) * double(p.weight[at]);
    }
  });
  std::vector<Expected> results = {{"out", p.bound(Bound::kForward), out}};
  if (p.need_x) results.push_back({"dx", p.bound(Bound::kStream), dx});
  if (p.need_weight) results.push_back({"dweight", Bound::kParameter, dweight});
  if (p.need_bias) results.push_back({"dbias", Bound::kParameter, dbias});
  return results;
}

template <typename T>
int64_t task_count(const Kernels<T>& kernels, const CausalProblem<T>& p) {
  return p.b * p.bands * kernels.causal_conv_blocks(p.d);
}

// Forward twice, then backward.
template <typename T>
Results<T> run(const Kernels<T>& kernels, const CausalProblem<T>& p, const Execution& execution) {
  const int64_t slices = p.b * p.bands, tasks = task_count(kernels, p), size = p.b * p.l * p.d;
  Written<T> out(p.storage, size * p.k, execution.pattern), again(p.storage, size * p.k, execution.pattern);
  Written<T> dx(p.storage, size, execution.pattern);
  Buffer<T> dweight(p.need_weight ? slices * p.k * p.taps * p.d : 0, 0, execution.pattern);
  Buffer<T> dbias(p.need_bias ? slices * p.k * p.d : 0, 0, execution.pattern);
  const MapView x = p.x.view(), grad_out = p.grad_out.view();
  CausalConvArgs<T> args{};
  args.x = {x.data, x.batch_stride, x.pixel_stride, 0};
  args.weight = p.weight.data();
  args.bias = p.bias.data();
  args.reverse = p.reverse.data();
  args.batch = p.b;
  args.length = p.l;
  args.channels = p.d;
  args.directions = p.k;
  args.taps = p.taps;
  args.bands = p.bands;
  args.silu = p.silu;
  args.storage = p.storage;
  const int64_t scratch = kernels.causal_conv_workspace(args);
  args.out = out.data();
  run_tasks(kernels.causal_conv, args, tasks, scratch, execution);
  args.out = again.data();
  run_tasks(kernels.causal_conv, args, tasks, scratch, execution);
  args.grad_out = {grad_out.data, grad_out.batch_stride, grad_out.row_stride, grad_out.pixel_stride};
  args.dx = p.need_x ? dx.data() : nullptr;
  args.dweight = p.need_weight ? dweight.data() : nullptr;
  args.dbias = p.need_bias ? dbias.data() : nullptr;
  run_tasks(kernels.causal_conv_backward, args, tasks, scratch, execution);
  Results<T> results = {{"out", p.bound(Bound::kForward), out.values()}};
  if (p.need_x) results.push_back({"dx", p.bound(Bound::kStream), dx.values()});
  if (p.need_weight) results.push_back({"dweight", Bound::kParameter, sum_slices(dweight, slices)});
  if (p.need_bias) results.push_back({"dbias", Bound::kParameter, sum_slices(dbias, slices)});
  results.push_back({"out of a second call", p.bound(Bound::kForward), again.values()});
  return results;
}

}  // namespace check
