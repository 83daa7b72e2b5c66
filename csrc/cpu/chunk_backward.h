// A chunk of a scan, backward: the forward is replayed from the state before the chunk, then the adjoint recurrence
// runs from the last position to the first.
#pragma once

#include "chunk.h"

namespace mmvmamba {
namespace {

template <typename T, int NV>
struct LaneMask {
  VecMask<T> valid[NV];

  explicit LaneMask(int64_t width) {
    for (int v = 0; v < NV; ++v)
      for (int i = 0; i < kLanes<T>; ++i) valid[v][i] = v * kLanes<T> + i < width ? -1 : 0;
  }
};

// What the loop over the positions of one state adds to, per channel.
template <typename T, int NV>
struct ChannelSums {
  Vec<T> dA[NV], dD[NV];

  ChannelSums() {
    for (int v = 0; v < NV; ++v) dA[v] = dD[v] = Vec<T>{};
  }
};

// Decay (as two factors unless kBounded) and state before each position of the chunk, for state n.
template <typename T, int NV, bool kBounded>
MMVMAMBA_INLINE void replay_state(Scratch<T>& s, int64_t n, int64_t steps) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  // Copies of the pointers: the compiler would load them again after every store.
  const T* const deltas = s.delta;
  T *const decays = s.decay, *const factors = s.factor, *const befores = s.before;
  V A[NV], h[NV];
  for (int v = 0; v < NV; ++v) {
    A[v] = load(s.A + n * block + v * kLanes<T>);
    h[v] = load(s.h + n * block + v * kLanes<T>);
    store<T>(befores + v * kLanes<T>, h[v]);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const T B = s.B[t][n];
    const T* const u_row = s.u[t];
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * block + v * kLanes<T>;
      const V delta = load(deltas + at), u = load(u_row + v * kLanes<T>);
      V decay;
      if constexpr (kBounded) {
        decay = exp2_bounded(delta * A[v]);
        h[v] = h[v] * decay + delta * u * B;
      } else {
        V second;
        exp2_factors(delta * A[v], decay, second);
        h[v] = h[v] * decay * second + delta * u * B;
        store<T>(factors + at, second);
      }
      store<T>(decays + at, decay);
      store<T>(befores + at + block, h[v]);
    }
  }
}

// The adjoint of state n. kFirst: du and ddelta are started, else added to. Sums over channels are left in lanes.
template <typename T, int NV, bool kBounded, bool kFirst>
MMVMAMBA_INLINE void adjoint_state(Scratch<T>& s, int64_t n, int64_t steps, bool add_to_du, const LaneMask<T, NV>& mask,
                                   ChannelSums<T, NV>& sums) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  const T *const deltas = s.delta, *const decays = s.decay, *const factors = s.factor, *const befores = s.before;
  const T* const D = s.D;
  const bool has_D = s.has_D;
  T *const ddeltas = s.ddelta, *const dB_lanes = s.dB_lanes, *const dC_lanes = s.dC_lanes;
  V A[NV], q[NV];
  // s.A is the binary logarithm of the decay per delta.
  for (int v = 0; v < NV; ++v) {
    A[v] = load(s.A + n * block + v * kLanes<T>) * T(kLn2);
    q[v] = load(s.q + n * block + v * kLanes<T>);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const T B = s.B[t][n], C = s.C[t][n];
    const T *const dy_row = s.dy[t], *const u_row = s.u[t];
    T* const du_row = s.du[t];
    V dB{}, dC{};
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * block + v * kLanes<T>;
      const V dy = load(dy_row + v * kLanes<T>), u = load(u_row + v * kLanes<T>);
      const V delta = load(deltas + at), decay = load(decays + at), before = load(befores + at);
      const V dh = q[v] + dy * C;
      dC += keep<T>(mask.valid[v], dy * load(befores + at + block));
      dB += keep<T>(mask.valid[v], dh * (delta * u));
      const V dinput = dh * B;  // gradient of delta u
      V drate;                  // gradient of delta A
      if constexpr (kBounded) {
        q[v] = dh * decay;
        drate = q[v] * before;
      } else {
        const V second = load(factors + at);
        q[v] = dh * decay * second;
        drate = dh * (before * decay * second);
      }
      sums.dA[v] += drate * delta;
      V du = dinput * delta, ddelta = drate * A[v] + dinput * u;
      if constexpr (kFirst) {
        if (has_D) du += load(D + v * kLanes<T>) * dy;
        sums.dD[v] += dy * u;
        if (add_to_du) du += load(du_row + v * kLanes<T>);
      } else {
        du += load(du_row + v * kLanes<T>);
        ddelta += load(ddeltas + at);
      }
      store<T>(du_row + v * kLanes<T>, du);
      store<T>(ddeltas + at, ddelta);
    }
    store<T>(dB_lanes + t * kLanes<T>, dB);
    store<T>(dC_lanes + t * kLanes<T>, dC);
  }
  for (int v = 0; v < NV; ++v) store<T>(s.q + n * block + v * kLanes<T>, q[v]);
}

