// State space duality with and without decay: random problems, the definitions in plain scalar double precision, and
// calls of the kernels of one instruction set.
#pragma once

#include <string>
#include <vector>

#include "run_kernels.hh"

namespace check {

using mmvmamba::RowOutput;
using mmvmamba::RowView;
using mmvmamba::SsdArgs;
using mmvmamba::SsdScanArgs;

template <typename T>
struct SsdProblem {
  int64_t b, l, k, p, g, n, range, task_heads;
  bool causal, blocked, softplus, has_skip, has_bias, has_weight, has_initial;
  Values values;
  double slack = 1;
  Buffer<T> x, B, C, dt, dy, decay, skip, bias, initial, dlast;  // dt: the weight where there is no decay
  Buffer<uint16_t> x_bits, B_bits, C_bits, dy_bits;
  Element x_element, B_element, C_element, dy_element;

  explicit SsdProblem(Random& random) {
    causal = random.chance(0.5);
    g = random.between(1, 3);
    k = g * random.between(1, 4);
    b = random.between(1, 2);
    l = random.chance(0.3) ? random.between(60, 200) : random.magnitude(130);
    p = random.magnitude(70);
    n = random.magnitude(70);
    limit_work(random, {&b, &l, &p, &n}, 60000);
    range = random.between(1, l);
    task_heads = random.between(1, mmvmamba::kMaxTaskHeads);
    blocked = random.chance(0.5);
    softplus = random.chance(0.7);
    has_skip = random.chance(0.6);
    has_bias = random.chance(0.6);
    has_weight = random.chance(0.8);
    has_initial = random.chance(0.5);
    // A value that is not finite reaches more of a product than of a sum of single steps: those are not compared.
    values = random.chance(0.7) ? Values::kOrdinary : Values::kExtreme;
    InputMaker<T> inputs(random, values);
    x = inputs.make(b * l * k * p, 1);
    B = inputs.make(b * l * g * n, 1);
    C = inputs.make(b * l * g * n, 1);
    dy = inputs.make(b * l * k * p, 1);
    dt = inputs.make(b * l * k, 1);
    if (causal && !softplus && values == Values::kOrdinary)
      for (int64_t i = 0; i < dt.size(); ++i) dt[i] = std::fabs(dt[i]);  // or the state grows without bound
    decay = inputs.make(k, 1, true);
    skip = inputs.maybe(has_skip, k, 1);
    bias = inputs.maybe(has_bias && softplus, k, 0.5);
    has_bias = has_bias && softplus;
    initial = inputs.maybe(has_initial, b * k * n * p, 1);
    dlast = inputs.make(b * k * n * p, 1);
    x_element = inputs.pick_element(x, x_bits);
    B_element = inputs.pick_element(B, B_bits);
    C_element = inputs.pick_element(C, C_bits);
    dy_element = inputs.pick_element(dy, dy_bits);
  }

  std::string describe() const {
    return std::string(causal ? "ssd" : "ssd_non_causal") + " b=" + std::to_string(b) + " l=" + std::to_string(l) +
           " k=" + std::to_string(k) + " p=" + std::to_string(p) + " g=" + std::to_string(g) +
           " n=" + std::to_string(n) + " range=" + std::to_string(range) + (blocked ? " blocked" : "") +
           (softplus ? " softplus" : "") + (has_skip ? " skip" : "") + (has_bias ? " bias" : "") +
           (has_weight ? " weight" : "") + (has_initial ? " initial" : "") + ", x " + name_of(x_element) + ", " +
           name_of(values) + " values";
  }
  int64_t group(int64_t head) const { return blocked ? head / (k / g) : head % g; }
};

// One head of one batch entry; states of all positions are kept, h (l + 1, n, p).
template <typename T>
struct SsdHead {
  const SsdProblem<T>& s;
  int64_t entry, head;

