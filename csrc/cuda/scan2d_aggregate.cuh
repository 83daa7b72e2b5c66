// What every band does to the state that enters it, where the positions of a map are cut into bands so that enough
// blocks have work: first this kernel, then the scan over bands, then the forward or backward from the states found.
#pragma once

#include "combine.cuh"

namespace mmvmamba {

// kAdjoint: of the adjoint, which runs against the time of the route.
template <typename T, int V, bool kOneState, int kRankTiles, bool kAdjoint>
struct AggregateWalk {
  static constexpr int kWidth = kLanes * V;
  const ScanArgs& args;
  const Place<V, kOneState> place;
  const SharedLayout layout;
  Slice<T, V, kOneState, kRankTiles> slice;
  float* effects;  // (warps, states, width, 2): log of the decay, end

  static __device__ __forceinline__ SharedSizes sizes(const ScanArgs& args, int warps) {
    SharedSizes of{kWidth, warps, args.rank, args.states, kOneState, kRankTiles >= 0, false};
    of.exchanged = args.states;
    return of;
  }

  __device__ __forceinline__ AggregateWalk(const ScanArgs& args_, float* shared)
      : args(args_),
        place(args_),
        layout(sizes(args_, place.warps)),
        slice(args_, layout, place, shared),
        effects(shared + layout.exchange) {}

  __device__ __forceinline__ float* effect_at(int warp, int state) const {
    return effects + ((warp * args.states + state) * kWidth + V * place.lane) * 2;
  }

  // Every warp does an equal part of the band's slices, one after the other; then their effects are put together.
  __device__ __forceinline__ void walk(int route) {
    const Span span(args, route, place.band);
    __syncthreads();
    slice.start_route(route);
    slice.load_weights(route, const_cast<float*>(slice.weights));
    float bias[V];
    slice.load_bias(route, bias);
    const float nothing[2 * V] = {};
    for (int state = 0; state < args.states; ++state) store_vector<2 * V>(effect_at(place.warp, state), nothing);
    __syncthreads();
    const int first = span.begin / kRows * kRows, count = (span.end - first + kRows - 1) / kRows;
    const int share = (count + place.warps - 1) / place.warps;
    const int from = min(place.warp * share, count), until = min(from + share, count);
#pragma unroll 1
    for (int i = 0; i < until - from; ++i) {
      slice.fetch(span, route, first + kRows * (kAdjoint ? until - 1 - i : from + i));
      if constexpr (kRankTiles >= 0) slice.project();
      add_slice(route, bias);
    }
    __syncthreads();
    for (int state = place.warp; state < args.states; state += place.warps) put_together(route, state);
  }

  __device__ __forceinline__ void add_slice(int route, const float (&bias)[V]) {
    float s[kRows][V], value[kRows][V];  // of the adjoint dy, else s x
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      slice.step_sizes(row, bias, s[row]);
      const Packed<T, V> x = slice.load_x(row);
      const int64_t at = static_cast<int64_t>(place.batch) * args.pixels * args.channels + place.channel;
#pragma unroll
      for (int v = 0; v < V; ++v)
        value[row][v] = !slice.has(row) ? 0.0f
                        : kAdjoint      ? args.grad_out[at + static_cast<int64_t>(slice.pixel(row)) * args.channels + v]
                                        : s[row][v] * x[v];
    }
#pragma unroll 1
    for (int state = 0; state < args.states; ++state) {
      float rates[V], effect[2 * V];
      slice.load_rates(route, state, rates);
      load_vector<2 * V>(effect_at(place.warp, state), effect);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = kAdjoint ? kRows - 1 - i : i;
        const float factor = kAdjoint ? slice.C(row, state) : slice.B(row, state);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float exponent;
          const float decay = step_decay(rates[v], s[row][v], exponent, slice.has(row));
          effect[2 * v] += exponent;
          effect[2 * v + 1] = kAdjoint ? decay * fmaf(factor, value[row][v], effect[2 * v + 1])
                                       : fmaf(decay, effect[2 * v + 1], factor * value[row][v]);
        }
      }
      store_vector<2 * V>(effect_at(place.warp, state), effect);
    }
  }

  __device__ __forceinline__ void put_together(int route, int state) const {
    float log_decay[V] = {}, end[V] = {};
    for (int i = 0; i < place.warps; ++i) {
      float effect[2 * V];
      load_vector<2 * V>(effect_at(kAdjoint ? place.warps - 1 - i : i, state), effect);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        log_decay[v] += effect[2 * v];
        end[v] = fmaf(exp2_approx(min_nan(effect[2 * v], kLargestExponent)), end[v], effect[2 * v + 1]);
      }
    }
    const int64_t at = state_index(args, place, route, args.bands, place.band, state);
    store_states<V>(args.band_decay + at, place.valid, log_decay);
    store_states<V>(args.band_state + at, place.valid, end);
  }
};

template <typename T, int V, bool kOneState, int kRankTiles, bool kAdjoint>
__global__ void __launch_bounds__(kLanes* kMaxAggregateWarps, 2)
    scan2d_aggregate_kernel(const __grid_constant__ ScanArgs args) {
  MMVMAMBA_SHARED(float, shared);
  AggregateWalk<T, V, kOneState, kRankTiles, kAdjoint> walk(args, shared);
  for (int route = 0; route < args.routes; ++route) walk.walk(route);
}

}  // namespace mmvmamba
