// Random problems for the kernels: shapes, options and inputs from one number, in buffers of exactly their size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "storage.hh"

namespace check {

// Numbers from a seed (splitmix64): the same on every machine, unlike the distributions of the standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double probability) { return uniform() < probability; }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  // Small numbers as often as large ones.
  int64_t magnitude(int64_t high) { return static_cast<int64_t>(std::pow(high + 1.0, uniform())); }
  double normal() { return std::sqrt(-2 * std::log(uniform() + 0x1p-54)) * std::cos(6.283185307179586 * uniform()); }

 private:
  uint64_t state_;
};

// Heap memory of exactly `count` elements, so that AddressSanitizer sees the first byte beyond. The first element may
// lie anywhere that its type allows: tensors may be views.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(int64_t count, int64_t shift, unsigned char pattern = 0) : count_(count), shift_(shift) {
    const size_t bytes = static_cast<size_t>(count + shift) * sizeof(T);
    memory_ = static_cast<T*>(std::malloc(bytes));
    if (memory_ == nullptr && bytes != 0) std::abort();
    if (bytes != 0) std::memset(memory_, pattern, bytes);
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { std::free(memory_); }

  T* data() { return memory_ == nullptr ? nullptr : memory_ + shift_; }
  const T* data() const { return memory_ == nullptr ? nullptr : memory_ + shift_; }
  T& operator[](int64_t i) { return memory_[shift_ + i]; }
  const T& operator[](int64_t i) const { return memory_[shift_ + i]; }
  int64_t size() const { return count_; }

 private:
  void swap(Buffer& other) {
    std::swap(memory_, other.memory_);
    std::swap(count_, other.count_);
    std::swap(shift_, other.shift_);
  }

  T* memory_ = nullptr;
  int64_t count_ = 0, shift_ = 0;
};

// What the inputs hold. Results are compared with the scalar scan for the first three, as far as it is finite.
enum class Values { kOrdinary, kNan, kInfinite, kExtreme };

inline const char* name_of(Values values) {
  const char* const names[] = {"ordinary", "NaN", "infinite", "extreme"};
  return names[static_cast<int>(values)];
}

template <typename T>
T extreme_value(Random& random) {
  typedef std::numeric_limits<T> Limits;
  const T values[] = {Limits::quiet_NaN(),
                      Limits::infinity(),
                      -Limits::infinity(),
                      Limits::max(),
                      Limits::lowest(),
                      Limits::min(),
                      Limits::denorm_min(),
                      -Limits::denorm_min(),
                      T(1e30),
                      T(-1e30),
                      T(0),
                      T(-0.0),
                      T(88.8),
                      T(-87.4),
                      T(710),
                      T(-746),
                      T(20),
                      T(20.00001),
                      T(1e4),
                      T(-1e4)};
  return values[random.between(0, static_cast<int64_t>(sizeof(values) / sizeof(T)) - 1)];
}

// Makes the inputs of one problem.
template <typename T>
class InputMaker {
 public:
  InputMaker(Random& random, Values values) : random_(random), values_(values) {
    extreme_rate_ = random.chance(0.5) ? 0.3 : 0.02;
  }

  // Normal numbers; with `negative`, uniform in [-2, 0], as decay rates are.
  Buffer<T> make(int64_t count, double scale, bool negative = false) {
    Buffer<T> out(count, random_.chance(0.25) ? random_.between(1, 3) : 0);
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<T>(negative ? -2 * random_.uniform() : scale * random_.normal());
      if (values_ == Values::kExtreme && random_.chance(extreme_rate_)) out[i] = extreme_value<T>(random_);
    }
    const bool spoil = values_ == Values::kNan || values_ == Values::kInfinite;
    if (count > 0 && spoil && random_.chance(0.3)) out[random_.between(0, count - 1)] = spoiler();
    return out;
  }

  // Decay rates for sequences of `length`: usual ones; some above zero, which no length lets overflow; or some so
  // strong that decays underflow. The kernels treat blocks with a rate above zero differently.
  Buffer<T> make_rates(int64_t count, int64_t length) {
    Buffer<T> rates = make(count, 1, true);
    const double kind = random_.uniform();
    if (values_ == Values::kExtreme || kind < 0.6) return rates;
    grows_ = kind < 0.8;
    const double strongest = grows_ ? 3.0 / static_cast<double>(length + 1) : -400;
    const double rate = random_.chance(0.5) ? 0.5 : 0.05;
    for (int64_t i = 0; i < count; ++i)
      if (random_.chance(rate) && std::isfinite(rates[i])) rates[i] = static_cast<T>(strongest * random_.uniform());
    return rates;
  }

  // The type of an input of the kernels that read several, and for 2 bytes what it holds; `values` become rounded.
  Element pick_element(Buffer<T>& values, Buffer<uint16_t>& bits) {
    if (sizeof(T) != sizeof(float) || random_.chance(0.4)) return Element::kSame;
    const Element element = random_.chance(0.5) ? Element::kBFloat16 : Element::kFloat16;
    bits = Buffer<uint16_t>(values.size(), random_.chance(0.25) ? random_.between(1, 3) : 0);
    for (int64_t i = 0; i < values.size(); ++i) {
      bits[i] = to_bits(values[i], element);
      values[i] = static_cast<T>(from_bits(bits[i], element));
    }
    return element;
  }

  Buffer<T> maybe(bool wanted, int64_t count, double scale) { return wanted ? make(count, scale) : Buffer<T>(); }

  // What the bounds are multiplied by: a state that grows keeps the rounding errors of all its steps, which add up
  // where a route visits one pixel many times. At most 1.6 was seen in 100000 inputs.
  double slack() const { return grows_ ? 3 : 1; }

 private:
  T spoiler() {
    if (values_ == Values::kNan) return std::numeric_limits<T>::quiet_NaN();
    return random_.chance(0.5) ? std::numeric_limits<T>::infinity() : -std::numeric_limits<T>::infinity();
  }

  Random& random_;
  Values values_;
  double extreme_rate_;
  bool grows_ = false;
};