  int64_t row(int64_t t) const { return entry * s.l + t; }
  int64_t at(int64_t t) const { return (row(t) * s.k + head) * s.p; }
  int64_t projection(int64_t t) const { return (row(t) * s.g + s.group(head)) * s.n; }
  double raw(int64_t t) const {
    return static_cast<double>(s.dt[row(t) * s.k + head]) + (s.has_bias ? static_cast<double>(s.bias[head]) : 0.0);
  }
  double step(int64_t t) const {
    if (!s.causal) return s.has_weight ? static_cast<double>(s.dt[row(t) * s.k + head]) : 1.0;
    return !s.softplus || raw(t) > 20 ? raw(t) : std::log1p(std::exp(raw(t)));
  }
  double slope(int64_t t) const { return !s.softplus || raw(t) > 20 ? 1 : 1 / (1 + std::exp(-raw(t))); }
  double keep(int64_t t) const { return s.causal ? std::exp(step(t) * static_cast<double>(s.decay[head])) : 1.0; }
};

struct SsdSums {
  Sums out, last, dx, db, dc, ddt, ddecay, dskip, dbias, dinitial;
};

template <typename T>
void scalar_ssd_head(const SsdProblem<T>& s, const SsdHead<T>& head, SsdSums& sums) {
  const int64_t size = s.n * s.p, first = (head.entry * s.k + head.head) * size;
  Sums h((s.l + 1) * size), q(size);
  for (int64_t i = 0; i < size; ++i) {
    if (s.causal && s.has_initial) h[i] = static_cast<double>(s.initial[first + i]);
    if (s.causal) q[i] = static_cast<double>(s.dlast[first + i]);
  }
  for (int64_t t = 0; t < s.l; ++t)
    for (int64_t i = 0; i < size; ++i)
      h[(t + 1) * size + i] =
          h[t * size + i] * head.keep(t) +
          Sum(head.step(t) * s.x[head.at(t) + i % s.p]) * static_cast<double>(s.B[head.projection(t) + i / s.p]);
  for (int64_t i = 0; i < size; ++i) sums.last[first + i] = h[s.l * size + i];
  auto read = [&](int64_t t) { return (s.causal ? t + 1 : s.l) * size; };
  const double skip = s.has_skip ? static_cast<double>(s.skip[head.head]) : 0.0;
  for (int64_t t = s.l - 1; t >= 0; --t)
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = head.at(t) + i % s.p, from = head.projection(t) + i / s.p;
      if (i < s.p) {
        sums.out[at] += Sum(skip) * static_cast<double>(s.x[at]);
        sums.dx[at] += Sum(skip) * static_cast<double>(s.dy[at]);
        sums.dskip[head.head] += Sum(s.dy[at]) * static_cast<double>(s.x[at]);
      }
      sums.out[at] += h[read(t) + i] * static_cast<double>(s.C[from]);
      sums.dc[from] += h[read(t) + i] * static_cast<double>(s.dy[at]);
      if (!s.causal) q[i] += Sum(s.C[from]) * static_cast<double>(s.dy[at]);
    }
  for (int64_t t = s.l - 1; t >= 0; --t) {
    Sum dstep, drate;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t at = head.at(t) + i % s.p, from = head.projection(t) + i / s.p;
      const Sum dh = s.causal ? q[i] + Sum(s.C[from]) * static_cast<double>(s.dy[at]) : q[i];
      const Sum dinput = dh * static_cast<double>(s.B[from]);
      sums.db[from] += dh * (head.step(t) * s.x[at]);
      sums.dx[at] += dinput * head.step(t);
      dstep += dinput * static_cast<double>(s.x[at]);
      drate += dh * h[t * size + i] * head.keep(t);
      if (s.causal) q[i] = dh * head.keep(t);
    }
    const int64_t place = head.row(t) * s.k + head.head;
    if (!s.causal) {
      sums.ddt[place] = dstep;
      continue;
    }
    sums.ddecay[head.head] += drate * head.step(t);
    sums.ddt[place] = (dstep + drate * static_cast<double>(s.decay[head.head])) * head.slope(t);
    sums.dbias[head.head] += sums.ddt[place];
  }
  for (int64_t i = 0; i < size; ++i) sums.dinitial[first + i] = q[i];
}

