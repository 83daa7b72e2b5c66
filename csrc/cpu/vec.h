// Vectors of one register through the vector extension of GCC and Clang, and the transcendental functions of the scan
// on them. (Wider vectors than the processor has would compile too, but GCC takes some operations on them apart into
// single numbers: with 64 bytes everywhere, the AVX2 kernels were ten times slower.) Everything has internal linkage.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>  // the compiler's own, every function inlined into its caller
#endif

// Passing vectors by value differs between instruction sets; nothing here crosses a translation unit.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace mmvmamba {
namespace {

#define MMVMAMBA_INLINE inline __attribute__((always_inline))

#if defined(MMVMAMBA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(MMVMAMBA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));  // for exponents: unsigned numbers may overflow
};
template <>
struct VecTraits<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename VecTraits<T>::V;
template <typename T>
using VecMask = typename VecTraits<T>::I;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

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

// The value where the mask is all ones, 0 where it is 0.
template <typename T>
MMVMAMBA_INLINE Vec<T> keep(VecMask<T> mask, Vec<T> value) {
  return (Vec<T>)((VecMask<T>)value & mask);
}

// The larger and the smaller of a number and a limit; NaN stays NaN. The compilers do not see that x86 has instructions
// for just this.
template <typename T>
MMVMAMBA_INLINE Vec<T> at_least(Vec<T> x, T limit) {
  return x < limit ? splat(limit) : x;
}
template <typename T>
MMVMAMBA_INLINE Vec<T> at_most(Vec<T> x, T limit) {
  return x > limit ? splat(limit) : x;
}
#if defined(MMVMAMBA_AVX512)
#define MMVMAMBA_MINMAX(function, limit, x) _mm512_maskz_##function##_ps(0xffff, limit, x)
typedef __m512 Register;
#elif defined(MMVMAMBA_AVX2)
#define MMVMAMBA_MINMAX(function, limit, x) _mm256_##function##_ps(limit, x)
typedef __m256 Register;
#elif defined(__SSE2__)
#define MMVMAMBA_MINMAX(function, limit, x) _mm_##function##_ps(limit, x)
typedef __m128 Register;
#endif
#if defined(MMVMAMBA_MINMAX)
template <>
MMVMAMBA_INLINE Vec<float> at_least(Vec<float> x, float limit) {
  return (Vec<float>)MMVMAMBA_MINMAX(max, (Register)splat(limit), (Register)x);
}
template <>
MMVMAMBA_INLINE Vec<float> at_most(Vec<float> x, float limit) {
  return (Vec<float>)MMVMAMBA_MINMAX(min, (Register)splat(limit), (Register)x);
}
#endif

// -|x|
MMVMAMBA_INLINE Vec<float> minus_magnitude(Vec<float> x) { return (Vec<float>)((VecMask<float>)x | INT32_MIN); }
MMVMAMBA_INLINE Vec<double> minus_magnitude(Vec<double> x) { return (Vec<double>)((VecMask<double>)x | INT64_MIN); }

// 2^f for |f| <= 1/2, relative error about 1e-7, exactly 1 at 0.
MMVMAMBA_INLINE Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = splat(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184369e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  return p * f + 1.0f;
}

// The same with one term less, relative error 9e-8 beside the rounding: enough where errors do not add up over a scan.
MMVMAMBA_INLINE Vec<float> exp2_fraction_short(Vec<float> f) {
  Vec<float> p = splat(1.326472731e-3f);
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  return p * f + 1.0f;
}

// 2^t for t <= 127, relative error about 1e-7, exactly 1 at 0, something below 2^-126 for t < -126 and exactly 0 for
// t <= -127. The result for NaN is unspecified.
template <bool kShort = false>
MMVMAMBA_INLINE Vec<float> exp2_bounded(Vec<float> t) {
  typedef Vec<float> V;
  typedef VecTraits<float>::U U;
  t = at_least(t, -127.0f);  // the exponent of 2^-127 is the bit pattern of zero
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum. A cast between vector types
  // keeps the bits; the shift leaves the integer in the field of the exponent and drops everything else.
  const V magic = splat(12582912.0f);
  const V shifted = t + magic;
  const V f = t - (shifted - magic);
  return (V)((U)(kShort ? exp2_fraction_short(f) : exp2_fraction(f)) + ((U)shifted << 23));
}