template <typename T, int NV>
MMVMAMBA_INLINE void add_to_row(T* row, const Vec<T>* sums) {
  for (int v = 0; v < NV; ++v) store<T>(row + v * kLanes<T>, load(row + v * kLanes<T>) + sums[v]);
}

// Gradients of state n of a chunk; dB and dC go to rows of dfeatures.
template <typename T, int NV, bool kBounded, bool kFirst>
MMVMAMBA_INLINE void state_backward(Scratch<T>& s, int64_t n, int64_t steps, bool add_to_du,
                                    const LaneMask<T, NV>& mask) {
  // Sums over positions are taken within the chunk first: long sequences then lose no precision.
  ChannelSums<T, NV> sums;
  replay_state<T, NV, kBounded>(s, n, steps);
  adjoint_state<T, NV, kBounded, kFirst>(s, n, steps, add_to_du, mask, sums);
  add_to_row<T, NV>(s.dA + n * NV * kLanes<T>, sums.dA);
  if (kFirst) add_to_row<T, NV>(s.dD, sums.dD);
  const int64_t unused = (kChunk - steps) * kLanes<T>;
  fill(s.dB_lanes + steps * kLanes<T>, unused, T(0));
  fill(s.dC_lanes + steps * kLanes<T>, unused, T(0));
  for (int64_t t = 0; t < steps; t += kLanes<T>) {
    sum_rows(s.dB_lanes + t * kLanes<T>, s.dfeatures + (s.rank + n) * kChunk + t);
    sum_rows(s.dC_lanes + t * kLanes<T>, s.dfeatures + (s.rank + s.states + n) * kChunk + t);
  }
}

template <typename T, int NV, bool kBounded>
MMVMAMBA_INLINE void states_backward(Scratch<T>& s, int64_t steps, bool add_to_du, const LaneMask<T, NV>& mask) {
  state_backward<T, NV, kBounded, true>(s, 0, steps, add_to_du, mask);
  for (int64_t n = 1; n < s.states; ++n) state_backward<T, NV, kBounded, false>(s, n, steps, true, mask);
}

// Gradients of one chunk. In: rows u, dy, B, C; s.h, the states before the chunk; s.q, the gradient of the states after
// it. Out: rows du (added to if add_to_du); s.ddelta, of what goes into softplus; rows r .. r + 2 n of dfeatures, of B
// and C. s.q, s.dA, s.dD, s.dbias are carried on.
template <typename T, int NV>
MMVMAMBA_NOINLINE void scan_chunk_backward(Scratch<T>& s, int64_t steps, bool add_to_du, int64_t width) {
  constexpr int64_t block = NV * kLanes<T>;
  const LaneMask<T, NV> mask(width);
  if (s.bounded)
    states_backward<T, NV, true>(s, steps, add_to_du, mask);
  else
    states_backward<T, NV, false>(s, steps, add_to_du, mask);
  Vec<T> dbias[NV];
  for (int v = 0; v < NV; ++v) dbias[v] = Vec<T>{};
  for (int64_t t = 0; t < steps; ++t)
    for (int v = 0; v < NV; ++v) {
      const int64_t at = t * block + v * kLanes<T>;
      const Vec<T> ddelta = load(s.ddelta + at) * load(s.slope + at);
      store<T>(s.ddelta + at, ddelta);
      dbias[v] += ddelta;
    }
  add_to_row<T, NV>(s.dbias, dbias);
}

