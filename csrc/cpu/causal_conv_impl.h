// Causal depthwise convolution of channels-last sequences, along several directions at once, the activation fused.
//
// Lanes are channels. A task copies the positions it needs, converted to T and with the zeros beyond the ends, so that
// the arithmetic knows neither ends nor dtypes nor strides. A direction against the order of the positions is one along
// it with its taps in reverse order that begins at the position itself, so that the inner loops know no directions
// either. The backward computes the gradient of the pre-activation of every direction again and convolves those, each
// with its taps turned.
#pragma once

#include "chunk.h"
#include "convolution.h"
#include "kernels.h"

namespace mmvmamba {
namespace {

// Vectors of channels per task: two of bfloat16 fill a cache line, and what a band needs stays in the nearest cache.
constexpr int kCausalBlock = 2;
// Positions of the gradient of x that are computed together.
#if defined(MMVMAMBA_AVX512)
constexpr int kPositions = 8;
#else
constexpr int kPositions = 4;
#endif

template <typename T>
int64_t causal_conv_blocks(int64_t channels) {
  return ceil_div(channels, kCausalBlock * kLanes<T>);
}

template <typename T>
struct CausalScratch {
  int64_t margin;           // taps - 1
  int64_t x_line, dz_line;  // elements of one vector of channels along the positions of a task and its margins
  T *taps, *turned;         // (block, k, taps, lanes): as they meet ascending positions, and in reverse order
  T *bias, *dbias;          // (block, k, lanes)
  T* dtaps;                 // (block, k, taps, lanes)
  T* x;                     // (block, longest band + 4 margins, lanes)
  T* dz;                    // (block, k, longest band + 2 margins, lanes): gradients of the pre-activations
  int64_t size;

  CausalScratch(T* base, const CausalConvArgs<T>& a) {
    size = 0;
    auto take = [base, this](int64_t vectors) {
      T* here = base == nullptr ? nullptr : base + size;
      size += kCausalBlock * vectors * kLanes<T>;
      return here;
    };
    margin = a.taps - 1;
    const int64_t longest = ceil_div(a.length, a.bands);
    x_line = (longest + 4 * margin) * kLanes<T>;
    dz_line = (longest + 2 * margin) * kLanes<T>;
    taps = take(a.directions * a.taps);
    turned = take(a.directions * a.taps);
    dtaps = take(a.directions * a.taps);
    bias = take(a.directions);
    dbias = take(a.directions);
    x = take(x_line / kLanes<T>);
    dz = take(a.directions * dz_line / kLanes<T>);
  }
};

template <typename T>
int64_t causal_conv_workspace(const CausalConvArgs<T>& a) {
  return CausalScratch<T>(static_cast<T*>(nullptr), a).size;
}

template <typename T>
struct CausalTask {
  int64_t slice, batch, first, count, begin, end;  // channels first .. first + count - 1, positions begin .. end - 1

