// The scan kernels. Included by kernels_<instruction set>.cpp and compiled once for each.
//
// Vector lanes are channels, NV vectors wide; the recurrence runs over positions in chunks of kChunk whose inputs
// are gathered into scratch arrays, so that both operators share the arithmetic of this file and differ in how they
// gather (selective_scan_impl.h, scan2d_impl.h).
#pragma once

#include "kernels.h"
#include "vec.h"

namespace mmvmamba {
namespace {

template <typename T>
constexpr int64_t kMaxBlock = 4 * kLanes<T>;

MMVMAMBA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MMVMAMBA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels per task: the widest of 4, 3, 2 vectors that wastes the fewest lanes, preferring an even number of blocks
// (two threads then get equal work). Depends on the shape alone: the order of sums must not depend on the machine.
template <typename T>
int64_t block_width(int64_t channels) {
  if (channels <= kLanes<T>) return kLanes<T>;
  int64_t best = 0, best_cost = 0;
  for (int64_t vectors = 4; vectors >= 2; --vectors) {
    const int64_t width = vectors * kLanes<T>;
    const int64_t blocks = ceil_div(channels, width);
    const int64_t cost = 2 * blocks * width + (blocks % 2);
    if (best == 0 || cost < best_cost) {
      best = width;
      best_cost = cost;
    }
  }
  return best;
}

// Scratch of one thread. Arrays over channels have rows of kMaxBlock elements, whatever the block.
template <typename T>
struct Scratch {
  T *u, *delta, *slope, *y, *du, *ddelta;  // (kChunk, block); slope: derivative of softplus
  T *decay, *before;                       // (kChunk + 1, block): exp(delta A), state before the step
  T *h, *q, *A, *dA;                       // (n, block); q: gradient of the state
  T *D, *dD, *bias, *dbias;                // (block)
  T *W, *dW;                               // (r, block)
  T *B, *C, *dB, *dC;                      // (kChunk, n)
  T *dt, *ddt;                             // (kChunk, r)
  T* transposed;                           // (block, kChunk)
  int64_t size;

