// Depthwise convolution of channels-last maps, stride 1, "same" padding, with the activation fused.
//
// Lanes are channels. A task copies the rows it needs into a ring of kernel-height rows, converted to T and with the
// zeros of the padding around them, so that the arithmetic knows neither borders nor dtypes nor strides and reads
// memory that lies together. The backward keeps a second ring with the gradient of the pre-activation, which it
// computes again; the gradient of the input is the convolution of that ring with the kernel turned by 180 degrees.
#pragma once

#include "chunk.h"
#include "convolution.h"
#include "kernels.h"

namespace mmvmamba {
namespace {

// Vectors of channels per task: two of bfloat16 fill a cache line, and the rings of usual maps stay in the near caches.
constexpr int kConvBlock = 2;
// Output columns computed together, as many accumulators as fit into registers, and fewer for the rest of a row.
#if defined(MMVMAMBA_AVX512)
constexpr bool kManyRegisters = true;
constexpr int kColumns = 7, kFewColumns = 4;
#else
constexpr bool kManyRegisters = false;
constexpr int kColumns = 2, kFewColumns = 1;
#endif

template <typename T>
int64_t depthwise_conv_blocks(int64_t channels) {
  return ceil_div(channels, kConvBlock * kLanes<T>);
}

// Sizes of the kernel: constants where K, the side of a square kernel, is not 0.
template <typename T, int K>
struct KernelSize {
  int64_t height, width;

  explicit KernelSize(const DepthwiseConvArgs<T>& a) : height(K ? K : a.kernel_height), width(K ? K : a.kernel_width) {}
  MMVMAMBA_INLINE int64_t h() const { return K ? K : height; }
  MMVMAMBA_INLINE int64_t w() const { return K ? K : width; }
  MMVMAMBA_INLINE int64_t taps() const { return h() * w(); }
};

template <typename T>
struct ConvScratch {
  int64_t row, ring;   // elements of a padded row of one vector of channels, and of all its rows
  T *weight, *turned;  // (block, kh kw, lanes); turned: in reverse order
  T* bias;             // (block, lanes)
  T *x, *dz;           // (block, kh, w + kw - 1, lanes): the rings; dz: gradient of the pre-activation
  T *dweight, *dbias;  // (block, kh kw, lanes), (block, lanes)
  int64_t size;

  ConvScratch(T* base, const DepthwiseConvArgs<T>& a) {
    size = 0;
    auto take = [base, this](int64_t vectors) {
      T* here = base == nullptr ? nullptr : base + size;
      size += kConvBlock * vectors * kLanes<T>;
      return here;
    };
    const int64_t taps = a.kernel_height * a.kernel_width;
    row = (a.width + a.kernel_width - 1) * kLanes<T>;
    ring = a.kernel_height * row;
    weight = take(taps);
    turned = take(taps);
    bias = take(1);
    x = take(ring / kLanes<T>);
    dz = take(ring / kLanes<T>);
    dweight = take(taps);
    dbias = take(1);
  }
};

template <typename T>
int64_t depthwise_conv_workspace(const DepthwiseConvArgs<T>& a) {
  return ConvScratch<T>(static_cast<T*>(nullptr), a).size;
}

template <typename T>
struct ConvTask {
  int64_t batch, band, first, count, top, bottom;  // channels first .. first + count - 1, rows top .. bottom - 1

