// The backward kernel of scan2d, and of selective_scan as a map of one row with given step sizes.
//
// Turns run against the time of a route. Within a slice of 16 positions the states are computed again from the one that
// the forward saved; the adjoint q, the gradient of the state, obeys q = C dy + r with r = decay q of the position
// after. Between the warps both pass on as in the forward. Gradients shared by channels (of B, C and the features of
// the step size) are sums over one tile of channels, added over the tiles by another kernel.
#pragma once

#include "combine.cuh"
#include "scan2d_gradients.cuh"

namespace mmvmamba {

template <typename T, int V, bool kOneState, int kRankTiles>
struct BackwardWalk {
  static constexpr int kWidth = kLanes * V;
  static constexpr bool kProjected = kRankTiles >= 0;
  const ScanArgs& args;
  const Place<V, kOneState> place;
  const SharedLayout layout;
  Slice<T, V, kOneState, kRankTiles> slice;
  Exchange<V, kOneState, 2> effects;
  float *map, *carry, *dweights, *row_sums, *shared_rates, *first_states;
  int64_t grad_out;  // address of this lane's channel at pixel 0
  float dA[V], dD[V], dbias[V];
  int carry_half = 0;

  static __device__ __forceinline__ SharedSizes sizes(const ScanArgs& args, int warps) {
    SharedSizes of{kWidth, warps, args.rank, args.states, kOneState, kRankTiles >= 0, true};
    of.carried = args.states;
    of.exchanged = 4;
    of.map_rows = args.by_visit ? 0 : args.band_length + warps;
    return of;
  }

  __device__ __forceinline__ BackwardWalk(const ScanArgs& args_, float* shared)
      : args(args_),
        place(args_),
        layout(sizes(args_, place.warps)),
        slice(args_, layout, place, shared),
        effects{shared + layout.exchange},
        map(shared + layout.map),
        carry(shared + layout.carry),
        dweights(shared + layout.dweights),
        row_sums(shared + layout.row_sums),
        shared_rates(shared + layout.rates),
        first_states(shared + layout.first_states) {
    const int64_t at = static_cast<int64_t>(place.batch) * args.pixels * args.channels + place.channel;
    grad_out = hidden(args.grad_out + at);
    if (!args.by_visit)
      for (int i = threadIdx.x; i < (args.band_length + place.warps) * kWidth; i += blockDim.x) map[i] = 0.0f;
  }

  __device__ __forceinline__ void load_dy(int row, float (&dy)[V]) const {
    const Packed<float, V> packed = slice.template load<Packed<float, V>, sizeof(float)>(grad_out, row);
#pragma unroll
    for (int v = 0; v < V; ++v) dy[v] = packed[v];
  }

  __device__ __forceinline__ void walk(int route) {
    const Span span(args, route, place.band);
    __syncthreads();  // the weights of the route before are done with, and so is the map
    slice.start_route(route);
    set_features_target(route);
    slice.load_weights(route, const_cast<float*>(slice.weights));
    float bias[V], rates[V];
    slice.load_bias(route, bias);
    slice.load_rates(route, 0, rates);
    if (place.warp == 0) store_vector<V>(shared_rates + V * place.lane, rates);
#pragma unroll
    for (int v = 0; v < V; ++v) dA[v] = dD[v] = dbias[v] = 0.0f;
    start(route);
    __syncthreads();
    if (span.begin % kChunk != 0) {
      if (place.warp == 0) advance(span, route, bias);
      __syncthreads();
    }
    if (kOneState && are_bounded(rates))
      turns<kOneState>(span, route, bias);
    else
      turns<false>(span, route, bias);
    finish(route);
  }

  __device__ __forceinline__ int warps() const { return kOneState ? kMaxBackwardWarps : place.warps; }