template <typename T>
std::vector<Expected> scalar_ssd(const SsdProblem<T>& s) {
  const int64_t rows = s.b * s.l * s.k * s.p, projections = s.b * s.l * s.g * s.n, states = s.b * s.k * s.n * s.p;
  SsdSums sums{Sums(rows), Sums(states), Sums(rows), Sums(projections), Sums(projections), Sums(s.b * s.l * s.k),
               Sums(s.k),  Sums(s.k),    Sums(s.k),  Sums(states)};
  for (int64_t i = 0; i < s.b * s.k; ++i) scalar_ssd_head(s, SsdHead<T>{s, i / s.k, i % s.k}, sums);
  std::vector<Expected> results = {{"out", Bound::kForward, sums.out},
                                   {"state", Bound::kForward, sums.last},
                                   {"dx", Bound::kStream, sums.dx},
                                   {"db", Bound::kStream, sums.db},
                                   {"dc", Bound::kStream, sums.dc}};
  if (s.causal || s.has_weight) results.push_back({"ddt", Bound::kStream, sums.ddt});
  if (s.has_skip) results.push_back({"dskip", Bound::kParameter, sums.dskip});
  if (!s.causal) return results;
  results.push_back({"ddecay", Bound::kParameter, sums.ddecay});
  if (s.has_bias) results.push_back({"dbias", Bound::kParameter, sums.dbias});
  if (s.has_initial) results.push_back({"dinitial", Bound::kStream, sums.dinitial});
  return results;
}

template <typename T>
int64_t task_count(const Kernels<T>&, const SsdProblem<T>& s) {
  return s.b * s.g * (s.causal ? parts(s.k / s.g, s.task_heads) : parts(s.l, s.range));
}

template <typename T>
RowView view(const Buffer<T>& values, Element element, const Buffer<uint16_t>& bits, int64_t l, int64_t heads,
             int64_t width) {
  return {input(values, element, bits).data, element, l * heads * width, heads * width, width, width};
}

// What is common to the arguments of both forms.
template <typename T, typename Args>
Args ssd_arguments(const SsdProblem<T>& s) {
  Args a{};
  a.batch = s.b;
  a.length = s.l;
  a.heads = s.k;
  a.channels = s.p;
  a.groups = s.g;
  a.states = s.n;
  a.blocked = s.blocked;
  a.x = view(s.x, s.x_element, s.x_bits, s.l, s.k, s.p);
  a.b_in = view(s.B, s.B_element, s.B_bits, s.l, s.g, s.n);
  a.c_out = view(s.C, s.C_element, s.C_bits, s.l, s.g, s.n);
  a.skip = s.skip.data();
  return a;
}

template <typename T>
Results<T> run_scan(const Kernels<T>& kernels, const SsdProblem<T>& s, const Execution& execution) {
  auto empty = [&](int64_t count) { return Buffer<T>(count, 0, execution.pattern); };
  auto a = ssd_arguments<T, SsdScanArgs<T>>(s);
  const int64_t rows = s.b * s.l * s.k * s.p, projections = s.b * s.l * s.g * s.n, states = s.b * s.k * s.n * s.p;
  const int64_t tasks = task_count(kernels, s), blocks = parts(s.k / s.g, s.task_heads);
  a.task_heads = s.task_heads;
  a.parts = blocks;
  a.softplus = s.softplus;
  a.dt = s.dt.data();
  a.decay = s.decay.data();
  a.dt_bias = s.bias.data();
  a.initial_state = s.initial.data();
  Buffer<T> out = empty(rows), again = empty(rows), last = empty(states);
  Buffer<T> carries = empty(parts(s.l, mmvmamba::kSsdChunk) * states);
  a.last_state = last.data();
  a.out = {out.data(), Element::kSame, s.k, s.p};
  run_tasks(kernels.ssd_scan, a, tasks, kernels.ssd_scan_workspace(a, false), execution);
  a.out.data = again.data();
  a.carries = carries.data();
  run_tasks(kernels.ssd_scan, a, tasks, kernels.ssd_scan_workspace(a, false), execution);
  Buffer<T> dx = empty(rows), ddt = empty(s.b * s.l * s.k), db = empty(blocks * projections);
  Buffer<T> dc = empty(blocks * projections), ddecay = empty(s.b * s.k), dskip = empty(s.b * s.k);
  Buffer<T> dbias = empty(s.b * s.k), dinitial = empty(states);
  a.grad_out = view(s.dy, s.dy_element, s.dy_bits, s.l, s.k, s.p);
  a.grad_last_state = s.dlast.data();
  a.dx = {dx.data(), Element::kSame, s.k, s.p};
  a.ddt = ddt.data();
  a.db = db.data();
  a.dc = dc.data();
  a.ddecay = ddecay.data();
  a.dskip = s.has_skip ? dskip.data() : nullptr;
  a.dbias = s.has_bias ? dbias.data() : nullptr;
  a.dinitial = s.has_initial ? dinitial.data() : nullptr;
  run_tasks(kernels.ssd_scan_backward, a, tasks, kernels.ssd_scan_workspace(a, true), execution);
  Results<T> results = {{"out", Bound::kForward, as_vector(out)},       {"state", Bound::kForward, as_vector(last)},
                        {"dx", Bound::kStream, as_vector(dx)},          {"db", Bound::kStream, sum_slices(db, blocks)},
                        {"dc", Bound::kStream, sum_slices(dc, blocks)}, {"ddt", Bound::kStream, as_vector(ddt)}};
  if (s.has_skip) results.push_back({"dskip", Bound::kParameter, sum_slices(dskip, s.b)});
  results.push_back({"ddecay", Bound::kParameter, sum_slices(ddecay, s.b)});
  if (s.has_bias) results.push_back({"dbias", Bound::kParameter, sum_slices(dbias, s.b)});
  if (s.has_initial) results.push_back({"dinitial", Bound::kStream, as_vector(dinitial)});
  results.push_back({"out of a second call", Bound::kForward, as_vector(again)});
  return results;
}