  Scratch(T* base, int64_t n, int64_t r) {
    constexpr int64_t W_ = kMaxBlock<T>;
    T* next = base;
    auto take = [&next](int64_t elements) {
      T* here = next;
      next += ceil_div(elements, kLanes<T>) * kLanes<T>;
      return here;
    };
    u = take(kChunk * W_);
    delta = take(kChunk * W_);
    slope = take(kChunk * W_);
    y = take(kChunk * W_);
    du = take(kChunk * W_);
    ddelta = take(kChunk * W_);
    decay = take((kChunk + 1) * W_);
    before = take((kChunk + 1) * W_);
    h = take(n * W_);
    q = take(n * W_);
    A = take(n * W_);
    dA = take(n * W_);
    D = take(W_);
    dD = take(W_);
    bias = take(W_);
    dbias = take(W_);
    W = take(r * W_);
    dW = take(r * W_);
    B = take(kChunk * n);
    C = take(kChunk * n);
    dB = take(kChunk * n);
    dC = take(kChunk * n);
    dt = take(kChunk * r);
    ddt = take(kChunk * r);
    transposed = take(W_ * kChunk);
    size = next - base;
  }
};

template <typename T>
int64_t workspace(int64_t states, int64_t rank) {
  return Scratch<T>(static_cast<T*>(nullptr), states, rank).size;
}

template <typename T>
MMVMAMBA_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Copy `width` channels and pad the row with zeros up to the block.
template <typename T>
MMVMAMBA_INLINE void load_row(T* row, const T* source, int64_t width, int64_t block) {
  __builtin_memcpy(row, source, width * sizeof(T));
  for (int64_t c = width; c < block; ++c) row[c] = T(0);
}

template <typename T>
MMVMAMBA_INLINE void load_row_or(T* row, const T* source, T otherwise, int64_t width, int64_t block) {
  if (source != nullptr)
    load_row(row, source, width, block);
  else
    fill(row, block, otherwise);
}

template <typename T>
MMVMAMBA_INLINE void store_row(T* target, const T* row, int64_t width) {
  __builtin_memcpy(target, row, width * sizeof(T));
}

template <typename T>
MMVMAMBA_INLINE void add_row(T* target, const T* row, int64_t width) {
  for (int64_t c = 0; c < width; ++c) target[c] += row[c];
}

// The step sizes of a chunk, in place: delta holds the values before the bias.
template <typename T, int NV>
MMVMAMBA_INLINE void finish_delta(Scratch<T>& s, int64_t steps, bool use_softplus) {
  for (int64_t t = 0; t < steps; ++t) {
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * kMaxBlock<T> + v * kLanes<T>;
      const Vec<T> raw = load(s.delta + at) + load(s.bias + v * kLanes<T>);
      if (use_softplus) {
        Vec<T> slope;
        store<T>(s.delta + at, softplus<T>(raw, slope));
        store<T>(s.slope + at, slope);
      } else {
        store<T>(s.delta + at, raw);
      }
    }
  }
}

// y = D u + sum over states of C h, for one chunk; the states s.h are carried from chunk to chunk.
template <typename T, int NV>
MMVMAMBA_INLINE void scan_chunk(Scratch<T>& s, int64_t steps, int64_t states) {
  typedef Vec<T> V;
  constexpr int64_t row = kMaxBlock<T>;
  for (int64_t t = 0; t < steps; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * row + v * kLanes<T>;
      store<T>(s.y + at, load(s.D + v * kLanes<T>) * load(s.u + at));
    }
  for (int64_t n = 0; n < states; ++n) {
    V A[NV], h[NV];
    for (int v = 0; v < NV; ++v) {
      A[v] = load(s.A + n * row + v * kLanes<T>);
      h[v] = load(s.h + n * row + v * kLanes<T>);
    }
    for (int64_t t = 0; t < steps; ++t) {
      const T B = s.B[t * states + n], C = s.C[t * states + n];
      for (int v = 0; v < NV; ++v) {
        const int64_t at = t * row + v * kLanes<T>;
        const V delta = load(s.delta + at);
        h[v] = exp_vec(delta * A[v]) * h[v] + delta * load(s.u + at) * B;
        store<T>(s.y + at, load(s.y + at) + h[v] * C);
      }
    }
    for (int v = 0; v < NV; ++v) store<T>(s.h + n * row + v * kLanes<T>, h[v]);
  }
}

// Sum over the channels of the block. Lanes beyond its width hold padding, which may be NaN where B is not finite.
template <typename T, int NV>
MMVMAMBA_INLINE T sum_block(const Vec<T>* value, const VecMask<T>* valid) {
  Vec<T> sum = valid[0] ? value[0] : Vec<T>{};
  for (int v = 1; v < NV; ++v) sum += valid[v] ? value[v] : Vec<T>{};
  return sum_lanes(sum);
}

template <typename T, int NV>
MMVMAMBA_INLINE void make_mask(VecMask<T>* valid, int64_t width) {
  for (int v = 0; v < NV; ++v)
    for (int i = 0; i < kLanes<T>; ++i) valid[v][i] = v * kLanes<T> + i < width ? -1 : 0;
}

// Gradients of one chunk. In: s.y holds the gradient of the output, s.h the states before the chunk, s.q the gradient
// of the states after it. Out: s.du, s.ddelta (before the bias), s.dB, s.dC; s.q, s.dA, s.dD, s.dbias are carried on.
template <typename T, int NV>
MMVMAMBA_INLINE void scan_chunk_backward(Scratch<T>& s, int64_t steps, int64_t states, int64_t width,
                                         bool use_softplus) {
  typedef Vec<T> V;
  constexpr int64_t row = kMaxBlock<T>;
  VecMask<T> valid[NV] = {};
  make_mask<T, NV>(valid, width);
  // Sums over positions are taken within the chunk first: long sequences then lose no precision.
  V dD[NV] = {}, dbias[NV] = {};
  for (int64_t t = 0; t < steps; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * row + v * kLanes<T>;
      const V dy = load(s.y + at);
      store<T>(s.du + at, load(s.D + v * kLanes<T>) * dy);
      store<T>(s.ddelta + at, V{});
      dD[v] += dy * load(s.u + at);
    }
  for (int64_t n = 0; n < states; ++n) {
    V A[NV], q[NV], dA[NV];
    for (int v = 0; v < NV; ++v) {
      A[v] = load(s.A + n * row + v * kLanes<T>);
      q[v] = load(s.q + n * row + v * kLanes<T>);
      dA[v] = V{};
      store<T>(s.before + v * kLanes<T>, load(s.h + n * row + v * kLanes<T>));
    }
    for (int64_t t = 0; t < steps; ++t) {
      const T B = s.B[t * states + n];
      for (int v = 0; v < NV; ++v) {
        const int64_t at = t * row + v * kLanes<T>;
        const V delta = load(s.delta + at);
        const V decay = exp_vec(delta * A[v]);
        store<T>(s.decay + at, decay);
        store<T>(s.before + at + row, decay * load(s.before + at) + delta * load(s.u + at) * B);
      }
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
      const T B = s.B[t * states + n], C = s.C[t * states + n];
      V dB[NV], dC[NV];
      for (int v = 0; v < NV; ++v) {
        const int64_t at = t * row + v * kLanes<T>;
        const V dy = load(s.y + at), delta = load(s.delta + at), u = load(s.u + at), decay = load(s.decay + at);
        const V dh = q[v] + dy * C;
        dC[v] = dy * load(s.before + at + row);
        dB[v] = dh * delta * u;
        store<T>(s.du + at, load(s.du + at) + dh * delta * B);
        const V drate = dh * load(s.before + at) * decay;  // gradient of delta A
        store<T>(s.ddelta + at, load(s.ddelta + at) + drate * A[v] + dh * u * B);
        dA[v] += drate * delta;
        q[v] = dh * decay;
      }
      s.dB[t * states + n] = sum_block<T, NV>(dB, valid);
      s.dC[t * states + n] = sum_block<T, NV>(dC, valid);
    }
    for (int v = 0; v < NV; ++v) {
      store<T>(s.q + n * row + v * kLanes<T>, q[v]);
      store<T>(s.dA + n * row + v * kLanes<T>, load(s.dA + n * row + v * kLanes<T>) + dA[v]);
    }
  }
  for (int64_t t = 0; t < steps; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * row + v * kLanes<T>;
      V ddelta = load(s.ddelta + at);
      if (use_softplus) ddelta *= load(s.slope + at);
      store<T>(s.ddelta + at, ddelta);
      dbias[v] += ddelta;
    }
  for (int v = 0; v < NV; ++v) {
    store<T>(s.dD + v * kLanes<T>, load(s.dD + v * kLanes<T>) + dD[v]);
    store<T>(s.dbias + v * kLanes<T>, load(s.dbias + v * kLanes<T>) + dbias[v]);
  }
}

// Start the gradient sums of a task.
template <typename T>
MMVMAMBA_INLINE void clear_gradients(Scratch<T>& s, int64_t states) {
  fill(s.dA, states * kMaxBlock<T>, T(0));
  fill(s.dD, kMaxBlock<T>, T(0));
  fill(s.dbias, kMaxBlock<T>, T(0));
}

// Read (block, n), stored channel by channel, into rows of states.
template <typename T>
MMVMAMBA_INLINE void load_transposed(T* rows, const T* source, int64_t count, int64_t width, int64_t block) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < block; ++c) rows[n * kMaxBlock<T> + c] = c < width ? source[c * count + n] : T(0);
}

template <typename T>
MMVMAMBA_INLINE void store_transposed(T* target, const T* rows, int64_t count, int64_t width) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t c = 0; c < width; ++c) target[c * count + n] = rows[n * kMaxBlock<T> + c];
}

}  // namespace
}  // namespace mmvmamba
