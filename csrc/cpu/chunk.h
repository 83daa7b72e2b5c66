// A chunk of a scan, forward: kChunk positions of a block of channels.
//
// Vector lanes are channels, NV vectors wide; the recurrence runs over positions. An operator points the rows of a
// chunk at its tensors, or at scratch memory where the numbers do not lie there as whole vectors of type T; the
// arithmetic is here, once for all operators, and in chunk_backward.h.
#pragma once

#include "convert.h"
#include "kernels.h"
#include "tile.h"

namespace mmvmamba {
namespace {

#define MMVMAMBA_NOINLINE __attribute__((noinline))

template <typename T>
constexpr int64_t kMaxBlock = 4 * kLanes<T>;  // channels

MMVMAMBA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MMVMAMBA_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels per task: the widest of 4, 3, 2 vectors that wastes the fewest lanes, preferring an even number of blocks
// (two threads then get equal work). Depends on the shape alone: the order of sums must not depend on threads.
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

// Scratch of one thread and the chunk it works on. Arrays over channels have rows of one block; arrays over positions
// have rows of kChunk.
template <typename T>
struct Scratch {
  // Rows of the present chunk, by position: inputs, output, gradients of the output and of u.
  const T *u[kChunk], *dt[kChunk], *B[kChunk], *C[kChunk], *dy[kChunk];
  T *y[kChunk], *du[kChunk];

  T *u_rows, *y_rows, *dy_rows, *du_rows;  // (kChunk, block)
  T* delta;                                // (kChunk, block); forward: in units of ln 2
  T* slope;                                // (kChunk, block): derivative of softplus
  T *decay, *before;                       // (kChunk + 1, block): of one state; state before the step
  T* factor;                               // (kChunk, block): the second factor of the decay, see exp2_factors
  T* ddelta;                               // (kChunk, block)
  T *h, *q, *A, *dA;                       // (n, block); q: gradient of the state; A: log2 of the decay per delta
  T *D, *dD, *bias, *dbias;                // (block); bias, W: times log2(e)
  T *W, *dW;                               // (r, block)
  T *B_rows, *C_rows;                      // (kChunk, n)
  T* feature_rows;                         // (kChunk, r + 2 n, up to whole tiles)
  T *dB_lanes, *dC_lanes;                  // (kChunk, lanes): before the sum over channels
  T* dfeatures;                            // (r + 2 n, up to whole tiles; kChunk): gradients of dt, B, C
  T* dfeature_rows;                        // (kChunk, r + 2 n, up to whole tiles)
  T* transposed;                           // (block, kChunk)
  int64_t states, rank, features;          // features: rows of dfeatures
  bool bounded;                            // no decay is above 1
  bool has_D;
  int64_t size;

