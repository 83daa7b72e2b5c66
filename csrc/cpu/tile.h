// Square tiles of vectors: transposition and sums across lanes.
#pragma once

#include "vec.h"

namespace mmvmamba {
namespace {

#if defined(__clang__)
#define MMVMAMBA_SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMVMAMBA_SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, VecMask<float>{__VA_ARGS__})
#endif

// With 512-bit registers a tile is one vector wide and transposes by permutations of whole vectors. Narrower machines
// would emulate those; they go by 4 x 4 tiles.
#if defined(MMVMAMBA_AVX512)
#define MMVMAMBA_WHOLE_VECTOR_SHUFFLES 1
#else
#define MMVMAMBA_WHOLE_VECTOR_SHUFFLES 0
#endif

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

#if MMVMAMBA_WHOLE_VECTOR_SHUFFLES
// Lane j of the halves of a pair of vectors whose indices differ in bit 0, 1, 2 or 3: first[j] is a[j] where that bit
// of j is 0 and b[j - bit] elsewhere; second[j] is a[j + bit] and b[j].
#define MMVMAMBA_PAIR(bit, a, b, first, second)                                                      \
  if (bit == 1) {                                                                                    \
    first = MMVMAMBA_SHUFFLE16(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);     \
    second = MMVMAMBA_SHUFFLE16(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);    \
  } else if (bit == 2) {                                                                             \
    first = MMVMAMBA_SHUFFLE16(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);      \
    second = MMVMAMBA_SHUFFLE16(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);   \
  } else if (bit == 4) {                                                                             \
    first = MMVMAMBA_SHUFFLE16(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);      \
    second = MMVMAMBA_SHUFFLE16(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);   \
  } else {                                                                                           \
    first = MMVMAMBA_SHUFFLE16(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);        \
    second = MMVMAMBA_SHUFFLE16(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31); \
  }

template <int kBit>
MMVMAMBA_INLINE void exchange(Vec<float>* rows) {
  for (int i = 0; i < 16; ++i) {
    if (i & kBit) continue;
    const Vec<float> a = rows[i], b = rows[i + kBit];
    MMVMAMBA_PAIR(kBit, a, b, rows[i], rows[i + kBit])
  }
}

template <int kBit>
MMVMAMBA_INLINE void add_pairs(Vec<float>* rows) {
  for (int i = 0; i < 16 / (2 * kBit); ++i) {
    const Vec<float> a = rows[2 * i], b = rows[2 * i + 1];
    Vec<float> first, second;
    MMVMAMBA_PAIR(kBit, a, b, first, second)
    rows[i] = first + second;
  }
}
#endif

MMVMAMBA_INLINE float sum_lanes(Vec<float> v) {
  constexpr int kParts = kVectorBytes / 16;
  V4 part[kParts];
  __builtin_memcpy(part, &v, sizeof(v));
  for (int width = kParts / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

MMVMAMBA_INLINE double sum_lanes(Vec<double> v) {
  for (int width = kLanes<double> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// sums[i] = sum of the lanes of rows[i], for kLanes rows of one vector each.
template <typename T>
MMVMAMBA_INLINE void sum_rows(const T* rows, T* sums) {
#if MMVMAMBA_WHOLE_VECTOR_SHUFFLES
  if constexpr (sizeof(T) == sizeof(float)) {
    Vec<float> v[16];
    for (int i = 0; i < 16; ++i) v[i] = load(rows + 16 * i);
    add_pairs<1>(v);
    add_pairs<2>(v);
    add_pairs<4>(v);
    add_pairs<8>(v);
    return store<T>(sums, v[0]);
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) sums[i] = sum_lanes(load(rows + i * kLanes<T>));
}

// Transpose 16 x 16 numbers; strides in numbers.
MMVMAMBA_INLINE void transpose_tile(float* target, int64_t target_stride, const float* source, int64_t source_stride) {
#if MMVMAMBA_WHOLE_VECTOR_SHUFFLES
  Vec<float> v[16];
  for (int i = 0; i < 16; ++i) v[i] = load(source + i * source_stride);
  exchange<1>(v);
  exchange<2>(v);
  exchange<4>(v);
  exchange<8>(v);
  for (int i = 0; i < 16; ++i) store<float>(target + i * target_stride, v[i]);
#else
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 16; j += 4) {
      V4 r[4];
      for (int k = 0; k < 4; ++k) __builtin_memcpy(&r[k], source + (i + k) * source_stride + j, 16);
#if defined(__clang__)
      const V4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
      const V4 c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
      const V4 t[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                       __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
#else
      const I4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
      const V4 a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[2], r[3], low);
      const V4 c = __builtin_shuffle(r[0], r[1], high), d = __builtin_shuffle(r[2], r[3], high);
      const V4 t[4] = {__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, second), __builtin_shuffle(c, d, first),
                       __builtin_shuffle(c, d, second)};
#endif
      for (int k = 0; k < 4; ++k) __builtin_memcpy(target + (j + k) * target_stride + i, &t[k], 16);
    }
#endif
}

// target[j][i] = source[i][j] for i < rows, j < columns.
template <typename T>
__attribute__((noinline)) void transpose(T* target, int64_t target_stride, const T* source, int64_t source_stride,
                                         int64_t rows, int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    whole_rows = rows / 16 * 16;
    whole_columns = columns / 16 * 16;
    for (int64_t i = 0; i < whole_rows; i += 16)
      for (int64_t j = 0; j < whole_columns; j += 16)
        transpose_tile(target + j * target_stride + i, target_stride, source + i * source_stride + j, source_stride);
  }
  for (int64_t i = 0; i < whole_rows; ++i)
    for (int64_t j = whole_columns; j < columns; ++j) target[j * target_stride + i] = source[i * source_stride + j];
  for (int64_t i = whole_rows; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) target[j * target_stride + i] = source[i * source_stride + j];
}

}  // namespace
}  // namespace mmvmamba