  template <bool kBounded>
  __device__ __forceinline__ void turns(const Span& span, int route, const float (&bias)[V]) {
    const int turn = kRows * warps(), first = span.begin / kChunk * kChunk;
    const int last = first + (span.end - 1 - first) / turn * turn;
#pragma unroll 1
    for (int base = last; base >= first; base -= turn) {
      slice.fetch(span, route, base + kRows * place.warp);
      if constexpr (kProjected) slice.project();
      if constexpr (kOneState)
        one_state<kBounded>(route, bias);
      else
        any_states(route, bias, base == last);
      carry_half ^= 1;
      if constexpr (kProjected) {
        feature_gradients<T, V, kOneState, kRankTiles>(slice, slice.gradients());
        __syncthreads();
        weight_gradients<T, V, kOneState, kRankTiles>(slice, dweights);
        __syncthreads();
      }
    }
  }

  // The adjoints at the end of the band, and no gradients of the weights yet.
  __device__ __forceinline__ void start(int route) {
    carry_half = 0;
    for (int state = place.warp; state < args.states; state += place.warps) {
      float last[V];
      load_band_state<V>(args, place, route, state, args.grad_last_state, last);
      store_vector<V>(carried(0, state), last);
    }
    if constexpr (kProjected)
      for (int i = threadIdx.x; i < layout.rank_padded * layout.dweight_stride; i += blockDim.x) dweights[i] = 0.0f;
  }

  __device__ __forceinline__ float* carried(int half, int state) const {
    return carry + (half * args.states + state) * kWidth + V * place.lane;
  }

  // Where the gradients of the features of a row 0 go.
  __device__ __forceinline__ void set_features_target(int route) {
    const int rows = args.by_visit ? args.length : args.pixels, slot = args.groups > 1 ? place.group : route;
    const int64_t at =
        (static_cast<int64_t>(args.tile_begin + place.tile) * args.batch + place.batch) * rows * args.slots + slot;
    slice.set_gradients(args.dprojections + at * args.features);
  }

  // A reverse route may start its band within a chunk: from the saved state compute that at the start of the band.
  __device__ __forceinline__ void advance(const Span& span, int route, const float (&bias)[V]) {
    Span before = span;
    before.begin = span.begin / kChunk * kChunk;
    before.end = span.begin;
#pragma unroll 1
    for (int first = before.begin; first < before.end; first += kRows) {
      slice.fetch(before, route, first);
      if constexpr (kProjected) slice.project();
#pragma unroll 1
      for (int state = 0; state < args.states; ++state) {
        float rates[V], h[V];
        slice.load_rates(route, state, rates);
        if (first == before.begin)
          load_states<V>(args.carries + state_index(args, place, route, args.chunks, before.begin / kChunk, state),
                         place.valid, h);
        else
          load_vector<V>(first_states + state * kWidth + V * place.lane, h);
#pragma unroll 1
        for (int row = 0; row < kRows; ++row) {
          const Packed<T, V> x = slice.load_x(row);
          float s[V], exponent;
          slice.step_sizes(row, bias, s);
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (slice.has(row))
              h[v] = fmaf(step_decay(rates[v], s[v], exponent), h[v], s[v] * slice.B(row, state) * x[v]);
        }
        store_vector<V>(first_states + state * kWidth + V * place.lane, h);
      }
    }
  }

  // The state at the start of the slice, as far as it is in memory: of the slice before, where chunks are two slices.
  __device__ __forceinline__ void load_saved(int route, int state, float (&h)[V]) const {
    const int chunk = min(slice.start / kChunk, args.chunks - 1);
    // Up to the start of the band nothing moves the state, so there the one at its start is as good.
    const float* saved = chunk * kChunk < slice.begin
                             ? first_states + state * kWidth + V * place.lane
                             : args.carries + state_index(args, place, route, args.chunks, chunk, state);
    load_states<V>(saved, place.valid, h);
  }

