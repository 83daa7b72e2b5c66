// 64-byte vectors through the vector extension of GCC and Clang, and the transcendental functions of the scan on them.
// The compiler lowers one vector to one AVX-512, two AVX2 or four SSE/NEON registers. Everything has internal linkage.
#pragma once

#include <stdint.h>

// Passing 64-byte vectors by value differs between instruction sets; nothing here crosses a translation unit.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace mmvmamba {
namespace {

#define MMVMAMBA_INLINE inline __attribute__((always_inline))

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float V __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
};
template <>
struct VecTraits<double> {
  typedef double V __attribute__((vector_size(64)));
  typedef int64_t I __attribute__((vector_size(64)));
};

template <typename T>
using Vec = typename VecTraits<T>::V;
template <typename T>
using VecMask = typename VecTraits<T>::I;
template <typename T>
constexpr int kLanes = 64 / sizeof(T);

template <typename T>
MMVMAMBA_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
MMVMAMBA_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
MMVMAMBA_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// Sum of the lanes by halving, in a fixed order.
MMVMAMBA_INLINE float sum_lanes(Vec<float> v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  V8 low8, high8;
  __builtin_memcpy(&low8, &v, 32);
  __builtin_memcpy(&high8, reinterpret_cast<const char*>(&v) + 32, 32);
  const V8 sum8 = low8 + high8;
  V4 low4, high4;
  __builtin_memcpy(&low4, &sum8, 16);
  __builtin_memcpy(&high4, reinterpret_cast<const char*>(&sum8) + 16, 16);
  const V4 sum4 = low4 + high4;
  return (sum4[0] + sum4[2]) + (sum4[1] + sum4[3]);
}

MMVMAMBA_INLINE double sum_lanes(Vec<double> v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// exp(x), relative error about 1e-7; 0 below -87.3 (where the result would be denormal), infinity above 88.7.
MMVMAMBA_INLINE Vec<float> exp_vec(Vec<float> x) {
  typedef Vec<float> V;
  typedef VecMask<float> I;
  // A cast between vector types keeps the bits. Adding 1.5 * 2^23 rounds to an integer, which then stands in the low
  // bits of the sum.
  const V magic = splat(12582912.0f);
  const V shifted = x * 1.442695041f + magic;
  const V power = shifted - magic;
  const I exponent = ((I)shifted - (I)magic) << 23;
  // ln 2 in two parts: the first has few bits, so that its product with the integer is exact.
  const V g = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  V p = splat(1.0f / 5040);
  p = p * g + 1.0f / 720;
  p = p * g + 1.0f / 120;
  p = p * g + 1.0f / 24;
  p = p * g + 1.0f / 6;
  p = p * g + 0.5f;
  p = p * g + 1.0f;
  p = p * g + 1.0f;
  V result = (V)((I)p + exponent);
  result = x < -87.33654f ? V{} : result;
  result = x > 88.72283f ? splat(__builtin_inff()) : result;
  return x != x ? x : result;
}

MMVMAMBA_INLINE Vec<double> exp_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// log(1 + w) for w in [0, 1], with a small relative error also for tiny w.
MMVMAMBA_INLINE Vec<float> log1p_unit(Vec<float> w) {
  // 2 atanh(s), s = w / (2 + w) <= 1/3
  const Vec<float> s = w / (w + 2.0f);
  const Vec<float> s2 = s * s;
  Vec<float> p = splat(2.0f / 13);
  p = p * s2 + 2.0f / 11;
  p = p * s2 + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return p * s;
}

MMVMAMBA_INLINE Vec<double> log1p_unit(Vec<double> w) {
  for (int i = 0; i < kLanes<double>; ++i) w[i] = __builtin_log1p(w[i]);
  return w;
}

// PyTorch's softplus, the identity beyond 20, and its derivative.
template <typename T>
MMVMAMBA_INLINE Vec<T> softplus(Vec<T> x, Vec<T>& derivative) {
  typedef Vec<T> V;
  const T threshold = 20;
  const V magnitude = x < T(0) ? -x : x;
  const V e = exp_vec(-magnitude);
  const V inverse = T(1) / (e + T(1));
  derivative = x > threshold ? splat(T(1)) : (x < T(0) ? e * inverse : inverse);
  const V smooth = (x > T(0) ? x : V{}) + log1p_unit(e);
  return x > threshold ? x : smooth;
}

}  // namespace
}  // namespace mmvmamba