  CausalTask(const CausalConvArgs<T>& a, int64_t index) {
    constexpr int64_t block = kCausalBlock * kLanes<T>;
    const int64_t blocks = ceil_div(a.channels, block);
    first = index % blocks * block;
    count = min_of(block, a.channels - first);
    slice = index / blocks;
    batch = slice / a.bands;
    const int64_t band = slice % a.bands;
    begin = band * a.length / a.bands;
    end = (band + 1) * a.length / a.bands;
  }
  MMVMAMBA_INLINE int64_t vectors() const { return ceil_div(count, kLanes<T>); }
  // Channels in vector v, at most kLanes.
  MMVMAMBA_INLINE int64_t lanes(int64_t v) const { return min_of(kLanes<T>, count - v * kLanes<T>); }
};

// Index of vector v of direction i in what has `width` vectors for each.
template <typename T>
MMVMAMBA_INLINE int64_t place(const CausalConvArgs<T>& a, int64_t v, int64_t i, int64_t width) {
  return (v * a.directions + i) * width * kLanes<T>;
}

// The parameters of a task.
template <typename T>
MMVMAMBA_INLINE void load_taps(const CausalConvArgs<T>& a, const CausalScratch<T>& s, const CausalTask<T>& task) {
  for (int64_t v = 0; v < task.vectors(); ++v)
    for (int64_t i = 0; i < a.directions; ++i) {
      const int64_t channel = task.first + v * kLanes<T>, lanes = task.lanes(v);
      T *forward = s.taps + place(a, v, i, a.taps), *backward = s.turned + place(a, v, i, a.taps);
      if (a.reverse[i]) {
        T* const exchanged = forward;
        forward = backward;
        backward = exchanged;
      }
      for (int64_t tap = 0; tap < a.taps; ++tap) {
        const Vec<T> value = load_lanes<T>(a.weight + (i * a.taps + tap) * a.channels + channel, lanes);
        store<T>(forward + tap * kLanes<T>, value);
        store<T>(backward + (a.taps - 1 - tap) * kLanes<T>, value);
      }
      store<T>(s.bias + place(a, v, i, 1), a.bias ? load_lanes<T>(a.bias + i * a.channels + channel, lanes) : Vec<T>{});
    }
}

// Copy positions from .. to - 1 of the sequence, zeros where there are none.
template <typename T, typename S>
MMVMAMBA_INLINE void load_positions(const CausalConvArgs<T>& a, const CausalScratch<T>& s, const CausalTask<T>& task,
                                    int64_t from, int64_t to) {
  const S* const source = static_cast<const S*>(a.x.data) + task.batch * a.x.batch_stride + task.first;
  const int64_t first = from > 0 ? from : 0, last = min_of(to, a.length);
  for (int64_t v = 0; v < task.vectors(); ++v) {
    T* const target = s.x + v * s.x_line - from * kLanes<T>;
    fill(target + from * kLanes<T>, (first - from) * kLanes<T>, T(0));
    fill(target + last * kLanes<T>, (to - last) * kLanes<T>, T(0));
  }
  const int64_t step = a.x.position_stride;
  if (task.count == kCausalBlock * kLanes<T>) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t v = 0; v < kCausalBlock; ++v)
        store<T>(s.x + v * s.x_line + (t - from) * kLanes<T>, load_as<T>(source + t * step + v * kLanes<T>));
    return;
  }
  for (int64_t t = first; t < last; ++t)
    for (int64_t v = 0; v < task.vectors(); ++v)
      store<T>(s.x + v * s.x_line + (t - from) * kLanes<T>,
               load_lanes<T>(source + t * step + v * kLanes<T>, task.lanes(v)));
}

// emit(t, x, z) for `count` positions: `x` holds the inputs that the taps meet, z is the pre-activation. W: the number
// of taps, or 0 for any.
template <typename T, int W, typename Emit>
MMVMAMBA_INLINE void convolve_positions(const T* x, const T* taps, int64_t width, Vec<T> bias, int64_t count,
                                        const Emit& emit) {
  constexpr int64_t L = kLanes<T>;
  if constexpr (W > 0) {
    Vec<T> tap[W];
    for (int j = 0; j < W; ++j) tap[j] = load(taps + j * L);
    for (int64_t t = 0; t < count; ++t) {
      Vec<T> sum = bias;
      for (int j = 0; j < W; ++j) sum += load(x + (t + j) * L) * tap[j];
      emit(t, x + t * L, sum);
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      Vec<T> sum = bias;
      for (int64_t j = 0; j < width; ++j) sum += load(x + (t + j) * L) * load(taps + j * L);
      emit(t, x + t * L, sum);
    }
  }
}

template <typename T, typename S, int W, bool SILU>
void causal_conv_tasks(const CausalConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const CausalScratch<T> s(memory, a);
  constexpr int64_t L = kLanes<T>;
  const int64_t margin = W ? W - 1 : s.margin, row = a.directions * a.channels;
  for (int64_t index = begin; index < end; ++index) {
    const CausalTask<T> task(a, index);
    load_taps(a, s, task);
    load_positions<T, S>(a, s, task, task.begin - margin, task.end + margin);
    for (int64_t i = 0; i < a.directions; ++i)
      for (int64_t v = 0; v < task.vectors(); ++v) {
        const T* const x = s.x + v * s.x_line + (a.reverse[i] ? margin * L : 0);
        S* const out =
            static_cast<S*>(a.out) + (task.batch * a.length + task.begin) * row + i * a.channels + task.first + v * L;
        const int64_t lanes = task.lanes(v);
        convolve_positions<T, W>(
            x, s.taps + place(a, v, i, a.taps), a.taps, load(s.bias + place(a, v, i, 1)), task.end - task.begin,
            [=](int64_t t, const T*, Vec<T> z) { store_lanes<T>(out + t * row, SILU ? silu<T>(z) : z, lanes); });
      }
  }
}

