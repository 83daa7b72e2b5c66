// The forward kernel of scan2d, and of selective_scan as a map of one row with given step sizes.
#pragma once

#include "combine.cuh"

namespace mmvmamba {

// One block's forward walk. kOneState: n = 1, everything of a slice in registers. kRankTiles: 1 for an even rank up to
// 6, 0 for any, -1 where step sizes are given.
template <typename T, int V, bool kOneState, int kRankTiles>
struct ForwardWalk {
  static constexpr int kWidth = kLanes * V;
  const ScanArgs& args;
  const Place<V, kOneState> place;
  const SharedLayout layout;
  Slice<T, V, kOneState, kRankTiles> slice;
  Exchange<V, kOneState, 1> exchange;
  float *map, *carry;
  int carry_half = 0;

  static __device__ __forceinline__ SharedSizes sizes(const ScanArgs& args, int warps) {
    SharedSizes of{kWidth, warps, args.rank, args.states, kOneState, kRankTiles >= 0, false};
    of.carried = args.states;
    of.exchanged = 2;
    of.map_rows = args.by_visit ? 0 : args.band_length + warps;
    return of;
  }

  __device__ __forceinline__ ForwardWalk(const ScanArgs& args_, float* shared)
      : args(args_),
        place(args_),
        layout(sizes(args_, place.warps)),
        slice(args_, layout, place, shared),
        exchange{shared + layout.exchange},
        map(shared + layout.map),
        carry(shared + layout.carry) {
    if (!args.by_visit)
      for (int i = threadIdx.x; i < (args.band_length + place.warps) * kWidth; i += blockDim.x) map[i] = 0.0f;
  }

  __device__ __forceinline__ void walk(int route) {
    const Span span(args, route, place.band);
    __syncthreads();  // the weights of the route before are done with, and so is the map
    slice.start_route(route);
    slice.load_weights(route, const_cast<float*>(slice.weights));
    float bias[V], rates[V];
    slice.load_bias(route, bias);
    slice.load_rates(route, 0, rates);
    start(route);
    __syncthreads();
    if (kOneState && are_bounded(rates))
      turns<kOneState>(span, route, rates, bias);
    else
      turns<false>(span, route, rates, bias);
  }

  template <bool kBounded>
  __device__ __forceinline__ void turns(const Span& span, int route, const float (&rates)[V], const float (&bias)[V]) {
    const int turn = kRows * place.warps;
#pragma unroll 1
    for (int base = span.begin / kChunk * kChunk; base < span.end; base += turn) {
      slice.fetch(span, route, base + kRows * place.warp);
      if constexpr (kRankTiles >= 0) slice.project();
      if constexpr (kOneState)
        one_state<kBounded>(span, route, rates, bias);
      else
        any_states(span, route, bias, base + turn >= span.end);
    }
  }

  // The states at the start of the band.
  __device__ __forceinline__ void start(int route) {
    carry_half = 0;
    for (int state = place.warp; state < args.states; state += place.warps) {
      float first[V];
      load_band_state<V>(args, place, route, state, nullptr, first);
      store_vector<V>(carried(0, state), first);
    }
  }

  __device__ __forceinline__ float* carried(int half, int state) const {
    return carry + (half * args.states + state) * kWidth + V * place.lane;
  }

  __device__ __forceinline__ void save(const Span& span, int route, int state, const float (&in)[V]) const {
    if (args.carries != nullptr && slice.start % kChunk == 0 && slice.start >= span.begin && slice.start < span.end)
      store_states<V>(args.carries + state_index(args, place, route, args.chunks, slice.start / kChunk, state),
                      place.valid, in);
  }

  template <bool kBounded>
  __device__ __forceinline__ void one_state(const Span& span, int route, const float (&rates)[V],
                                            const float (&bias)[V]) {
    float decay[kRows][V], input[kRows][V];
    SliceEffect<V> effect;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Packed<T, V> x = slice.load_x(row);
      float s[V];
      slice.step_sizes(row, bias, s);
      const float B = slice.B(row, 0);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float exponent;
        decay[row][v] = step_decay<kBounded>(rates[v], s[v], exponent);
        input[row][v] = s[v] * B * x[v];
        effect.log_decay[v] += exponent;
        effect.end[v] = fmaf(decay[row][v], effect.end[v], input[row][v]);
      }
    }
    float whole[V];
    effect.decays(whole);
    exchange.publish(place, whole, effect.end);
    __syncthreads();
    float h[V];
    load_vector<V>(carried(carry_half, 0), h);
    exchange.forward(place, h);
    save(span, route, 0, h);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float C = slice.C(row, 0);
      float* target = slice.map_row(map, row);
      float sum[V];
      load_vector<V>(target, sum);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        h[v] = fmaf(decay[row][v], h[v], input[row][v]);
        sum[v] = fmaf(C, h[v], sum[v]);
      }
      store_vector<V>(target, sum);
    }
    carry_half ^= 1;
    if (place.warp == place.warps - 1) store_vector<V>(carried(carry_half, 0), h);
  }

  __device__ __forceinline__ void any_states(const Span& span, int route, const float (&bias)[V], bool last_turn) {
    float s[kRows][V], su[kRows][V], y[kRows][V] = {}, skip[V] = {};
    const bool skips = !args.by_visit && skips_by_route();
    if (skips) load_states<V>(args.D + static_cast<int64_t>(route) * args.channels + place.channel, place.valid, skip);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Packed<T, V> x = slice.load_x(row);
      slice.step_sizes(row, bias, s[row]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        su[row][v] = slice.has(row) ? s[row][v] * x[v] : 0.0f;
        if (skips) y[row][v] = skip[v] * x[v];
      }
    }
