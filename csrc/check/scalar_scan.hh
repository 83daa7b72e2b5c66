// Both operators once more, in plain scalar double precision, one channel after another: what the kernels are compared
// with. Written from the formulas in mmvmamba/ops/selective_scan/reference.py, sharing nothing with the kernels.
#pragma once

#include <string>
#include <vector>

#include "problem.hh"

namespace check {

// kBFloat16, kFloat16: rounded to them in the end.
enum class Bound { kForward, kStream, kParameter, kBFloat16, kFloat16 };

// One result of the kernels, summed over its partial results.
template <typename T>
struct Result {
  std::string name;
  Bound bound;
  std::vector<T> values;
};

template <typename T>
using Results = std::vector<Result<T>>;

// A number and what it would be if all terms that were ever added had the same sign: rounding errors are relative to
// that. A sum of 73 channels may come out near zero, and no order of adding them in float is then exact.
struct Sum {
  double value = 0, magnitude = 0;

  Sum() = default;
  Sum(double number) : value(number), magnitude(std::fabs(number)) {}  // NOLINT: numbers are sums of one term
  Sum operator*(const Sum& other) const {
    Sum product;
    product.value = value * other.value;
    product.magnitude = magnitude * other.magnitude;
    return product;
  }
  Sum operator+(const Sum& other) const {
    Sum sum;
    sum.value = value + other.value;
    sum.magnitude = magnitude + other.magnitude;
    return sum;
  }
  Sum& operator+=(const Sum& other) { return *this = *this + other; }
};

typedef std::vector<double> Doubles;
typedef std::vector<Sum> Sums;

struct Expected {
  std::string name;
  Bound bound;
  Sums values;
};

// One channel of one batch entry along its positions, forward and backward.
struct ChannelScan {
  int64_t n, l;
  bool softplus, has_D;
  double D;
  Doubles u, raw, dy;  // (l)
  Doubles A;           // (n)
  Doubles B, C;        // (l, n)
  Sums q;              // (n): in, the gradient of the last state
  Sums y, last, du, draw, dA, dB, dC;
  Sum dD;

  ChannelScan(int64_t states, int64_t length)
      : n(states),
        l(length),
        u(l),
        raw(l),
        dy(l),
        A(n),
        B(l * n),
        C(l * n),
        q(n),
        y(l),
        last(n),
        du(l),
        draw(l),
        dA(n),
        dB(l * n),
        dC(l * n) {}

  double step(int64_t t) const { return !softplus || raw[t] > 20 ? raw[t] : std::log1p(std::exp(raw[t])); }
  double slope(int64_t t) const { return !softplus || raw[t] > 20 ? 1 : 1 / (1 + std::exp(-raw[t])); }

  void run() {
    Sums h((l + 1) * n);
    for (int64_t t = 0; t < l; ++t) {
      const double delta = step(t);
      if (has_D) y[t] = D * u[t];
      for (int64_t i = 0; i < n; ++i) {
        h[(t + 1) * n + i] = h[t * n + i] * std::exp(delta * A[i]) + delta * u[t] * B[t * n + i];
        y[t] += h[(t + 1) * n + i] * C[t * n + i];
      }
    }
    for (int64_t i = 0; i < n; ++i) last[i] = h[l * n + i];
    for (int64_t t = l - 1; t >= 0; --t) {
      const double delta = step(t);
      if (has_D) du[t] = D * dy[t];
      dD += dy[t] * u[t];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = t * n + i;
        const double decay = std::exp(delta * A[i]);
        const Sum dh = q[i] + C[at] * dy[t], drate = dh * h[at] * decay;
        dC[at] = h[at + n] * dy[t];
        dB[at] = dh * (delta * u[t]);
        du[t] += dh * (delta * B[at]);
        draw[t] += (drate * A[i] + dh * (u[t] * B[at])) * slope(t);
        dA[i] += drate * delta;
        q[i] = dh * decay;
      }
    }
  }
};

template <typename T>
std::vector<Expected> scalar_selective_scan(const ScanProblem<T>& p) {
  Sums out(p.b * p.d * p.l), last(p.b * p.d * p.n), du(out.size()), ddelta(out.size()), dA(p.d * p.n);
  Sums dB(p.b * p.g * p.n * p.l), dC(dB.size()), dD(p.d), dbias(p.d);
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t c = 0; c < p.d; ++c) {
      ChannelScan s(p.n, p.l);
      const int64_t row = (b * p.d + c) * p.l, group = (b * p.g + c / (p.d / p.g)) * p.n;
      s.softplus = p.softplus;
      s.has_D = p.has_D;
      s.D = p.has_D ? p.D[c] : 0;
      for (int64_t i = 0; i < p.n; ++i) {
        s.A[i] = p.A[c * p.n + i];
        s.q[i] = p.has_grad_last_state ? p.grad_last_state[(b * p.d + c) * p.n + i] : 0;
      }
      for (int64_t t = 0; t < p.l; ++t) {
        s.u[t] = p.u[row + t];
        s.raw[t] = static_cast<double>(p.delta[row + t]) + (p.has_bias ? p.bias[c] : T(0));
        s.dy[t] = p.grad_out[row + t];
        for (int64_t i = 0; i < p.n; ++i) {
          s.B[t * p.n + i] = p.B[(group + i) * p.l + t];
          s.C[t * p.n + i] = p.C[(group + i) * p.l + t];
        }
      }
      s.run();
      dD[c] += s.dD;
      for (int64_t i = 0; i < p.n; ++i) {
        last[(b * p.d + c) * p.n + i] = s.last[i];
        dA[c * p.n + i] += s.dA[i];
      }
      for (int64_t t = 0; t < p.l; ++t) {
        out[row + t] = s.y[t];
        du[row + t] = s.du[t];
        ddelta[row + t] = s.draw[t];
        dbias[c] += s.draw[t];
        for (int64_t i = 0; i < p.n; ++i) {
          dB[(group + i) * p.l + t] += s.dB[t * p.n + i];
          dC[(group + i) * p.l + t] += s.dC[t * p.n + i];
        }
      }
    }
  std::vector<Expected> results = {{"out", Bound::kForward, out}, {"last_state", Bound::kForward, last},
                                   {"du", Bound::kStream, du},    {"ddelta", Bound::kStream, ddelta},
                                   {"dA", Bound::kParameter, dA}, {"dB", Bound::kStream, dB},
                                   {"dC", Bound::kStream, dC}};
  if (p.has_D) results.push_back({"dD", Bound::kParameter, dD});
  if (p.has_bias) results.push_back({"ddelta_bias", Bound::kParameter, dbias});
  return results;
}