// ddt = ddelta W^T for kRows features; lanes are positions, so that no sum runs across lanes.
template <typename T, int NV, int kRows>
MMVMAMBA_INLINE void feature_gradients(Scratch<T>& s, int64_t r, int64_t width) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  constexpr int kVectors = kChunk / kLanes<T>;
  V sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = V{};
  for (int64_t c = 0; c < width; ++c) {
    V ddelta[kVectors];
    for (int v = 0; v < kVectors; ++v) ddelta[v] = load(s.transposed + c * kChunk + v * kLanes<T>);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += ddelta[v] * s.W[(r + i) * block + c];
  }
  for (int i = 0; i < kRows; ++i)  // s.W is in units of ln 2
    for (int v = 0; v < kVectors; ++v) store<T>(s.dfeatures + (r + i) * kChunk + v * kLanes<T>, sum[i][v] * T(kLn2));
}

// dW += dt^T ddelta for kRows features.
template <typename T, int NV, int kRows>
MMVMAMBA_INLINE void weight_gradients(Scratch<T>& s, int64_t r, int64_t steps) {
  typedef Vec<T> V;
  constexpr int64_t block = NV * kLanes<T>;
  V sum[kRows][NV];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < NV; ++v) sum[i][v] = V{};
  for (int64_t t = 0; t < steps; ++t) {
    V ddelta[NV];
    for (int v = 0; v < NV; ++v) ddelta[v] = load(s.ddelta + t * block + v * kLanes<T>);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < NV; ++v) sum[i][v] += ddelta[v] * s.dt[t][r + i];
  }
  for (int i = 0; i < kRows; ++i) add_to_row<T, NV>(s.dW + (r + i) * block, sum[i]);
}

// Features whose sums fit into registers together: 16 vectors with AVX-512, 8 elsewhere.
template <typename T>
constexpr int kFeaturesTogether = (MMVMAMBA_WHOLE_VECTOR_SHUFFLES ? 16 : 8) / (kChunk / kLanes<T>) > 1
                                      ? (MMVMAMBA_WHOLE_VECTOR_SHUFFLES ? 16 : 8) / (kChunk / kLanes<T>)
                                      : 1;

// Gradients of the step-size projection of a chunk: rows 0 .. r of dfeatures, and s.dW carried on.
template <typename T, int NV>
MMVMAMBA_NOINLINE void project_chunk_backward(Scratch<T>& s, int64_t steps, int64_t width) {
  constexpr int64_t block = NV * kLanes<T>;
  fill(s.ddelta + steps * block, (kChunk - steps) * block, T(0));
  transpose(s.transposed, kChunk, s.ddelta, block, kChunk, block);
  int64_t r = 0;
  constexpr int kFeatures = kFeaturesTogether<T>, kRows = kTogether;
  for (; r + kFeatures <= s.rank; r += kFeatures) feature_gradients<T, NV, kFeatures>(s, r, width);
  if constexpr (kFeatures > 2)
    for (; r + 2 <= s.rank; r += 2) feature_gradients<T, NV, 2>(s, r, width);
  for (; r < s.rank; ++r) feature_gradients<T, NV, 1>(s, r, width);
  for (r = 0; r + kRows <= s.rank; r += kRows) weight_gradients<T, NV, kRows>(s, r, steps);
  if constexpr (kRows > 2)
    for (; r + 2 <= s.rank; r += 2) weight_gradients<T, NV, 2>(s, r, steps);
  for (; r < s.rank; ++r) weight_gradients<T, NV, 1>(s, r, steps);
}

// Start the gradient sums of a task.
template <typename T, int NV>
MMVMAMBA_INLINE void clear_gradients(Scratch<T>& s) {
  constexpr int64_t block = NV * kLanes<T>;
  fill(s.dA, s.states * block, T(0));
  fill(s.dD, block, T(0));
  fill(s.dbias, block, T(0));
  fill(s.dW, s.rank * block, T(0));
}

}  // namespace
}  // namespace mmvmamba