MMVMAMBA_INLINE Vec<double> exp2_bounded(Vec<double> t) {
  for (int i = 0; i < kLanes<double>; ++i) t[i] = __builtin_exp2(t[i]);
  return t;
}

// 2^t as the product of two factors, for t up to 254 (as for that beyond); below -252 something smaller, 0 from -254
// on. A decay beyond the type must not become infinite before it meets the state, since infinity times a state of zero
// is NaN: ((h first) second). The second is a power of two, so that this rounds as one product does. NaN stays NaN.
MMVMAMBA_INLINE void exp2_factors(Vec<float> t, Vec<float>& first, Vec<float>& second) {
  typedef Vec<float> V;
  typedef VecTraits<float>::U U;
  const V clamped = at_most(at_least(t, -254.0f), 254.0f);
  const V magic = splat(12582912.0f);
  const V shifted = clamped + magic;
  const V f = clamped - (shifted - magic);
  // The shift to the right must know the sign; -254 ... 254 becomes 1 ... 509 and back. Halves are
  // rounded up, so that the fraction, which may be below 1, never meets an exponent of zero.
  const U power = (U)shifted - (U)magic, half = ((power + 255u) >> 1) - 127u;
  first = (V)((U)exp2_fraction(f) + (half << 23));
  first = t != t ? t : first;
  second = (V)((power - half + 127u) << 23);
}

MMVMAMBA_INLINE void exp2_factors(Vec<double> t, Vec<double>& first, Vec<double>& second) {
  for (int i = 0; i < kLanes<double>; ++i) first[i] = __builtin_exp2(t[i] > 2046 ? 1023 : t[i] / 2);
  second = first;
}

// exp(x) up to 2^127 (float), to which it saturates. The result for NaN is unspecified.
template <typename T>
MMVMAMBA_INLINE Vec<T> exp_vec(Vec<T> x) {
  return exp2_bounded(at_most(x * T(1.4426950408889634074), T(sizeof(T) == sizeof(float) ? 127 : 1023)));
}

// log2(1 + e) for e in [0, 1], with a small relative error also for tiny e.
MMVMAMBA_INLINE Vec<float> log2_1p_unit(Vec<float> e) {
  typedef Vec<float> V;
  V p = splat(7.549172733e-3f);
  p = p * e - 4.256702587e-2f;
  p = p * e + 1.128561348e-1f;
  p = p * e - 1.971189231e-1f;
  p = p * e + 2.756413817e-1f;
  p = p * e - 3.584084809e-1f;
  p = p * e + 4.806928729e-1f;
  p = p * e - 7.213401794e-1f;
  p = p * e + 1.442695022f;
  return p * e;
}

MMVMAMBA_INLINE Vec<double> log2_1p_unit(Vec<double> e) {
  for (int i = 0; i < kLanes<double>; ++i) e[i] = __builtin_log1p(e[i]) * 1.4426950408889634074;
  return e;
}

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Softplus in units of ln 2: log2(1 + 2^z), which is softplus(z ln 2) / ln 2. PyTorch's softplus is the identity beyond
// 20; in float32 that makes no difference.
MMVMAMBA_INLINE Vec<float> softplus2(Vec<float> z, Vec<float>& e) {
  e = exp2_bounded<true>(minus_magnitude(z));
  return at_least(z, 0.0f) + log2_1p_unit(e);
}

MMVMAMBA_INLINE Vec<double> softplus2(Vec<double> z, Vec<double>& e) {
  e = exp2_bounded(minus_magnitude(z));
  const Vec<double> smooth = at_least(z, 0.0) + log2_1p_unit(e);
  return z > 20 * kLog2E ? z : smooth;
}

// The derivative of softplus at z, given e of softplus2.
MMVMAMBA_INLINE Vec<float> softplus_slope(Vec<float> z, Vec<float> e) {
  const Vec<float> inverse = 1.0f / (e + 1.0f);
  return z < 0.0f ? e * inverse : inverse;
}

MMVMAMBA_INLINE Vec<double> softplus_slope(Vec<double> z, Vec<double> e) {
  const Vec<double> inverse = 1.0 / (e + 1.0);
  const Vec<double> smooth = z < 0.0 ? e * inverse : inverse;
  return z > 20 * kLog2E ? splat(1.0) : smooth;
}

}  // namespace
}  // namespace mmvmamba