  // Pass states and adjoints on between the warps; h and r as they enter this warp's slice.
  __device__ __forceinline__ void exchange(int state, const SliceEffect<V>& effect, const float (&adjoint)[V],
                                           float (&h)[V], float (&r)[V]) {
    float decay[V];
    effect.decays(decay);
    effects.publish(place, decay, effect.end, 0);
    effects.publish(place, decay, adjoint, 1);
    __syncthreads();
    if (slice.start % kChunk != 0) effects.apply(effects.slot(place, place.warp - 1, 0), h);
    load_vector<V>(carried(carry_half, state), r);
    effects.backward(place, r);
  }

  // What a slice of one state keeps in registers.
  struct Rows {
    float s[kRows][V], decay[kRows][V], dy[kRows][V];
    Packed<T, V> x[kRows];
  };

  template <bool kBounded>
  __device__ __forceinline__ void one_state(int route, const float (&bias)[V]) {
    Rows rows;
    float h[V], r[V], rates[V], adjoint[V] = {}, dB[kRows], dC[kRows];
    SliceEffect<V> effect;
    load_saved(route, 0, h);
    load_vector<V>(shared_rates + V * place.lane, rates);  // kept there, not in registers
    load_rows<kBounded>(bias, rates, rows, effect);
    adjoint_effect(rows.decay, rows.dy, 0, adjoint);
#pragma unroll
    for (int v = 0; v < V; ++v) rates[v] *= kLn2;  // from here on: of the exponent of 2
    exchange(0, effect, adjoint, h, r);
    replay(rows, h);
    walk_back(rows, rates, h, r, dB, dC);
    write_row_sums(dB, dC, 0);
    if (place.warp == 0) store_vector<V>(carried(carry_half ^ 1, 0), r);
  }

  // Inputs of all rows; what they add to the state goes to scratch memory.
  template <bool kBounded>
  __device__ __forceinline__ void load_rows(const float (&bias)[V], const float (&rates)[V], Rows& rows,
                                            SliceEffect<V>& effect) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {  // all in flight before the first is used
      rows.x[row] = slice.load_x(row);
      load_dy(row, rows.dy[row]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      slice.step_sizes(row, bias, rows.s[row]);
      const float B = slice.B(row, 0);
      float input[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float exponent;
        rows.decay[row][v] = step_decay<kBounded>(rates[v], rows.s[row][v], exponent);
        effect.log_decay[v] += exponent;
        input[v] = rows.s[row][v] * B * rows.x[row][v];
        effect.end[v] = fmaf(rows.decay[row][v], effect.end[v], input[v]);
      }
      store_vector<V>(scratch(row), input);
    }
  }

  // The states of the slice: in scratch memory, in place of the inputs, those before each row; h becomes the last.
  __device__ __forceinline__ void replay(const Rows& rows, float (&h)[V]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float input[V];
      load_vector<V>(scratch(row), input);
      store_vector<V>(scratch(row), h);
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = fmaf(rows.decay[row][v], h[v], input[v]);
    }
  }