inline Values pick_values(Random& random) {
  const double p = random.uniform();
  return p < 0.6 ? Values::kOrdinary : p < 0.7 ? Values::kNan : p < 0.8 ? Values::kInfinite : Values::kExtreme;
}

// Halve the largest size, in place, until the product of all is at most a random number of steps of the recurrence.
inline void limit_work(Random& random, std::initializer_list<int64_t*> sizes, double most) {
  const double limit = 50 * std::pow(most / 50, random.uniform());
  for (;;) {
    double work = 1;
    int64_t* largest = *sizes.begin();
    for (int64_t* size : sizes) {
      work *= static_cast<double>(*size);
      if (*size > *largest) largest = size;
    }
    if (work <= limit || *largest <= 1) return;
    *largest /= 2;
  }
}

constexpr double kMostSteps = 100000;

template <typename T>
struct ScanProblem {
  int64_t b, g, d, n, l;
  bool softplus, has_D, has_bias, has_grad_last_state;
  Values values;
  double slack;
  Buffer<T> u, delta, A, B, C, D, bias, grad_out, grad_last_state;

  explicit ScanProblem(Random& random) {
    int64_t per_group = random.chance(0.3) ? random.between(1, 200) : random.magnitude(200);
    b = random.between(1, 3);
    g = random.chance(0.5) ? 1 : random.between(1, 4);
    n = random.magnitude(70);
    l = random.chance(0.02) ? 0 : random.chance(0.5) ? random.magnitude(300) : random.between(1, 300);
    limit_work(random, {&b, &g, &per_group, &n, &l}, kMostSteps);
    d = g * per_group;
    softplus = random.chance(0.7);
    has_D = random.chance(0.7);
    has_bias = random.chance(0.7);
    has_grad_last_state = random.chance(0.4);
    values = pick_values(random);
    InputMaker<T> inputs(random, values);
    u = inputs.make(b * d * l, 1);
    delta = inputs.make(b * d * l, softplus ? 1 : 0.3);
    A = inputs.make_rates(d * n, l);
    slack = inputs.slack();
    B = inputs.make(b * g * n * l, 1);
    C = inputs.make(b * g * n * l, 1);
    D = inputs.maybe(has_D, d, 1);
    bias = inputs.maybe(has_bias, d, softplus ? 0.5 : 0.1);
    grad_out = inputs.make(b * d * l, 1);
    grad_last_state = inputs.maybe(has_grad_last_state, b * d * n, 1);
    // Without softplus a negative step size lets the state grow without bound.
    if (!softplus && values != Values::kExtreme) {
      for (int64_t i = 0; i < delta.size(); ++i) delta[i] = delta[i] < 0 ? -delta[i] : delta[i];
      for (int64_t i = 0; i < bias.size(); ++i) bias[i] = bias[i] < 0 ? -bias[i] : bias[i];
    }
  }

  std::string describe() const {
    return "selective_scan b=" + std::to_string(b) + " g=" + std::to_string(g) + " d=" + std::to_string(d) +
           " n=" + std::to_string(n) + " l=" + std::to_string(l) + (softplus ? " softplus" : "") + (has_D ? " D" : "") +
           (has_bias ? " delta_bias" : "") + (has_grad_last_state ? " grad_last_state" : "") + ", " + name_of(values) +
           " values";
  }
};