template <typename T>
Results<T> run_without_decay(const Kernels<T>& kernels, const SsdProblem<T>& s, const Execution& execution) {
  auto empty = [&](int64_t count) { return Buffer<T>(count, 0, execution.pattern); };
  auto a = ssd_arguments<T, SsdArgs<T>>(s);
  const int64_t rows = s.b * s.l * s.k * s.p, projections = s.b * s.l * s.g * s.n, states = s.b * s.k * s.n * s.p;
  const int64_t tasks = task_count(kernels, s);
  a.range = s.range;
  a.ranges = parts(s.l, s.range);
  a.weight = s.has_weight ? s.dt.data() : nullptr;
  auto summed = [&] {
    Buffer<T> partial = empty(a.ranges * states), sum = empty(states);
    a.partial_state = partial.data();
    run_tasks(kernels.ssd_state, a, tasks, kernels.ssd_workspace(a), execution);
    const std::vector<T> values = sum_slices(partial, a.ranges);
    for (int64_t i = 0; i < states; ++i) sum[i] = values[i];
    return sum;
  };
  const Buffer<T> state = summed();
  a.state = state.data();
  Buffer<T> out = empty(rows), again = empty(rows);
  for (Buffer<T>* target : {&out, &again}) {
    a.out = {target->data(), Element::kSame, s.k, s.p};
    run_tasks(kernels.ssd_read, a, tasks, kernels.ssd_workspace(a), execution);
  }
  a.grad_out = view(s.dy, s.dy_element, s.dy_bits, s.l, s.k, s.p);
  const Buffer<T> dstate = summed();
  a.grad_state = dstate.data();
  Buffer<T> dx = empty(rows), db = empty(projections), dc = empty(projections);
  Buffer<T> dweight = empty(s.has_weight ? s.b * s.l * s.k : 0), dskip = empty(s.has_skip ? a.ranges * s.b * s.k : 0);
  a.dx = {dx.data(), Element::kSame, s.k, s.p};
  a.db = {db.data(), Element::kSame, s.g, s.n};
  a.dc = {dc.data(), Element::kSame, s.g, s.n};
  a.dweight = s.has_weight ? dweight.data() : nullptr;
  a.dskip = s.has_skip ? dskip.data() : nullptr;
  run_tasks(kernels.ssd_backward, a, tasks, kernels.ssd_workspace(a), execution);
  Results<T> results = {{"out", Bound::kForward, as_vector(out)},
                        {"state", Bound::kForward, as_vector(state)},
                        {"dx", Bound::kStream, as_vector(dx)},
                        {"db", Bound::kStream, as_vector(db)},
                        {"dc", Bound::kStream, as_vector(dc)}};
  if (s.has_weight) results.push_back({"ddt", Bound::kStream, as_vector(dweight)});
  if (s.has_skip) results.push_back({"dskip", Bound::kParameter, sum_slices(dskip, a.ranges * s.b)});
  results.push_back({"out of a second call", Bound::kForward, as_vector(again)});
  return results;
}

// Forward twice, then backward.
template <typename T>
Results<T> run(const Kernels<T>& kernels, const SsdProblem<T>& s, const Execution& execution) {
  return s.causal ? run_scan(kernels, s, execution) : run_without_decay(kernels, s, execution);
}

}  // namespace check