  // The gradients of the slice, last row first; those of z go to scratch memory, in place of the states.
  __device__ __forceinline__ void walk_back(const Rows& rows, const float (&scaled_rates)[V], float (&h)[V],
                                            float (&r)[V], float (&dB)[kRows], float (&dC)[kRows]) {
#pragma unroll
    for (int row = kRows - 1; row >= 0; --row) {
      const float B = slice.B(row, 0), C = slice.C(row, 0);
      float* target = slice.map_row(map, row);
      float before[V], dx[V], dz[V], dy[V];
      // Read again where the registers do not suffice.
      const Packed<T, V> x = kRankTiles == 1 ? rows.x[row] : slice.load_x(row);
      if constexpr (kRankTiles == 1 || kIsHalf<T>)
#pragma unroll
        for (int v = 0; v < V; ++v) dy[v] = rows.dy[row][v];
      else
        load_dy(row, dy);
      load_vector<V>(scratch(row), before);
      load_vector<V>(target, dx);
      dB[row] = dC[row] = 0.0f;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float s = rows.s[row][v], q = fmaf(C, dy[v], r[v]);
        r[v] = rows.decay[row][v] * q;
        const float drate = r[v] * before[v], qx = q * x[v];
        dA[v] = fmaf(drate, s, dA[v]);
        dB[row] = fmaf(qx, s, dB[row]);
        dC[row] = fmaf(dy[v], h[v], dC[row]);
        dx[v] = fmaf(q * s, B, dx[v]);
        dz[v] = fmaf(qx, B, scaled_rates[v] * drate) * softplus_slope(s);
        h[v] = before[v];
      }
      store_vector<V>(target, dx);
      store_vector<V>(scratch(row), dz);
    }
  }

  // This lane's part of a row of scratch memory: z; then inputs of the state, states, gradients of z.
  __device__ __forceinline__ float* scratch(int row) const { return slice.z + row * layout.z_stride + V * place.lane; }

  // The derivative of softplus from its value in units of ln 2, 1 - 2^-s, as a factor of what goes to the tensor cores.
  __device__ __forceinline__ float softplus_slope(float s) const {
    constexpr float kOne = kIsHalf<T> && kProjected ? 1.0f + kCutOff : 1.0f;
    if (!slice.has_softplus()) return kOne;
    const float slope = fmaf(-kOne, exp2_approx(-s), kOne);
    if constexpr (kIsHalf<T>) return slope;
    // Of a small step the difference has few digits left: a step of 0.001 would have a slope that is wrong by 1e-4.
    const float t = s * kLn2, series = fmaf(t, fmaf(t, fmaf(t, -1.0f / 24, 1.0f / 6), -0.5f), 1.0f);
    return t < 0.04f ? t * series : slope;
  }

  __device__ __forceinline__ void adjoint_effect(const float (&decay)[kRows][V], const float (&dy)[kRows][V], int state,
                                                 float (&adjoint)[V]) const {
#pragma unroll
    for (int row = kRows - 1; row >= 0; --row) {
      const float C = slice.C(row, state);
#pragma unroll
      for (int v = 0; v < V; ++v) adjoint[v] = decay[row][v] * fmaf(C, dy[row][v], adjoint[v]);
    }
  }

  // What positions outside the span must not give to the gradients of the weights. With softplus they do not: their
  // step size of 0 has a slope of 0.
  __device__ __forceinline__ void drop_rows_outside() const {
    if (slice.is_full()) return;
    const float nothing[V] = {};
#pragma unroll 1
    for (int row = 0; row < kRows; ++row)
      if (!slice.has(row)) store_vector<V>(scratch(row), nothing);
  }

  // Sum the gradients of B and C in every row over the lanes and write them.
  __device__ __forceinline__ void write_row_sums(float (&dB)[kRows], float (&dC)[kRows], int state) const {
    if constexpr (!kOneState)
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        dB[row] = place.valid ? dB[row] : 0.0f;
        dC[row] = place.valid ? dC[row] : 0.0f;
      }
    const float sum = sum_rows(dB, dC, row_sums + place.warp * kRows * kRowSumStride, place.lane);
    const int row = place.lane / 2, is_C = place.lane % 2;
    if (slice.has(row))
      store_feature(slice, slice.gradients(), row, args.rank + state + is_C * args.states, is_C ? sum : kLn2 * sum);
  }

  __device__ __forceinline__ void any_states(int route, const float (&bias)[V], bool first_turn) {
    float s[kRows][V], x[kRows][V], dy[kRows][V], ds[kRows][V] = {}, dx[kRows][V] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Packed<T, V> packed = slice.load_x(row);
      load_dy(row, dy[row]);
      slice.step_sizes(row, bias, s[row]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[row][v] = slice.has(row) ? packed[v] : 0.0f;
        dy[row][v] = slice.has(row) ? dy[row][v] : 0.0f;
      }
    }
#pragma unroll 1
    for (int state = 0; state < args.states; ++state) one_of_many(route, state, first_turn, s, x, dy, ds, dx);
    if (args.by_visit)
      write_visits(route, x, dy, dx);
    else
      add_to_map(dx);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float dz[V];