// The gradients of the pre-activation of direction i, vector v, at positions from .. to - 1 of the sequence, into
// s.dz; with kSums, of the positions of the task alone, also what they add to the gradients of the parameters.
template <typename T, typename S, int W, bool SILU, bool kSums>
MMVMAMBA_INLINE void differentiate_positions(const CausalConvArgs<T>& a, const CausalScratch<T>& s,
                                             const CausalTask<T>& task, int64_t v, int64_t i, int64_t from,
                                             int64_t to) {
  constexpr int64_t L = kLanes<T>;
  if (to <= from) return;
  const int64_t lanes = task.lanes(v), step = a.grad_out.position_stride, margin = W ? W - 1 : s.margin;
  const S* const grad = static_cast<const S*>(a.grad_out.data) + task.batch * a.grad_out.batch_stride + from * step +
                        i * a.grad_out.direction_stride + task.first + v * L;
  T* const dz = s.dz + place(a, v, i, s.dz_line / L) + (from - task.begin + margin) * L;
  const T* const x = s.x + v * s.x_line + (from - task.begin + (a.reverse[i] ? 2 * margin : margin)) * L;
  Vec<T> sums[W ? W : 1] = {}, total = {};
  convolve_positions<T, SILU ? W : 1>(x, s.taps + place(a, v, i, a.taps), SILU ? a.taps : 0,
                                      load(s.bias + place(a, v, i, 1)), to - from,
                                      [&](int64_t t, const T* inputs, Vec<T> z) {
                                        Vec<T> value = load_lanes<T>(grad + t * step, lanes);
                                        if (SILU) value *= silu_slope<T>(z);
                                        store<T>(dz + t * L, value);
                                        if constexpr (kSums) {
                                          total += value;
                                          for (int j = 0; j < W; ++j) sums[j] += value * load(inputs + j * L);
                                        }
                                      });
  if constexpr (!kSums) return;
  store<T>(s.dbias + place(a, v, i, 1), total);
  T* const dtaps = s.dtaps + place(a, v, i, a.taps);
  for (int j = 0; j < W; ++j) store<T>(dtaps + j * L, sums[j]);
  if constexpr (W == 0)
    for (int64_t j = 0; j < a.taps; ++j) store<T>(dtaps + j * L, sum_row(dz, x + j * L, to - from));
}

// All gradients of the pre-activations that the gradients of a task need: those of its own positions, and of those
// which its inputs reach. Zeros where the sequence has no position.
template <typename T, typename S, int W, bool SILU>
MMVMAMBA_INLINE void differentiate_task(const CausalConvArgs<T>& a, const CausalScratch<T>& s,
                                        const CausalTask<T>& task, int64_t v, int64_t i) {
  constexpr int64_t L = kLanes<T>;
  const int64_t margin = W ? W - 1 : s.margin;
  differentiate_positions<T, S, W, SILU, true>(a, s, task, v, i, task.begin, task.end);
  if (!a.dx) return;
  T* const dz = s.dz + place(a, v, i, s.dz_line / L) + (margin - task.begin) * L;  // of position 0
  if (a.reverse[i]) {
    const int64_t from = task.begin > margin ? task.begin - margin : 0;
    differentiate_positions<T, S, W, SILU, false>(a, s, task, v, i, from, task.begin);
    fill(dz + (task.begin - margin) * L, (from - task.begin + margin) * L, T(0));
  } else {
    const int64_t to = min_of(a.length, task.end + margin);
    differentiate_positions<T, S, W, SILU, false>(a, s, task, v, i, task.end, to);
    fill(dz + to * L, (task.end + margin - to) * L, T(0));
  }
}

