// Vectors from and to memory that holds another type than the arithmetic: bfloat16 and float16 beside float32, the
// identity for float32 and float64. Rounding is to nearest, ties to even; NaN stays NaN. Integer vector operations do
// the work on every instruction set, but AVX-512 converts float16 in one instruction.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace mmvmamba {
namespace {

typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));  // as many numbers as lanes of Vec<float>
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));

MMVMAMBA_INLINE Vec<float> widen_bfloat16(U16 bits) { return (Vec<float>)(__builtin_convertvector(bits, U32) << 16); }

MMVMAMBA_INLINE U16 narrow_bfloat16(Vec<float> value) {
  const U32 bits = (U32)value;
  // Half of the dropped part, one less where the kept part is even: only a tie can tell the difference.
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value != value ? quiet : rounded, U16);
}

#if defined(MMVMAMBA_AVX512) && !defined(__clang__)

typedef int16_t I16 __attribute__((vector_size(kVectorBytes / 2)));

MMVMAMBA_INLINE Vec<float> widen_float16(U16 bits) {
  constexpr int kCurrentDirection = 4;  // conversion is exact
  return __builtin_ia32_vcvtph2ps512_mask((I16)bits, Vec<float>{}, -1, kCurrentDirection);
}

MMVMAMBA_INLINE U16 narrow_float16(Vec<float> value) {
  constexpr int kNearestEven = 0;
  return (U16)__builtin_ia32_vcvtps2ph512_mask(value, kNearestEven, I16{}, -1);
}

#else

MMVMAMBA_INLINE Vec<float> widen_float16(U16 bits16) {
  const U32 bits = __builtin_convertvector(bits16, U32);
  const U32 sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const U32 normal = (magnitude << 13) + (112u << 23);  // the exponents differ in their bias: 127 - 15
  // No float32 denormal on the way, which would be lost where the processor is told to flush them.
  const U32 denormal = (U32)(__builtin_convertvector((VecMask<float>)magnitude, Vec<float>) * 5.9604644775390625e-8f);
  const U32 special = (magnitude << 13) | 0x7f800000u;
  const U32 finite = magnitude < 0x400u ? denormal : normal;
  return (Vec<float>)(sign | (magnitude >= 0x7c00u ? special : finite));
}

MMVMAMBA_INLINE U16 narrow_float16(Vec<float> value) {
  const U32 bits = (U32)value;
  const U32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U32 rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The last bit of a number around 0.5 is worth 2^-24, the smallest float16: the addition rounds.
  const U32 denormal = (U32)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const U32 finite = magnitude < 0x38800000u ? denormal : rounded;
  const U32 bounded = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : finite;  // 65520 and above round to infinity
  const U32 quiet = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  return __builtin_convertvector(sign | (magnitude > 0x7f800000u ? quiet : bounded), U16);
}

#endif

// load_as<T>(p): kLanes<T> numbers from memory of type float, double, BFloat16 or Float16, as T.
template <typename T>
MMVMAMBA_INLINE Vec<T> load_as(const T* p) {
  return load(p);
}

template <typename T>
MMVMAMBA_INLINE Vec<T> load_as(const BFloat16* p) {
  U16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return widen_bfloat16(bits);
}

template <typename T>
MMVMAMBA_INLINE Vec<T> load_as(const Float16* p) {
  U16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return widen_float16(bits);
}

// store_as<T>(p, v): the reverse, rounding.
template <typename T>
MMVMAMBA_INLINE void store_as(T* p, Vec<T> v) {
  store<T>(p, v);
}

template <typename T>
MMVMAMBA_INLINE void store_as(BFloat16* p, Vec<T> v) {
  const U16 bits = narrow_bfloat16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

template <typename T>
MMVMAMBA_INLINE void store_as(Float16* p, Vec<T> v) {
  const U16 bits = narrow_float16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// The first `count` lanes alone, for the end of a row; lanes beyond them are zero and memory beyond is not touched.
template <typename T, typename S>
MMVMAMBA_INLINE Vec<T> load_part(const S* p, int64_t count) {
  S lanes[kLanes<T>] = {};
  __builtin_memcpy(lanes, p, count * sizeof(S));
  return load_as<T>(lanes);
}

template <typename T, typename S>
MMVMAMBA_INLINE void store_part(S* p, Vec<T> v, int64_t count) {
  S lanes[kLanes<T>];
  store_as<T>(lanes, v);
  __builtin_memcpy(p, lanes, count * sizeof(S));
}

}  // namespace
}  // namespace mmvmamba
