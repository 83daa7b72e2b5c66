// What the convolutions share: ends of rows, SiLU, sums over a row.
#pragma once

#include "convert.h"

namespace mmvmamba {
namespace {

// The first `lanes` lanes, where that may be all of them.
template <typename T, typename S>
MMVMAMBA_INLINE Vec<T> load_lanes(const S* p, int64_t lanes) {
  return lanes == kLanes<T> ? load_as<T>(p) : load_part<T>(p, lanes);
}

template <typename T, typename S>
MMVMAMBA_INLINE void store_lanes(S* p, Vec<T> v, int64_t lanes) {
  if (lanes == kLanes<T>)
    store_as<T>(p, v);
  else
    store_part<T>(p, v, lanes);
}

// 1 / (1 + exp(-z)). Below the limit silu is 0 to the last bit that matters, and exp would leave its range.
MMVMAMBA_INLINE Vec<float> logistic(Vec<float>& z) {
  z = at_least(z, -88.0f);
  return 1.0f / (exp2_bounded<true>(z * static_cast<float>(-kLog2E)) + 1.0f);
}

MMVMAMBA_INLINE Vec<double> logistic(Vec<double>& z) {
  z = at_least(z, -708.0);
  return 1.0 / (exp_vec<double>(-z) + 1.0);
}

template <typename T>
MMVMAMBA_INLINE Vec<T> silu(Vec<T> z) {
  const Vec<T> s = logistic(z);
  return z * s;
}

// Derivative of silu: s (1 + z (1 - s)) with s the logistic function.
template <typename T>
MMVMAMBA_INLINE Vec<T> silu_slope(Vec<T> z) {
  const Vec<T> s = logistic(z);
  return s * (z * (T(1) - s) + T(1));
}

// The sum over a row of dz times x, or of dz alone where x is null; its order depends on the width only.
template <typename T>
MMVMAMBA_INLINE Vec<T> sum_row(const T* dz, const T* x, int64_t width) {
  Vec<T> sum[4] = {};
  int64_t column = 0;
  for (; column + 4 <= width; column += 4)
    for (int i = 0; i < 4; ++i) {
      const Vec<T> value = load(dz + (column + i) * kLanes<T>);
      sum[i] += x ? value * load(x + (column + i) * kLanes<T>) : value;
    }
  for (; column < width; ++column) {
    const Vec<T> value = load(dz + column * kLanes<T>);
    sum[0] += x ? value * load(x + column * kLanes<T>) : value;
  }
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <typename T>
MMVMAMBA_INLINE void add_to(T* p, Vec<T> value) {
  store<T>(p, load(p) + value);
}

}  // namespace
}  // namespace mmvmamba