  ConvTask(const DepthwiseConvArgs<T>& a, int64_t index) {
    constexpr int64_t block = kConvBlock * kLanes<T>;
    const int64_t blocks = ceil_div(a.channels, block);
    first = index % blocks * block;
    count = min_of(block, a.channels - first);
    band = index / blocks % a.bands;
    batch = index / blocks / a.bands;
    top = band * a.height / a.bands;
    bottom = (band + 1) * a.height / a.bands;
  }
  MMVMAMBA_INLINE int64_t vectors() const { return ceil_div(count, kLanes<T>); }
  // Channels in vector v, at most kLanes.
  MMVMAMBA_INLINE int64_t lanes(int64_t v) const { return min_of(kLanes<T>, count - v * kLanes<T>); }
};

// Start a task: its weights, and zeros in the rings where the padding to the left and right stays.
template <typename T>
MMVMAMBA_INLINE void prepare(const DepthwiseConvArgs<T>& a, const ConvScratch<T>& s, const ConvTask<T>& task) {
  const int64_t taps = a.kernel_height * a.kernel_width, left = a.kernel_width / 2 * kLanes<T>;
  for (int64_t v = 0; v < task.vectors(); ++v) {
    const int64_t channel = task.first + v * kLanes<T>, lanes = task.lanes(v);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Vec<T> value = load_lanes<T>(a.weight + tap * a.channels + channel, lanes);
      store<T>(s.weight + (v * taps + tap) * kLanes<T>, value);
      store<T>(s.turned + (v * taps + taps - 1 - tap) * kLanes<T>, value);
    }
    store<T>(s.bias + v * kLanes<T>, a.bias ? load_lanes<T>(a.bias + channel, lanes) : Vec<T>{});
    for (int64_t y = 0; y < a.kernel_height; ++y) {
      const int64_t at = v * s.ring + y * s.row;
      fill(s.x + at, left, T(0));
      fill(s.x + at + s.row - left, left, T(0));
      fill(s.dz + at, left, T(0));
      fill(s.dz + at + s.row - left, left, T(0));
    }
  }
}

// Copy row y of the map, zeros where there is none, into one row of the ring of every vector of channels.
template <typename T, typename S>
MMVMAMBA_INLINE void load_map_row(const DepthwiseConvArgs<T>& a, const ConvScratch<T>& s, const ConvTask<T>& task,
                                  int64_t y, int64_t slot) {
  T* target = s.x + slot * s.row + a.kernel_width / 2 * kLanes<T>;
  if (y < 0 || y >= a.height) {
    for (int64_t v = 0; v < task.vectors(); ++v) fill(target + v * s.ring, a.width * kLanes<T>, T(0));
    return;
  }
  const S* source = static_cast<const S*>(a.x.data) + task.batch * a.x.batch_stride + y * a.x.row_stride + task.first;
  if (task.count == kConvBlock * kLanes<T>) {
    for (int64_t column = 0; column < a.width; ++column)
      for (int64_t v = 0; v < kConvBlock; ++v)
        store<T>(target + v * s.ring + column * kLanes<T>,
                 load_as<T>(source + column * a.x.pixel_stride + v * kLanes<T>));
    return;
  }
  for (int64_t column = 0; column < a.width; ++column)
    for (int64_t v = 0; v < task.vectors(); ++v)
      store<T>(target + v * s.ring + column * kLanes<T>,
               load_lanes<T>(source + column * a.x.pixel_stride + v * kLanes<T>, task.lanes(v)));
}

// The sums over the taps at columns column .. column + N - 1; `ring` begins with the row `first` rows after its start.
template <typename T, int K, int N, typename Emit>
MMVMAMBA_INLINE void convolve_columns(const KernelSize<T, K>& size, const T* ring, int64_t row, int64_t first,
                                      const T* weight, Vec<T> bias, int64_t column, const Emit& emit) {
  Vec<T> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = bias;
  int64_t slot = first;
  for (int64_t ky = 0; ky < size.h(); ++ky) {
    const T* source = ring + slot * row + column * kLanes<T>;
    for (int64_t kx = 0; kx < size.w(); ++kx) {
      const Vec<T> tap = load(weight + (ky * size.w() + kx) * kLanes<T>);
      for (int n = 0; n < N; ++n) sum[n] += load(source + (kx + n) * kLanes<T>) * tap;
    }
    slot = slot + 1 == size.h() ? 0 : slot + 1;
  }
  for (int n = 0; n < N; ++n) emit(column + n, sum[n]);
}

// One row of the convolution of a ring; emit(column, value) may be called twice for a column, with the same value.
template <typename T, int K, typename Emit>
MMVMAMBA_INLINE void convolve_row(const KernelSize<T, K>& size, const T* ring, int64_t row, int64_t first,
                                  const T* weight, Vec<T> bias, int64_t width, const Emit& emit) {
  int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns)
    convolve_columns<T, K, kColumns>(size, ring, row, first, weight, bias, column, emit);
  if (width >= kFewColumns)
    for (; column < width; column += kFewColumns)
      convolve_columns<T, K, kFewColumns>(size, ring, row, first, weight, bias, min_of(column, width - kFewColumns),
                                          emit);
  for (; column < width; ++column) convolve_columns<T, K, 1>(size, ring, row, first, weight, bias, column, emit);
}

template <typename T, typename S, int K, bool SILU>
void depthwise_conv_tasks(const DepthwiseConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const ConvScratch<T> s(memory, a);
  const KernelSize<T, K> size(a);
  const int64_t above = size.h() / 2;
  for (int64_t index = begin; index < end; ++index) {
    const ConvTask<T> task(a, index);
    prepare(a, s, task);
    int64_t slot = 0;  // of the row loaded last; the one after it is the oldest
    for (int64_t y = task.top - above; y < task.bottom + above; ++y) {
      load_map_row<T, S>(a, s, task, y, slot);
      slot = slot + 1 == size.h() ? 0 : slot + 1;
      if (y - above < task.top) continue;
      for (int64_t v = 0; v < task.vectors(); ++v) {
        S* out = static_cast<S*>(a.out) + ((task.batch * a.height + y - above) * a.width) * a.channels + task.first +
                 v * kLanes<T>;
        const int64_t lanes = task.lanes(v), channels = a.channels;
        convolve_row<T, K>(size, s.x + v * s.ring, s.row, slot, s.weight + v * size.taps() * kLanes<T>,
                           load(s.bias + v * kLanes<T>), a.width, [=](int64_t column, Vec<T> z) {
                             store_lanes<T>(out + column * channels, SILU ? silu<T>(z) : z, lanes);
                           });
      }
    }
  }
}