// The gradient of x at N positions from t on, counted from the start of the task.
template <typename T, typename S, int W, int N>
MMVMAMBA_INLINE void input_gradient(const CausalConvArgs<T>& a, const CausalScratch<T>& s, const CausalTask<T>& task,
                                    int64_t v, int64_t t) {
  constexpr int64_t L = kLanes<T>;
  const int64_t margin = W ? W - 1 : s.margin, taps = W ? W : a.taps;
  Vec<T> sum[N] = {};
  for (int64_t i = 0; i < a.directions; ++i) {
    const T* const dz = s.dz + place(a, v, i, s.dz_line / L) + (t + (a.reverse[i] ? 0 : margin)) * L;
    const T* const turned = s.turned + place(a, v, i, a.taps);
    for (int64_t j = 0; j < taps; ++j) {
      const Vec<T> tap = load(turned + j * L);
      for (int n = 0; n < N; ++n) sum[n] += load(dz + (n + j) * L) * tap;
    }
  }
  S* const dx = static_cast<S*>(a.dx) + (task.batch * a.length + task.begin + t) * a.channels + task.first + v * L;
  const int64_t lanes = task.lanes(v);
  for (int n = 0; n < N; ++n) store_lanes<T>(dx + n * a.channels, sum[n], lanes);
}

template <typename T>
MMVMAMBA_INLINE void store_sums(const CausalConvArgs<T>& a, const CausalScratch<T>& s, const CausalTask<T>& task) {
  for (int64_t v = 0; v < task.vectors(); ++v)
    for (int64_t i = 0; i < a.directions; ++i) {
      const int64_t channel = task.first + v * kLanes<T>, lanes = task.lanes(v);
      const int64_t slice = task.slice * a.directions + i;
      for (int64_t tap = 0; a.dweight && tap < a.taps; ++tap) {
        const int64_t met = a.reverse[i] ? a.taps - 1 - tap : tap;
        store_lanes<T>(a.dweight + (slice * a.taps + tap) * a.channels + channel,
                       load(s.dtaps + place(a, v, i, a.taps) + met * kLanes<T>), lanes);
      }
      if (a.dbias) store_lanes<T>(a.dbias + slice * a.channels + channel, load(s.dbias + place(a, v, i, 1)), lanes);
    }
}

template <typename T, typename S, int W, bool SILU>
void causal_conv_backward_tasks(const CausalConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const CausalScratch<T> s(memory, a);
  const int64_t margin = W ? W - 1 : s.margin;
  for (int64_t index = begin; index < end; ++index) {
    const CausalTask<T> task(a, index);
    load_taps(a, s, task);
    load_positions<T, S>(a, s, task, task.begin - 2 * margin, task.end + 2 * margin);
    const int64_t count = task.end - task.begin;
    for (int64_t v = 0; v < task.vectors(); ++v) {
      for (int64_t i = 0; i < a.directions; ++i) differentiate_task<T, S, W, SILU>(a, s, task, v, i);
      if (!a.dx) continue;
      int64_t t = 0;
      for (; t + kPositions <= count; t += kPositions) input_gradient<T, S, W, kPositions>(a, s, task, v, t);
      for (; t < count; ++t) input_gradient<T, S, W, 1>(a, s, task, v, t);
    }
    store_sums(a, s, task);
  }
}

// Choose the instance; four taps, what every published model has, is one with a constant number.
#define MMVMAMBA_BY_TAPS(function, S, a, begin, end, memory)                                                          \
  if (a.taps == 4)                                                                                                    \
    return a.silu ? function<T, S, 4, true>(a, begin, end, memory) : function<T, S, 4, false>(a, begin, end, memory); \
  return a.silu ? function<T, S, 0, true>(a, begin, end, memory) : function<T, S, 0, false>(a, begin, end, memory);

#define MMVMAMBA_CAUSAL_BY_STORAGE(function, a, begin, end, memory) \
  if constexpr (sizeof(T) == sizeof(float)) {                       \
    if (a.storage == Element::kBFloat16) {                          \
      MMVMAMBA_BY_TAPS(function, BFloat16, a, begin, end, memory)   \
    }                                                               \
    if (a.storage == Element::kFloat16) {                           \
      MMVMAMBA_BY_TAPS(function, Float16, a, begin, end, memory)    \
    }                                                               \
  }                                                                 \
  MMVMAMBA_BY_TAPS(function, T, a, begin, end, memory)

template <typename T>
void causal_conv_by_storage(const CausalConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  MMVMAMBA_CAUSAL_BY_STORAGE(causal_conv_tasks, a, begin, end, memory)
}

template <typename T>
void causal_conv_backward_by_storage(const CausalConvArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  MMVMAMBA_CAUSAL_BY_STORAGE(causal_conv_backward_tasks, a, begin, end, memory)
}

}  // namespace
}  // namespace mmvmamba