#pragma unroll 1
    for (int state = 0; state < args.states; ++state) one_of_many(span, route, state, last_turn, s, su, y);
    carry_half ^= 1;
    if (args.by_visit)
      write_visits(route, y);
    else
      add_to_map(y);
  }

  __device__ __forceinline__ void one_of_many(const Span& span, int route, int state, bool last_turn,
                                              const float (&s)[kRows][V], const float (&su)[kRows][V],
                                              float (&y)[kRows][V]) {
    float rates[V], decay[kRows][V];
    slice.load_rates(route, state, rates);
    SliceEffect<V> effect;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float B = slice.B(row, state);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float exponent;
        decay[row][v] = step_decay(rates[v], s[row][v], exponent, slice.has(row));
        effect.log_decay[v] += exponent;
        effect.end[v] = fmaf(decay[row][v], effect.end[v], B * su[row][v]);
      }
    }
    float whole[V];
    effect.decays(whole);
    exchange.publish(place, whole, effect.end);
    __syncthreads();
    float h[V];
    load_vector<V>(carried(carry_half, state), h);
    exchange.forward(place, h);
    save(span, route, state, h);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float B = slice.B(row, state), C = slice.C(row, state);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        h[v] = fmaf(decay[row][v], h[v], B * su[row][v]);
        y[row][v] = fmaf(C, h[v], y[row][v]);
      }
    }
    if (place.warp != place.warps - 1) return;
    store_vector<V>(carried(carry_half ^ 1, state), h);
    if (last_turn && args.last_state != nullptr && span.end == args.length && place.valid)
#pragma unroll
      for (int v = 0; v < V; ++v)
        args.last_state[(static_cast<int64_t>(place.batch) * args.channels + place.channel + v) * args.states + state] =
            h[v];
  }

  // Whether every route has inputs of its own, so that its skips are added where it reads them.
  __device__ __forceinline__ bool skips_by_route() const {
    return !kOneState && args.D != nullptr && args.x_route != 0;
  }

  __device__ __forceinline__ void add_to_map(const float (&y)[kRows][V]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float* target = slice.map_row(map, row);
#pragma unroll
      for (int v = 0; v < V; ++v) target[v] += y[row][v];
    }
  }

  // Straight to memory, the skip included.
  __device__ __forceinline__ void write_visits(int route, const float (&y)[kRows][V]) {
    if (!place.valid) return;
    float skip[V] = {};
    if (args.D != nullptr)
      load_states<V>(args.D + static_cast<int64_t>(route) * args.channels + place.channel, true, skip);
    const int64_t first = (static_cast<int64_t>(place.batch) * args.routes + route) * args.length;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (!slice.has(row)) continue;
      const Packed<T, V> x = slice.load_x(row);
      float* target = args.out + (first + slice.start + row) * args.channels + place.channel;
#pragma unroll
      for (int v = 0; v < V; ++v) target[v] = args.D == nullptr ? y[row][v] : fmaf(skip[v], x[v], y[row][v]);
    }
  }

  // The map of the band to the output. Every route visits every pixel once, so the skips are one product per pixel.
  __device__ __forceinline__ void write_map() {
    __syncthreads();
    const bool by_column = args.bands > 1 && args.axes == kColumnAxis;
    const int from = place.band * args.band_length, until = end_of_band(args, from);
    const bool skips = args.D != nullptr && !skips_by_route();
    float skip[V] = {};
    for (int route = 0; route < args.routes && skips && place.valid; ++route)
#pragma unroll
      for (int v = 0; v < V; ++v) skip[v] += args.D[static_cast<int64_t>(route) * args.channels + place.channel + v];
    for (int i = from + place.warp; i < until; i += place.warps) {
      const int pixel = pixel_at(args, by_column, i);
      if (!place.valid) continue;
      const float* source = map + (i - from) * kWidth + V * place.lane;
      const int64_t at = (static_cast<int64_t>(place.batch) * args.pixels + pixel) * args.channels + place.channel;
      const Packed<T, V> x = load_packed<T, V>(static_cast<const T*>(args.x) + at, args.first_launch && skips);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float before = !args.first_launch ? args.out[at + v] : !skips ? 0.0f : skip[v] * x[v];
        args.out[at + v] = before + source[v];
      }
    }
  }
};

template <typename T, int V, bool kOneState, int kRankTiles>
__global__ void __launch_bounds__(kLanes* max_forward_warps(V, sizeof(T)), 1)
    scan2d_forward_kernel(const __grid_constant__ ScanArgs args) {
  MMVMAMBA_SHARED(float, shared);
  ForwardWalk<T, V, kOneState, kRankTiles> walk(args, shared);
  for (int route = 0; route < args.routes; ++route)
    if (in_launch(args, route)) walk.walk(route);
  if (!args.by_visit) walk.write_map();
}

}  // namespace mmvmamba