// sum_row for ROWS rows of a 3x3 kernel at once, of x and of dweight alike, which loads dz once.
template <typename T, int ROWS>
MMVMAMBA_INLINE void add_3x3_gradient(const T* dz, const T* const (&x)[ROWS], int64_t width, T* dweight) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[ROWS][3] = {};
  for (int64_t column = 0; column < width; ++column) {
    const Vec<T> value = load(dz + column * L);
    for (int ky = 0; ky < ROWS; ++ky)
      for (int kx = 0; kx < 3; ++kx) sum[ky][kx] += value * load(x[ky] + (column + kx) * L);
  }
  for (int ky = 0; ky < ROWS; ++ky)
    for (int kx = 0; kx < 3; ++kx) add_to(dweight + (ky * 3 + kx) * L, sum[ky][kx]);
}

// Add one row's share of the gradient of the weights; sums are taken within the row first, which loses no precision.
template <typename T, int K>
MMVMAMBA_INLINE void add_weight_gradient(const KernelSize<T, K>& size, const T* dz, const T* ring, int64_t row,
                                         int64_t first, int64_t width, T* dweight) {
  constexpr int64_t L = kLanes<T>;
  if constexpr (K == 3) {
    const T* const x[3] = {ring + first * row, ring + (first + 1) % 3 * row, ring + (first + 2) % 3 * row};
    if constexpr (kManyRegisters) {
      add_3x3_gradient<T, 3>(dz, x, width, dweight);
    } else {
      for (int ky = 0; ky < 3; ++ky) {
        const T* const one[1] = {x[ky]};
        add_3x3_gradient<T, 1>(dz, one, width, dweight + ky * 3 * L);
      }
    }
    return;
  }
  int64_t slot = first;
  for (int64_t ky = 0; ky < size.h(); ++ky) {
    const T* source = ring + slot * row;
    for (int64_t kx = 0; kx < size.w(); ++kx)
      add_to(dweight + (ky * size.w() + kx) * L, sum_row(dz, source + kx * L, width));
    slot = slot + 1 == size.h() ? 0 : slot + 1;
  }
}

// One row of the gradient of the pre-activation, into the ring dz.
template <typename T, typename S, int K, bool SILU>
MMVMAMBA_INLINE void differentiate_row(const DepthwiseConvArgs<T>& a, const ConvScratch<T>& s,
                                       const KernelSize<T, K>& size, const ConvTask<T>& task, int64_t v, int64_t y,
                                       int64_t x_first, T* dz) {
  constexpr int64_t L = kLanes<T>;
  const MapView& g = a.grad_out;
  const int64_t lanes = task.lanes(v), stride = g.pixel_stride;
  const S* grad = static_cast<const S*>(g.data) + task.batch * g.batch_stride + y * g.row_stride + task.first + v * L;
  if (!SILU) {
    for (int64_t column = 0; column < a.width; ++column)
      store<T>(dz + column * L, load_lanes<T>(grad + column * stride, lanes));
    return;
  }
  convolve_row<T, K>(size, s.x + v * s.ring, s.row, x_first, s.weight + v * size.taps() * L, load(s.bias + v * L),
                     a.width, [=](int64_t column, Vec<T> z) {
                       store<T>(dz + column * L, load_lanes<T>(grad + column * stride, lanes) * silu_slope<T>(z));
                     });
}