template <typename T>
int64_t visited_pixel(const MapProblem<T>& p, int64_t route, int64_t t) {
  if (p.has_permutation) return p.permutation[route * p.l + t];
  const int64_t order = p.orders[route];
  const int64_t position = order >= 2 ? p.l - 1 - t : t;
  return order % 2 == 0 ? position : position % p.h * p.w + position / p.h;
}

// The gradients of scan2d while they are summed up.
struct MapSums {
  Sums out, dx, dprojections, ddt_weight, ddt_bias, dA, dD;

  template <typename T>
  explicit MapSums(const MapProblem<T>& p)
      : out(p.x.size()),
        dx(p.x.size()),
        dprojections(p.projections.size()),
        ddt_weight(p.k * p.d * p.r),
        ddt_bias(p.k * p.d),
        dA(p.k * p.d * p.n),
        dD(p.k * p.d) {}
};

// Index of a channel of x that a route reads.
template <typename T>
int64_t map_element(const MapProblem<T>& p, int64_t pixel, int64_t route, int64_t c) {
  return (pixel * p.maps() + (p.per_route ? route : 0)) * p.d + c;
}

template <typename T>
ChannelScan gather_channel(const MapProblem<T>& p, int64_t b, int64_t route, int64_t c) {
  ChannelScan s(p.n, p.l);
  const int64_t parameter = route * p.d + c, features = p.r + 2 * p.n;
  s.softplus = p.softplus;
  s.has_D = p.has_D;
  s.D = p.has_D ? p.D[parameter] : 0;
  for (int64_t i = 0; i < p.n; ++i) s.A[i] = p.A[parameter * p.n + i];
  for (int64_t t = 0; t < p.l; ++t) {
    const int64_t pixel = b * p.h * p.w + visited_pixel(p, route, t), row = (pixel * p.k + route) * features;
    s.u[t] = p.x[map_element(p, pixel, route, c)];
    s.dy[t] = p.grad_out[pixel * p.d + c];
    s.raw[t] = p.has_bias ? p.dt_bias[parameter] : T(0);
    for (int64_t j = 0; j < p.r; ++j)
      s.raw[t] += static_cast<double>(p.dt_weight[parameter * p.r + j]) * p.projections[row + j];
    for (int64_t i = 0; i < p.n; ++i) {
      s.B[t * p.n + i] = p.projections[row + p.r + i];
      s.C[t * p.n + i] = p.projections[row + p.r + p.n + i];
    }
  }
  return s;
}

template <typename T>
void add_channel(const MapProblem<T>& p, int64_t b, int64_t route, int64_t c, const ChannelScan& s, MapSums& sums) {
  const int64_t parameter = route * p.d + c, features = p.r + 2 * p.n;
  sums.dD[parameter] += s.dD;
  for (int64_t i = 0; i < p.n; ++i) sums.dA[parameter * p.n + i] += s.dA[i];
  for (int64_t t = 0; t < p.l; ++t) {
    const int64_t pixel = b * p.h * p.w + visited_pixel(p, route, t), row = (pixel * p.k + route) * features;
    sums.out[pixel * p.d + c] += s.y[t];
    sums.dx[map_element(p, pixel, route, c)] += s.du[t];
    sums.ddt_bias[parameter] += s.draw[t];
    for (int64_t j = 0; j < p.r; ++j) {
      sums.dprojections[row + j] += s.draw[t] * p.dt_weight[parameter * p.r + j];
      sums.ddt_weight[parameter * p.r + j] += s.draw[t] * p.projections[row + j];
    }
    for (int64_t i = 0; i < p.n; ++i) {
      sums.dprojections[row + p.r + i] += s.dB[t * p.n + i];
      sums.dprojections[row + p.r + p.n + i] += s.dC[t * p.n + i];
    }
  }
}

template <typename T>
std::vector<Expected> scalar_scan2d(const MapProblem<T>& p) {
  MapSums sums(p);
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t route = 0; route < p.k; ++route)
      for (int64_t c = 0; c < p.d; ++c) {
        ChannelScan s = gather_channel(p, b, route, c);
        s.run();
        add_channel(p, b, route, c, s, sums);
      }
  std::vector<Expected> results = {{"out", Bound::kForward, sums.out},
                                   {"dx", Bound::kStream, sums.dx},
                                   {"dprojections", Bound::kStream, sums.dprojections},
                                   {"ddt_weight", Bound::kParameter, sums.ddt_weight},
                                   {"dA", Bound::kParameter, sums.dA}};
  if (p.has_bias) results.push_back({"ddt_bias", Bound::kParameter, sums.ddt_bias});
  if (p.has_D) results.push_back({"dD", Bound::kParameter, sums.dD});
  return results;
}

}  // namespace check