#pragma unroll
      for (int v = 0; v < V; ++v) dz[v] = place.valid ? ds[row][v] * softplus_slope(s[row][v]) : 0.0f;
      if constexpr (kProjected)
        store_vector<V>(scratch(row), dz);
      else if (slice.has(row))
        write_ddelta(row, dz);
    }
    if constexpr (kProjected) drop_rows_outside();
  }

  __device__ __forceinline__ void one_of_many(int route, int state, bool first_turn, const float (&s)[kRows][V],
                                              const float (&x)[kRows][V], const float (&dy)[kRows][V],
                                              float (&ds)[kRows][V], float (&dx)[kRows][V]) {
    float rates[V], decay[kRows][V], h[V], r[V], dA_here[V] = {}, dB[kRows], dC[kRows];
    slice.load_rates(route, state, rates);
    load_saved(route, state, h);
    SliceEffect<V> effect;
    float adjoint[V] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float B = slice.B(row, state);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float exponent;
        decay[row][v] = step_decay(rates[v], s[row][v], exponent, slice.has(row));
        effect.log_decay[v] += exponent;
        effect.end[v] = fmaf(decay[row][v], effect.end[v], s[row][v] * B * x[row][v]);
      }
    }
    adjoint_effect(decay, dy, state, adjoint);
    exchange(state, effect, adjoint, h, r);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      store_vector<V>(scratch(row), h);
      const float B = slice.B(row, state);
#pragma unroll
      for (int v = 0; v < V; ++v) h[v] = fmaf(decay[row][v], h[v], s[row][v] * B * x[row][v]);
    }