  Scratch(T* base, int64_t n, int64_t r) : states(n), rank(r), bounded(false), has_D(false) {
    constexpr int64_t kRow = kMaxBlock<T>, kLine = 64 / sizeof(T);  // every array starts a cache line
    features = ceil_div(r + 2 * n, 16) * 16;
    size = 0;
    auto take = [base, this](int64_t elements) {
      T* here = base == nullptr ? nullptr : base + size;
      size += ceil_div(elements, kLine) * kLine;
      return here;
    };
    u_rows = take(kChunk * kRow);
    y_rows = take(kChunk * kRow);
    dy_rows = take(kChunk * kRow);
    du_rows = take(kChunk * kRow);
    delta = take(kChunk * kRow);
    slope = take(kChunk * kRow);
    ddelta = take(kChunk * kRow);
    transposed = take(kChunk * kRow);
    decay = take((kChunk + 1) * kRow);
    before = take((kChunk + 1) * kRow);
    factor = take(kChunk * kRow);
    h = take(n * kRow);
    q = take(n * kRow);
    A = take(n * kRow);
    dA = take(n * kRow);
    D = take(kRow);
    dD = take(kRow);
    bias = take(kRow);
    dbias = take(kRow);
    W = take(r * kRow);
    dW = take(r * kRow);
    B_rows = take(kChunk * n);
    C_rows = take(kChunk * n);
    feature_rows = take(kChunk * features);
    dB_lanes = take(kChunk * kLanes<T>);
    dC_lanes = take(kChunk * kLanes<T>);
    dfeatures = take(features * kChunk);
    dfeature_rows = take(features * kChunk);
  }
};

// Elements of scratch that a thread needs.
template <typename T>
int64_t workspace(int64_t states, int64_t rank) {
  return Scratch<T>(nullptr, states, rank).size;
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

// `width` numbers from index `at` on as a row padded with zeros to whole vectors.
template <typename T, typename S>
MMVMAMBA_INLINE void convert_row(T* row, const S* source, int64_t width, int64_t block) {
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>) store<T>(row + c, load_as<T>(source + c));
  if (c < width) {
    store<T>(row + c, load_part<T>(source + c, width - c));
    c += kLanes<T>;
  }
  for (; c < block; c += kLanes<T>) store<T>(row + c, Vec<T>{});
}

// A row of an input as type T and whole vectors: where it lies, or copied to `scratch`.
template <typename T>
MMVMAMBA_INLINE const T* input_row(const Input<T>& input, int64_t at, T* scratch, int64_t width, int64_t block) {
  if (input.element == Element::kSame) {
    const T* source = static_cast<const T*>(input.data) + at;
    if (width == block) return source;
    load_row(scratch, source, width, block);
    return scratch;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (input.element == Element::kBFloat16)
      convert_row<T>(scratch, static_cast<const BFloat16*>(input.data) + at, width, block);
    else
      convert_row<T>(scratch, static_cast<const Float16*>(input.data) + at, width, block);
  }
  return scratch;
}

template <typename T>
MMVMAMBA_INLINE void store_row(T* target, const T* row, int64_t width) {
  __builtin_memcpy(target, row, width * sizeof(T));
}

template <typename T>
MMVMAMBA_INLINE void add_row(T* target, const T* row, int64_t width) {
  for (int64_t c = 0; c < width; ++c) target[c] += row[c];
}

// Parameters of a block of channels, A (d, n), W (d, r), D and bias (d), as the chunks want them: rows of channels,
// padded with zeros; W and bias in units of ln 2. W, D and bias may be null. kBackward: of the backward pass.
template <typename T, int NV, bool kBackward>
MMVMAMBA_NOINLINE void load_parameters(Scratch<T>& s, const T* A, const T* W, const T* D, const T* bias, int64_t width,
                                       bool use_softplus) {
  constexpr int64_t block = NV * kLanes<T>;
  fill(s.A, s.states * block, T(0));
  transpose(s.A, block, A, s.states, width, s.states);
  s.bounded = use_softplus;
  for (int64_t i = 0; i < s.states * block; ++i) s.bounded = s.bounded && s.A[i] <= T(0);
  // Forward, delta is in units of ln 2, so that A delta is the binary logarithm of the decay. Backward it is not.
  if (kBackward)
    for (int64_t i = 0; i < s.states * block; ++i) s.A[i] *= T(kLog2E);
  fill(s.W, s.rank * block, T(0));
  if (W != nullptr) transpose(s.W, block, W, s.rank, width, s.rank);
  for (int64_t i = 0; i < s.rank * block; ++i) s.W[i] *= T(kLog2E);
  s.has_D = D != nullptr;
  fill(s.D, block, T(0));
  if (D != nullptr) store_row(s.D, D, width);
  fill(s.bias, block, T(0));
  if (bias != nullptr)
    for (int64_t c = 0; c < width; ++c) s.bias[c] = bias[c] * T(kLog2E);
}

// delta and its slope from z, the input of softplus in units of ln 2.
template <typename T, bool kBackward>
MMVMAMBA_INLINE void finish_delta(T* delta_at, T* slope_at, Vec<T> z, bool use_softplus) {
  Vec<T> delta = z;
  if (use_softplus) {
    Vec<T> e;
    delta = softplus2(z, e);
    if (kBackward) store<T>(slope_at, softplus_slope(z, e));
  } else if (kBackward) {
    store<T>(slope_at, splat(T(1)));
  }
  store<T>(delta_at, kBackward ? delta * T(kLn2) : delta);
}

// Positions whose projections share the loads of W.
#if MMVMAMBA_WHOLE_VECTOR_SHUFFLES
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

template <typename T, int NV, int kPositions, bool kBackward>
MMVMAMBA_INLINE void project_positions(Scratch<T>& s, int64_t t, bool use_softplus) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  const T *W = s.W, *rows[kPositions];
  V z[kPositions][NV];
  for (int p = 0; p < kPositions; ++p) {
    rows[p] = s.dt[t + p];
    for (int v = 0; v < NV; ++v) z[p][v] = load(s.bias + v * kLanes<T>);
  }
  for (int64_t r = 0, rank = s.rank; r < rank; ++r) {
    V w[NV];
    for (int v = 0; v < NV; ++v) w[v] = load(W + r * block + v * kLanes<T>);
    for (int p = 0; p < kPositions; ++p) {
      const T dt = rows[p][r];
      for (int v = 0; v < NV; ++v) z[p][v] += w[v] * dt;
    }
  }
  T *const delta = s.delta, *const slope = s.slope;
  for (int p = 0; p < kPositions; ++p)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (t + p) * block + v * kLanes<T>;
      finish_delta<T, kBackward>(delta + at, slope + at, z[p][v], use_softplus);
    }
}