template <typename T>
struct MapProblem {
  int64_t b, h, w, d, k, r, n, l;
  bool softplus, has_D, has_bias, has_permutation, per_route;
  Values values;
  double slack;
  Buffer<T> x, projections, dt_weight, dt_bias, A, D, grad_out;
  Buffer<int64_t> orders, permutation;
  Element x_element, projections_element, grad_element;
  Buffer<uint16_t> x_bits, projections_bits, grad_bits;

  explicit MapProblem(Random& random) {
    d = random.chance(0.3) ? random.between(1, 200) : random.magnitude(200);
    b = random.between(1, 3);
    k = random.between(1, 4);
    h = random.magnitude(33);
    w = random.magnitude(33);
    n = random.chance(0.4) ? 1 : random.magnitude(70);
    r = random.chance(0.05) ? 0 : random.magnitude(50);
    limit_work(random, {&b, &k, &h, &w, &d, &n}, kMostSteps);
    if (random.chance(0.02)) h = 0;
    softplus = random.chance(0.7);
    has_D = random.chance(0.7);
    has_bias = random.chance(0.7);
    has_permutation = random.chance(0.4);
    per_route = random.chance(0.3);
    values = pick_values(random);
    choose_routes(random);
    InputMaker<T> inputs(random, values);
    const int64_t pixels = b * h * w;
    const double scale = softplus ? 1 : 0.3;
    x = inputs.make(pixels * maps() * d, 1);
    projections = inputs.make(pixels * k * (r + 2 * n), scale);
    dt_weight = inputs.make(k * d * r, scale / std::sqrt(r + 1.0));
    dt_bias = inputs.maybe(has_bias, k * d, 0.5);
    A = inputs.make_rates(k * d * n, l);
    slack = inputs.slack();
    D = inputs.maybe(has_D, k * d, 1);
    grad_out = inputs.make(pixels * d, 1);
    if (!softplus && values != Values::kExtreme) make_steps_positive();
    x_element = inputs.pick_element(x, x_bits);
    projections_element = inputs.pick_element(projections, projections_bits);
    grad_element = inputs.pick_element(grad_out, grad_bits);
  }

  // Of x, beside each other at every pixel.
  int64_t maps() const { return per_route ? k : 1; }

  // Named orders, or rows of pixel indices: permutations, parts of them, or any with repeats.
  void choose_routes(Random& random) {
    l = h * w;
    if (!has_permutation) {
      orders = Buffer<int64_t>(k, 0);
      for (int64_t i = 0; i < k; ++i) orders[i] = random.between(0, 3);
      return;
    }
    const int64_t pixels = h * w;
    const bool repeats = random.chance(0.4) && pixels > 0;
    l = repeats ? pixels + random.between(0, 40) : random.chance(0.5) ? pixels : random.between(0, pixels);
    permutation = Buffer<int64_t>(k * l, 0);
    Buffer<int64_t> shuffled(pixels, 0);
    for (int64_t route = 0; route < k; ++route) {
      for (int64_t i = 0; i < pixels; ++i) shuffled[i] = i;
      for (int64_t i = pixels - 1; i > 0; --i) std::swap(shuffled[i], shuffled[random.between(0, i)]);
      for (int64_t t = 0; t < l; ++t)
        permutation[route * l + t] = repeats ? random.between(0, pixels - 1) : shuffled[t];
    }
  }

  void make_steps_positive() {
    const int64_t features = r + 2 * n;
    for (int64_t i = 0; i < projections.size(); ++i)
      if (i % features < r && projections[i] < 0) projections[i] = -projections[i];
    for (int64_t i = 0; i < dt_weight.size(); ++i) dt_weight[i] = dt_weight[i] < 0 ? -dt_weight[i] : dt_weight[i];
    for (int64_t i = 0; i < dt_bias.size(); ++i) dt_bias[i] = dt_bias[i] < 0 ? -dt_bias[i] : dt_bias[i];
  }

  std::string describe() const {
    return "scan2d b=" + std::to_string(b) + " h=" + std::to_string(h) + " w=" + std::to_string(w) +
           " d=" + std::to_string(d) + " k=" + std::to_string(k) + " r=" + std::to_string(r) +
           " n=" + std::to_string(n) + " l=" + std::to_string(l) + (softplus ? " softplus" : "") + (has_D ? " D" : "") +
           (has_bias ? " dt_bias" : "") + (has_permutation ? " permutation" : " orders") +
           (per_route ? ", a map for each route" : "") + ", x " + name_of(x_element) + ", projections " +
           name_of(projections_element) + ", grad_out " + name_of(grad_element) + ", " + name_of(values) + " values";
  }
};

}  // namespace check