// The work of one vector of channels on row y: its dz, the sums over pixels, and the row of dx that is then complete.
// x_first and dz_first: where the rings hold their oldest rows, y - kh / 2 and y - kh + 1.
template <typename T, typename S, int K, bool SILU>
MMVMAMBA_INLINE void backward_row(const DepthwiseConvArgs<T>& a, const ConvScratch<T>& s, const KernelSize<T, K>& size,
                                  const ConvTask<T>& task, int64_t v, int64_t y, int64_t x_first, int64_t dz_first) {
  constexpr int64_t L = kLanes<T>;
  const int64_t taps = size.taps(), dz_slot = dz_first == 0 ? size.h() - 1 : dz_first - 1;
  T* dz = s.dz + v * s.ring + dz_slot * s.row + size.w() / 2 * L;
  if (y < 0 || y >= a.height)
    fill(dz, a.width * L, T(0));
  else
    differentiate_row<T, S, K, SILU>(a, s, size, task, v, y, x_first, dz);
  if (y >= task.top && y < task.bottom) {
    if (a.dweight) add_weight_gradient(size, dz, s.x + v * s.ring, s.row, x_first, a.width, s.dweight + v * taps * L);
    if (a.dbias) add_to(s.dbias + v * L, sum_row<T>(dz, nullptr, a.width));
  }
  const int64_t complete = y - size.h() / 2;
  if (!a.dx || complete < task.top) return;
  S* dx = static_cast<S*>(a.dx) + (task.batch * a.height + complete) * a.width * a.channels + task.first + v * L;
  const int64_t lanes = task.lanes(v), channels = a.channels;
  convolve_row<T, K>(size, s.dz + v * s.ring, s.row, dz_first, s.turned + v * taps * L, Vec<T>{}, a.width,
                     [=](int64_t column, Vec<T> value) { store_lanes<T>(dx + column * channels, value, lanes); });
}

template <typename T>
MMVMAMBA_INLINE void store_sums(const DepthwiseConvArgs<T>& a, const ConvScratch<T>& s, const ConvTask<T>& task) {
  const int64_t taps = a.kernel_height * a.kernel_width, slice = task.batch * a.bands + task.band;
  for (int64_t v = 0; v < task.vectors(); ++v) {
    const int64_t channel = task.first + v * kLanes<T>, lanes = task.lanes(v);
    for (int64_t tap = 0; a.dweight && tap < taps; ++tap)
      store_lanes<T>(a.dweight + (slice * taps + tap) * a.channels + channel,
                     load(s.dweight + (v * taps + tap) * kLanes<T>), lanes);
    if (a.dbias) store_lanes<T>(a.dbias + slice * a.channels + channel, load(s.dbias + v * kLanes<T>), lanes);
  }
}

template <typename T, typename S, int K, bool SILU>
void depthwise_conv_backward_tasks(const DepthwiseConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const ConvScratch<T> s(memory, a);
  const KernelSize<T, K> size(a);
  const int64_t above = size.h() / 2, margin = a.dx ? above : 0;
  for (int64_t index = begin; index < end; ++index) {
    const ConvTask<T> task(a, index);
    prepare(a, s, task);
    fill(s.dweight, kConvBlock * size.taps() * kLanes<T>, T(0));
    fill(s.dbias, kConvBlock * kLanes<T>, T(0));
    int64_t x_slot = 0, dz_slot = 0;
    for (int64_t y = task.top - margin - above; y < task.bottom + margin + above; ++y) {
      if (SILU || a.dweight) load_map_row<T, S>(a, s, task, y, x_slot);
      x_slot = x_slot + 1 == size.h() ? 0 : x_slot + 1;
      if (y - above < task.top - margin) continue;
      dz_slot = dz_slot + 1 == size.h() ? 0 : dz_slot + 1;
      for (int64_t v = 0; v < task.vectors(); ++v)
        backward_row<T, S, K, SILU>(a, s, size, task, v, y - above, x_slot, dz_slot);
    }
    store_sums(a, s, task);
  }
}

// Choose the instance; 3x3, what every published model has, is one with constant sizes.
#define MMVMAMBA_BY_KERNEL(function, S, a, begin, end, memory)                                                        \
  if (a.kernel_height == 3 && a.kernel_width == 3)                                                                    \
    return a.silu ? function<T, S, 3, true>(a, begin, end, memory) : function<T, S, 3, false>(a, begin, end, memory); \
  return a.silu ? function<T, S, 0, true>(a, begin, end, memory) : function<T, S, 0, false>(a, begin, end, memory);

#define MMVMAMBA_BY_STORAGE(function, a, begin, end, memory)        \
  if constexpr (sizeof(T) == sizeof(float)) {                       \
    if (a.storage == Element::kBFloat16) {                          \
      MMVMAMBA_BY_KERNEL(function, BFloat16, a, begin, end, memory) \
    }                                                               \
    if (a.storage == Element::kFloat16) {                           \
      MMVMAMBA_BY_KERNEL(function, Float16, a, begin, end, memory)  \
    }                                                               \
  }                                                                 \
  MMVMAMBA_BY_KERNEL(function, T, a, begin, end, memory)

template <typename T>
void depthwise_conv_by_storage(const DepthwiseConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  MMVMAMBA_BY_STORAGE(depthwise_conv_tasks, a, begin, end, memory)
}

template <typename T>
void depthwise_conv_backward_by_storage(const DepthwiseConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  MMVMAMBA_BY_STORAGE(depthwise_conv_backward_tasks, a, begin, end, memory)
}

}  // namespace
}  // namespace mmvmamba