// The step sizes of a chunk from the features s.dt.
template <typename T, int NV, bool kBackward>
MMVMAMBA_NOINLINE void project_chunk(Scratch<T>& s, int64_t steps, bool use_softplus) {
  int64_t t = 0;
  for (; t + kTogether <= steps; t += kTogether) project_positions<T, NV, kTogether, kBackward>(s, t, use_softplus);
  for (; t < steps; ++t) project_positions<T, NV, 1, kBackward>(s, t, use_softplus);
}

// The step sizes of a chunk from s.delta, which holds them before the bias.
template <typename T, int NV, bool kBackward>
MMVMAMBA_NOINLINE void finish_chunk(Scratch<T>& s, int64_t steps, bool use_softplus) {
  constexpr int64_t block = NV * kLanes<T>;
  for (int64_t t = 0; t < steps; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * block + v * kLanes<T>;
      const Vec<T> z = load(s.delta + at) * T(kLog2E) + load(s.bias + v * kLanes<T>);
      finish_delta<T, kBackward>(s.delta + at, s.slope + at, z, use_softplus);
    }
}

// kStates states of a chunk from state n on: they are carried through, y receives the sum of C h. kBounded: no decay is
// above 1.
template <typename T, int NV, int kStates, bool kBounded>
MMVMAMBA_INLINE void scan_states(Scratch<T>& s, int64_t n, int64_t steps, bool first, bool add_to_y) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  // Copies of the pointers: the compiler would load them again after every store.
  const T *const deltas = s.delta, *const D = s.D;
  const bool has_D = s.has_D;  // an infinite u times a D of zero would be NaN
  V A[kStates][NV], h[kStates][NV];
  for (int i = 0; i < kStates; ++i)
    for (int v = 0; v < NV; ++v) {
      A[i][v] = load(s.A + (n + i) * block + v * kLanes<T>);
      h[i][v] = load(s.h + (n + i) * block + v * kLanes<T>);
    }
  for (int64_t t = 0; t < steps; ++t) {
    T B[kStates], C[kStates];
    for (int i = 0; i < kStates; ++i) {
      B[i] = s.B[t][n + i] * T(kLn2);
      C[i] = s.C[t][n + i];
    }
    const T* const u_row = s.u[t];
    T* const y = s.y[t];
    for (int v = 0; v < NV; ++v) {
      const V delta = load(deltas + t * block + v * kLanes<T>), u = load(u_row + v * kLanes<T>);
      const V input = delta * u;
      V sum = !first ? load(y + v * kLanes<T>) : has_D ? load(D + v * kLanes<T>) * u : V{};
      if (first && add_to_y) sum += load(y + v * kLanes<T>);
      for (int i = 0; i < kStates; ++i) {
        if constexpr (kBounded) {
          h[i][v] = h[i][v] * exp2_bounded(delta * A[i][v]) + input * B[i];
        } else {
          V factor, power;
          exp2_factors(delta * A[i][v], factor, power);
          h[i][v] = h[i][v] * factor * power + input * B[i];
        }
        sum += h[i][v] * C[i];
      }
      store<T>(y + v * kLanes<T>, sum);
    }
  }
  for (int i = 0; i < kStates; ++i)
    for (int v = 0; v < NV; ++v) store<T>(s.h + (n + i) * block + v * kLanes<T>, h[i][v]);
}

template <typename T, int NV, bool kBounded>
MMVMAMBA_INLINE void scan_all_states(Scratch<T>& s, int64_t steps, bool add_to_y) {
  int64_t n = s.states % 2;
  if (n == 0) {
    scan_states<T, NV, 2, kBounded>(s, 0, steps, true, add_to_y);
    n = 2;
  } else if (add_to_y) {  // the most frequent case gets a loop without the question
    scan_states<T, NV, 1, kBounded>(s, 0, steps, true, true);
  } else {
    scan_states<T, NV, 1, kBounded>(s, 0, steps, true, false);
  }
  for (; n < s.states; n += 2) scan_states<T, NV, 2, kBounded>(s, n, steps, false, true);
}

// y = D u + sum over states of C h, or added to what y holds, for one chunk; the states s.h are carried on.
template <typename T, int NV>
MMVMAMBA_NOINLINE void scan_chunk(Scratch<T>& s, int64_t steps, bool add_to_y) {
  if (s.bounded)
    scan_all_states<T, NV, true>(s, steps, add_to_y);
  else
    scan_all_states<T, NV, false>(s, steps, add_to_y);
}

}  // namespace
}  // namespace mmvmamba
