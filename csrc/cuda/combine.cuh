// How the warps of a block, which work on consecutive slices, pass the state on.
//
// Every warp first scans its slice from a state of zero and publishes what the slice does to a state h that enters it:
// decay h + end. After one barrier every warp folds the slices before its own, always in the order of time. The last
// warp leaves the state after its slice for the next turn, in two halves like the effects and for the same reason.
#pragma once

#include "slice.cuh"

namespace mmvmamba {

// What a slice does to a state: h -> decay h + end. The decay is collected as its logarithm, so that a product of many
// decays can neither become infinite nor, through infinity times zero, NaN.
template <int V>
struct SliceEffect {
  float log_decay[V] = {}, end[V] = {};

  __device__ __forceinline__ void decays(float (&decay)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) decay[v] = exp2_approx(min_nan(log_decay[v], kLargestExponent));
  }
};

// Decay of a step, and its exponent. kBounded: no rate is positive and no step size negative. A position outside the
// span decays nothing whatever its rate is; the kernels for one state rely on a step size of 0 and finite rates there.
template <bool kBounded = false>
__device__ __forceinline__ float step_decay(float rate, float s, float& exponent, bool inside = true) {
  exponent = kBounded ? rate * s : min_nan(rate * s, kLargestExponent);
  exponent = inside ? exponent : 0.0f;
  return exp2_approx(exponent);
}

// Whether no lane of the warp has a positive (or undefined) rate.
template <int V>
__device__ __forceinline__ bool are_bounded(const float (&rates)[V]) {
  int unbounded = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) unbounded |= !(rates[v] <= 0.0f);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) unbounded |= __shfl_xor_sync(0xffffffffu, unbounded, lanes);
  return unbounded == 0;
}

// The memory through which the warps of a block exchange effects. Two halves in turn: who writes a half again has met
// a barrier that everyone passes only after reading it.
//
// kTables: 2 in the backward, effects on the state and on the adjoint; the decay is that of both.
template <int V, bool kFull, int kTables>
struct Exchange {
  static constexpr int kWidth = kLanes * V;
  float* memory;
  int half = 0;

  __device__ __forceinline__ float* slot(const Place<V, kFull>& place, int warp, int table = 0) const {
    return memory + (((half * place.warps + warp) * kTables + table) * kWidth + V * place.lane) * 2;
  }

  // Publish the effect of this warp's slice; the others can be read after a barrier.
  __device__ __forceinline__ void publish(const Place<V, kFull>& place, const float (&decay)[V], const float (&end)[V],
                                          int table = 0) {
    Packed<float, 2 * V> words;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      words.element[2 * v] = decay[v];
      words.element[2 * v + 1] = end[v];
    }
    *reinterpret_cast<Packed<float, 2 * V>*>(slot(place, place.warp, table)) = words;
  }

  // From the state at the start of the turn to the one at the start of this warp's slice.
  __device__ __forceinline__ void forward(const Place<V, kFull>& place, float (&h)[V]) {
    const float* at = slot(place, 0);
    int warp = 0;
#pragma unroll 1
    for (; warp + 1 < place.warp; warp += 2, at += 4 * kTables * kWidth) {
      apply(at, h);
      apply(at + 2 * kTables * kWidth, h);
    }
    if (warp < place.warp) apply(at, h);
    half ^= 1;
  }

  // The same from the end of the turn to the end of this warp's slice.
  __device__ __forceinline__ void backward(const Place<V, kFull>& place, float (&h)[V]) {
    const float* at = slot(place, place.warps - 1, kTables - 1);
#pragma unroll 1
    for (int warp = place.warps - 1; warp > place.warp; --warp, at -= 2 * kTables * kWidth) apply(at, h);
    half ^= 1;
  }

  static __device__ __forceinline__ void apply(const float* effect, float (&h)[V]) {
    const Packed<float, 2 * V> words = *reinterpret_cast<const Packed<float, 2 * V>*>(effect);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] = fmaf(words[2 * v], h[v], words[2 * v + 1]);
  }
};

// States of the present band at its start, of one state index: zero, or what the scan over bands found.
template <int V, typename AnyPlace>
__device__ __forceinline__ void load_band_state(const ScanArgs& args, const AnyPlace& place, int route, int state,
                                                const float* without_bands, float (&h)[V]) {
  if (args.band_state != nullptr) {
    load_states<V>(args.band_state + state_index(args, place, route, args.bands, place.band, state), place.valid, h);
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v)  // (b, d, n)
    h[v] = without_bands != nullptr && place.valid
               ? without_bands[(static_cast<int64_t>(place.batch) * args.channels + place.channel + v) * args.states +
                               state]
               : 0.0f;
}

}  // namespace mmvmamba