#pragma unroll
    for (int row = kRows - 1; row >= 0; --row) {
      const float B = slice.B(row, state), C = slice.C(row, state);
      float before[V];
      load_vector<V>(scratch(row), before);
      dB[row] = dC[row] = 0.0f;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float q = fmaf(C, dy[row][v], r[v]);
        r[v] = decay[row][v] * q;
        const float drate = r[v] * before[v], qx = q * x[row][v];
        dA_here[v] = fmaf(drate, s[row][v], dA_here[v]);
        dB[row] = fmaf(qx, s[row][v], dB[row]);
        dC[row] = fmaf(dy[row][v], h[v], dC[row]);
        dx[row][v] = fmaf(q * s[row][v], B, dx[row][v]);
        ds[row][v] = fmaf(qx, B, fmaf(rates[v] * kLn2, drate, ds[row][v]));
        h[v] = before[v];
      }
    }
    write_row_sums(dB, dC, state);
    if (place.warp == 0) store_vector<V>(carried(carry_half ^ 1, state), r);
    add_dA(route, state, first_turn, dA_here);
  }

  // Index of this warp's partial sum for a route and channel.
  __device__ __forceinline__ int64_t partial(int route) const {
    const int64_t outer = (static_cast<int64_t>(place.batch) * args.bands + place.band) * place.warps + place.warp;
    return (outer * args.routes + route) * args.channels + place.channel;
  }

  __device__ __forceinline__ void add_dA(int route, int state, bool first_turn, const float (&more)[V]) const {
    if (!place.valid) return;
    float* target = args.dA + partial(route) * args.states + state;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float before = first_turn ? 0.0f : target[v * args.states];
      target[v * args.states] = fmaf(kLn2, more[v], before);
    }
  }

  __device__ __forceinline__ void add_to_map(const float (&dx)[kRows][V]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float* target = slice.map_row(map, row);
#pragma unroll
      for (int v = 0; v < V; ++v) target[v] += dx[row][v];
    }
  }

  __device__ __forceinline__ void write_visits(int route, const float (&x)[kRows][V], const float (&dy)[kRows][V],
                                               const float (&dx)[kRows][V]) {
    float skip[V] = {};
    if (args.D != nullptr)
      load_states<V>(args.D + static_cast<int64_t>(route) * args.channels + place.channel, place.valid, skip);
    // With a map for each route, of all routes beside each other.
    const int64_t apart = args.x_route != 0 ? args.routes : 1;
    const int64_t first = args.x_route != 0 ? static_cast<int64_t>(place.batch) * args.length * args.routes + route
                                            : (static_cast<int64_t>(place.batch) * args.routes + route) * args.length;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (!slice.has(row) || !place.valid) continue;
      float* target = args.dx + (first + slice.result_row(row) * apart) * args.channels + place.channel;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        target[v] = args.D == nullptr ? dx[row][v] : fmaf(skip[v], dy[row][v], dx[row][v]);
        dD[v] = fmaf(dy[row][v], x[row][v], dD[v]);
      }
    }
  }

  __device__ __forceinline__ void write_ddelta(int row, const float (&dz)[V]) {
    if (!place.valid) return;
    const int64_t at = static_cast<int64_t>(place.batch) * args.length + slice.start + row;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      args.ddelta[at * args.channels + place.channel + v] = kLog2E * dz[v];
      dbias[v] = fmaf(kLog2E, dz[v], dbias[v]);
    }
  }

  // The gradients of a route's parameters, summed over the turns.
  __device__ __forceinline__ void finish(int route) {
    if (place.valid) {
      if constexpr (kOneState)
#pragma unroll
        for (int v = 0; v < V; ++v) args.dA[partial(route) + v] = kLn2 * dA[v];
      if (args.by_visit && args.dD != nullptr) store_states<V>(args.dD + partial(route), true, dD);
      if (!kProjected && args.ddt_bias != nullptr) store_states<V>(args.ddt_bias + partial(route), true, dbias);
    }
    if constexpr (kProjected) {
      __syncthreads();
      write_weight_gradients(slice, route, dweights);
    }
  }

  // The gradient of the map of the band, and with it, once for all routes, that of the skips.
  __device__ __forceinline__ void write_map() {
    __syncthreads();
    const bool by_column = args.bands > 1 && args.axes == kColumnAxis;
    const int from = place.band * args.band_length, until = end_of_band(args, from);
    const bool skips = args.first_launch && args.D != nullptr;
    float skip[V] = {}, sum[V] = {};
    for (int route = 0; route < args.routes && skips && place.valid; ++route)
#pragma unroll
      for (int v = 0; v < V; ++v) skip[v] += args.D[static_cast<int64_t>(route) * args.channels + place.channel + v];
    if (!place.valid) return;
    for (int i = from + place.warp; i < until; i += place.warps) {
      const int pixel = pixel_at(args, by_column, i);
      const int64_t at = (static_cast<int64_t>(place.batch) * args.pixels + pixel) * args.channels + place.channel;
      const Packed<T, V> x = load_packed<T, V>(static_cast<const T*>(args.x) + at, skips);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float dy = skips ? args.grad_out[at + v] : 0.0f;
        sum[v] = fmaf(dy, x[v], sum[v]);
        const float before = args.first_launch ? skip[v] * dy : args.dx[at + v];
        args.dx[at + v] = before + map[(i - from) * kWidth + V * place.lane + v];
      }
    }
    for (int route = 0; route < args.routes && skips; ++route) store_states<V>(args.dD + partial(route), true, sum);
  }
};

template <typename T, int V, bool kOneState, int kRankTiles>
__global__ void __launch_bounds__(kLanes* kMaxBackwardWarps, 2)
    scan2d_backward_kernel(const __grid_constant__ ScanArgs args) {
  MMVMAMBA_SHARED(float, shared);
  BackwardWalk<T, V, kOneState, kRankTiles> walk(args, shared);
  for (int route = 0; route < args.routes; ++route)
    if (in_launch(args, route)) walk.walk(route);
  if (!args.by_visit) walk.write_map();
}

}  // namespace mmvmamba
