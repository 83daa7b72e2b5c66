// Products of small matrices in near caches, and the panels they work on: rows of whole vectors, the lanes beyond the
// last column zero.
#pragma once

#include "chunk.h"
#include "convert.h"
#include "kernels.h"
#include "tile.h"

namespace mmvmamba {
namespace {

// A block of the result: rows by vectors of one register, all of which stay in registers.
constexpr int kProductRows = 6;
#if defined(MMVMAMBA_AVX512) || defined(__aarch64__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif

template <typename T>
int64_t padded(int64_t count) {
  return ceil_div(count, kLanes<T>) * kLanes<T>;
}

// The left factor; a step is what is summed over.
template <typename T>
struct Left {
  const T* data;
  int64_t row, step;
};

// c (rows, width) = or += left (rows, steps) right (steps, width) for `M` rows and `V` vectors.
template <typename T, int M, int V, bool kAdd>
MMVMAMBA_INLINE void product_block(Left<T> left, const T* right, int64_t right_row, int64_t steps, T* c,
                                   int64_t c_row) {
  Vec<T> sums[M][V];
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = kAdd ? load(c + i * c_row + v * kLanes<T>) : Vec<T>{};
  for (int64_t s = 0; s < steps; ++s) {
    Vec<T> factors[V];
    for (int v = 0; v < V; ++v) factors[v] = load(right + s * right_row + v * kLanes<T>);
    for (int i = 0; i < M; ++i) {
      const Vec<T> scalar = splat(left.data[i * left.row + s * left.step]);
      for (int v = 0; v < V; ++v) sums[i][v] += scalar * factors[v];
    }
  }
  for (int i = 0; i < M; ++i)
    for (int v = 0; v < V; ++v) store<T>(c + i * c_row + v * kLanes<T>, sums[i][v]);
}

template <typename T, int V, bool kAdd>
__attribute__((noinline)) void product_rows(int64_t rows, Left<T> left, const T* right, int64_t right_row,
                                            int64_t steps, T* c, int64_t c_row) {
  switch (rows) {
    case 1:
      return product_block<T, 1, V, kAdd>(left, right, right_row, steps, c, c_row);
    case 2:
      return product_block<T, 2, V, kAdd>(left, right, right_row, steps, c, c_row);
    case 3:
      return product_block<T, 3, V, kAdd>(left, right, right_row, steps, c, c_row);
    case 4:
      return product_block<T, 4, V, kAdd>(left, right, right_row, steps, c, c_row);
    case 5:
      return product_block<T, 5, V, kAdd>(left, right, right_row, steps, c, c_row);
    default:
      return product_block<T, 6, V, kAdd>(left, right, right_row, steps, c, c_row);
  }
}

template <typename T, bool kAdd>
void product_vectors(int64_t rows, Left<T> left, const T* right, int64_t right_row, int64_t steps, T* c, int64_t c_row,
                     int64_t vectors) {
  static_assert(kProductRows == 6);
  int64_t v = 0;
  for (; v + kProductVectors <= vectors; v += kProductVectors)
    product_rows<T, kProductVectors, kAdd>(rows, left, right + v * kLanes<T>, right_row, steps, c + v * kLanes<T>,
                                           c_row);
  right += v * kLanes<T>;
  c += v * kLanes<T>;
  switch (vectors - v) {
    case 3:
      return product_rows<T, 3, kAdd>(rows, left, right, right_row, steps, c, c_row);
    case 2:
      return product_rows<T, 2, kAdd>(rows, left, right, right_row, steps, c, c_row);
    case 1:
      return product_rows<T, 1, kAdd>(rows, left, right, right_row, steps, c, c_row);
    default:
      return;
  }
}

// What of a square factor or result is not zero.
enum class Part { kAll, kLeftLower, kLeftUpper, kResultLower };

// c (rows, width) = or += left (rows, steps) right (steps, width); width counts whole vectors. With kLeftLower entries
// of the left factor right of its diagonal are zero and not multiplied beyond the block of rows; with kLeftUpper those
// left of it; with kResultLower columns beyond the block of rows are not computed.
template <typename T, bool kAdd, Part kPart = Part::kAll>
void product(int64_t rows, Left<T> left, const T* right, int64_t right_row, int64_t steps, T* c, int64_t c_row,
             int64_t width) {
  const int64_t blocks = ceil_div(rows, kProductRows);
  for (int64_t block = 0, first = 0; block < blocks; ++block) {
    const int64_t count = (rows - first + blocks - block - 1) / (blocks - block);  // blocks of nearly one size
    const int64_t end = first + count;
    const int64_t skipped = kPart == Part::kLeftUpper ? first : 0;
    const int64_t last = kPart == Part::kLeftLower && end < steps ? end : steps;
    int64_t columns = width;
    if (kPart == Part::kResultLower && padded<T>(end) < width) columns = padded<T>(end);
    product_vectors<T, kAdd>(count, {left.data + first * left.row + skipped * left.step, left.row, left.step},
                             right + skipped * right_row, right_row, last - skipped, c + first * c_row, c_row,
                             columns / kLanes<T>);
    first = end;
  }
}

template <typename T, typename S>
MMVMAMBA_INLINE void read_row(T* target, const S* source, int64_t count, T factor) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store<T>(target + i, factor * load_as<T>(source + i));
  if (i < count) store<T>(target + i, factor * load_part<T>(source + i, count - i));
}

// Rows `first` .. of a head (or group) of a view as a panel (rows, padded(view.width)), each times its factor.
template <typename T>
__attribute__((noinline)) void read_panel(T* panel, const RowView& view, int64_t batch, int64_t first, int64_t rows,
                                          int64_t head, const T* factors, int64_t factor_step) {
  const int64_t start = batch * view.batch_stride + first * view.row_stride + head * view.head_stride;
  const int64_t width = padded<T>(view.width);
  auto run = [&](auto* source) {
    for (int64_t i = 0; i < rows; ++i)
      read_row<T>(panel + i * width, source + start + i * view.row_stride, view.width,
                  factors == nullptr ? T(1) : factors[i * factor_step]);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (view.element == Element::kBFloat16) return run(static_cast<const BFloat16*>(view.data));
    if (view.element == Element::kFloat16) return run(static_cast<const Float16*>(view.data));
  }
  run(static_cast<const T*>(view.data));
}

template <typename T, typename S>
MMVMAMBA_INLINE void write_row(S* target, const T* source, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_as<T>(target + i, load(source + i));
  if (i < count) store_part<T>(target + i, load(source + i), count - i);
}

// The reverse, into a contiguous tensor (b, l, heads, width); `row` counts rows from its beginning.
template <typename T>
__attribute__((noinline)) void write_panel(const RowOutput& out, const T* panel, int64_t row, int64_t rows,
                                           int64_t head) {
  auto run = [&](auto* target) {
    for (int64_t i = 0; i < rows; ++i)
      write_row<T>(target + ((row + i) * out.heads + head) * out.width, panel + i * padded<T>(out.width), out.width);
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (out.element == Element::kBFloat16) return run(static_cast<BFloat16*>(out.data));
    if (out.element == Element::kFloat16) return run(static_cast<Float16*>(out.data));
  }
  run(static_cast<T*>(out.data));
}

// A dense matrix (rows, columns) as a panel, and back.
template <typename T>
void read_matrix(T* panel, const T* matrix, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) read_row<T>(panel + i * padded<T>(columns), matrix + i * columns, columns, T(1));
}

template <typename T>
void write_matrix(T* matrix, const T* panel, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) write_row<T>(matrix + i * columns, panel + i * padded<T>(columns), columns);
}

// The panel (columns, padded(rows)) of the transposed panel (rows, padded(columns)).
template <typename T>
void turn_panel(T* turned, const T* panel, int64_t rows, int64_t columns) {
  const int64_t width = padded<T>(rows);
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = rows; j < width; ++j) turned[i * width + j] = T(0);
  transpose(turned, width, panel, padded<T>(columns), rows, columns);
}

// row i times factors[i]
template <typename T>
void scale_rows(T* target, const T* panel, int64_t rows, int64_t width, const T* factors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; j += kLanes<T>)
      store<T>(target + i * width + j, factors[i] * load(panel + i * width + j));
}

template <typename T>
void fill_zero(T* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = T(0);
}

// Sum of the products of two panel rows.
template <typename T>
MMVMAMBA_INLINE T dot(const T* a, const T* b, int64_t width) {
  Vec<T> sum = {};
  for (int64_t j = 0; j < width; j += kLanes<T>) sum += load(a + j) * load(b + j);
  return sum_lanes(sum);
}

}  // namespace
}  // namespace mmvmamba
