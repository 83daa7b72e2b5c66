// How a warp gets the inputs of its slice of 16 positions: pixels, features, step sizes.
#pragma once

#include "scan.cuh"

namespace mmvmamba {

// log2(1 + w) for w in [0, 1] with a small relative error: 1.4e-7, and 5.7e-5 where the inputs have 8 or 11 bits.
template <typename T>
__device__ __forceinline__ float log2_1p(float w, float plus) {
  float p;
  if constexpr (kIsHalf<T>) {
    p = 5.965152755e-02f;
    p = fmaf(p, w, -2.271194011e-01f);
    p = fmaf(p, w, 4.418987930e-01f);
    p = fmaf(p, w, -7.169874310e-01f);
    p = fmaf(p, w, 1.442613244e+00f);
  } else {
    p = 7.549429778e-03f;
    p = fmaf(p, w, -4.256811738e-02f);
    p = fmaf(p, w, 1.128580421e-01f);
    p = fmaf(p, w, -1.971206963e-01f);
    p = fmaf(p, w, 2.756423354e-01f);
    p = fmaf(p, w, -3.584087491e-01f);
    p = fmaf(p, w, 4.806930125e-01f);
    p = fmaf(p, w, -7.213402390e-01f);
    p = fmaf(p, w, 1.442695022e+00f);
  }
  return fmaf(p, w, plus);
}

// Softplus in units of ln 2: log2(1 + 2^z). PyTorch's is the identity beyond 20, which makes no difference in float32.
template <typename T>
__device__ __forceinline__ float softplus2(float z) {
  return log2_1p<T>(exp2_approx(-fabsf(z)), fmaxf(z, 0.0f));
}

// Operands of the tensor cores: numbers of half precision, which have 11 bits, or what such kernels may cut off after
// as many; in float32 two parts.
template <typename T, int kCount>
__device__ __forceinline__ void split_operand(const float (&value)[kCount], uint32_t (&high)[kCount],
                                              uint32_t (&low)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float first = first_part(value[i]);
    high[i] = __float_as_uint(kIsHalf<T> ? value[i] : first);
    low[i] = __float_as_uint(kIsHalf<T> ? 0.0f : value[i] - first);
  }
}

// The slice of 16 positions that a warp works on, and its inputs.
//
// Positions outside the span are made neutral: their step size is 0, so that the state passes them unchanged.
template <typename T, int V, bool kOneState, int kRankTiles>
struct Slice {
  static constexpr bool kProjected = kRankTiles >= 0;
  static constexpr int kWidth = kLanes * V;

  const ScanArgs& args;
  // Copies: references into the same object would keep all of it in memory.
  const SharedLayout layout;
  const Place<V, kOneState> place;
  int* pixels;                 // this warp's, of every row
  float *rows, *features, *z;  // this warp's; of a row: offset, B, map, C (B and C of one state only)
  const float* weights;
  int64_t x, delta;  // addresses of this lane's channel at pixel 0; x: of the route's map
  // Addresses of this block's slot of the projections and of its gradient; in shared memory where registers are scarce.
  int64_t* bases;
  int64_t projections_base, gradients_base;
  int begin, size;  // of the span
  int start;        // position of row 0

  __device__ __forceinline__ Slice(const ScanArgs& args_, const SharedLayout& layout_,
                                   const Place<V, kOneState>& place_, float* shared)
      : args(args_),
        layout(layout_),
        place(place_),
        projections_base(0),
        gradients_base(0),
        begin(0),
        size(0),
        start(0) {
    rows = shared + layout.rows + place.warp * 4 * kRows;
    pixels = reinterpret_cast<int*>(shared + layout.pixels) + place.warp * kRows;
    features = shared + layout.features + place.warp * kRows * layout.feature_stride;
    z = shared + layout.z + place.warp * kRows * layout.z_stride;
    weights = shared + layout.weights;
    bases = reinterpret_cast<int64_t*>(shared + layout.bases);
    const int64_t at = static_cast<int64_t>(place.batch) * args.pixels * args.channels + place.channel;
    x = x_of_route(0);
    delta = kProjected ? 0 : hidden(static_cast<const T*>(args.delta) + at);
    // The columns between rank and rank_padded stay 0 from here on, but for the one that holds 1.
    if (kProjected)
      for (int i = place.lane; i < kRows * layout.feature_stride; i += kLanes) features[i] = 0.0f;
  }

  // The kernels for one state are for models, which all have softplus: no branch in the innermost loop.
  __device__ __forceinline__ bool has_softplus() const { return kOneState || args.delta_softplus; }
  // Whether a row, or every row, is a position of the span.
  __device__ __forceinline__ bool has(int row) const {
    return static_cast<uint32_t>(start + row - begin) < static_cast<uint32_t>(size);
  }
  __device__ __forceinline__ bool is_full() const { return start >= begin && start + kRows <= begin + size; }
  __device__ __forceinline__ int pixel(int row) const { return pixels[row]; }
  // The element at `base` (which is of pixel 0) of a row's pixel. The kernels for one state are launched for images of
  // less than 2^32 elements only, so that an address is one multiplication by a constant.
  template <typename Object, int kElementSize>
  __device__ __forceinline__ Object load(int64_t base, int row) const {
    if constexpr (kOneState)
      return load_constant<Object>(base + static_cast<int64_t>(reinterpret_cast<const uint32_t*>(rows)[4 * row]) *
                                              kElementSize);
    else
      return load_constant<Object>(base + static_cast<int64_t>(pixel(row)) * args.channels * kElementSize);
  }
  // Where results of a row go: its pixel, or its position.
  __device__ __forceinline__ int result_row(int row) const {
    return args.by_visit && !args.at_pixel ? start + row : pixel(row);
  }
  // This lane's place in the row of the map in shared memory: the pixel where the block has the whole map, else the
  // place in the band.
  __device__ __forceinline__ float* map_row(float* map, int row) const {
    const int bytes = reinterpret_cast<const int*>(rows)[4 * row + 2];
    return reinterpret_cast<float*>(reinterpret_cast<char*>(map + V * place.lane) + bytes);
  }
  __device__ __forceinline__ float B(int row, int state) const {
    if constexpr (kOneState) return rows[4 * row + 1];
    return features[row * layout.feature_stride + layout.rank_padded + state];
  }
  __device__ __forceinline__ float C(int row, int state) const {
    if constexpr (kOneState) return rows[4 * row + 3];
    return features[row * layout.feature_stride + layout.rank_padded + args.states + state];
  }
  __device__ __forceinline__ Packed<T, V> load_x(int row) const {  // of a lane without channel: of channel 0
    if constexpr (kOneState || !kProjected)
      return load<Packed<T, V>, sizeof(T)>(x, row);
    else
      return load_constant<Packed<T, V>>(x + static_cast<int64_t>(pixel(row)) * args.x_pixel *
                                                 static_cast<int64_t>(sizeof(T)));
  }

  // To be called before the first `fetch` of a route, with a barrier between.
  __device__ __forceinline__ void start_route(int route) {
    const int slot = args.groups > 1 ? place.group : route;
    const int64_t at = static_cast<int64_t>(place.batch) * args.pixels * args.slots + slot;
    set_base(0, projections_base, hidden(static_cast<const T*>(args.projections) + at * args.features));
    if constexpr (!kOneState && kProjected) x = x_of_route(route);
  }

  // Address of this lane's channel at pixel 0 of the map that a route reads.
  __device__ __forceinline__ int64_t x_of_route(int route) const {
    if constexpr (kOneState || !kProjected)
      return hidden(static_cast<const T*>(args.x) + static_cast<int64_t>(place.batch) * args.pixels * args.channels +
                    place.channel);
    else
      return hidden(static_cast<const T*>(args.x) + static_cast<int64_t>(place.batch) * args.pixels * args.x_pixel +
                    static_cast<int64_t>(route) * args.x_route + place.channel);
  }

  static constexpr bool kBasesInRegisters = kRankTiles == 1;
  __device__ __forceinline__ void set_base(int i, int64_t& here, int64_t address) const {
    if constexpr (kBasesInRegisters)
      here = address;
    else if (threadIdx.x == 0)
      bases[i] = address;
  }
  __device__ __forceinline__ void set_gradients(const float* target) { set_base(1, gradients_base, hidden(target)); }
  __device__ __forceinline__ int64_t projections() const { return kBasesInRegisters ? projections_base : bases[0]; }
  __device__ __forceinline__ int64_t gradients() const { return kBasesInRegisters ? gradients_base : bases[1]; }

  // Fetch positions and features of the slice that starts at `start_`, of `route`.
  __device__ __forceinline__ void fetch(const Span& span, int route, int start_) {
    start = start_;
    begin = span.begin;
    size = span.end - span.begin;
    __syncwarp();  // the last slice is done with
    // Two lanes a row; both write the same.
    const int row = place.lane / 2;
    const int nearest = max(span.begin, min(start + row, span.end - 1)), along = span.origin + span.step * nearest;
    const bool permuted = !kOneState && span.order == kPermuted;
    const int its_pixel = permuted ? permuted_pixel(args, route, nearest) : pixel_at(args, span.by_column, along);
    // Behind the map, one row a warp takes what positions outside would add.
    const int in_map = args.bands == 1 ? its_pixel : along - place.band * args.band_length;
    const int its_row = has(row) ? in_map : args.band_length + place.warp;
    pixels[row] = its_pixel;
    reinterpret_cast<uint32_t*>(rows)[4 * row] =
        static_cast<uint32_t>(its_pixel) * static_cast<uint32_t>(args.channels);
    reinterpret_cast<int*>(rows)[4 * row + 2] = its_row * kWidth * static_cast<int>(sizeof(float));
    fetch_features(row, its_pixel, has(row));
    __syncwarp();
  }

  // B comes times ln 2.
  __device__ __forceinline__ void fetch_features(int row, int its_pixel, bool valid) {
    const int half = place.lane % 2, skip = layout.rank_padded - args.rank;
    const int64_t source =
        multiply_add_wide(its_pixel, args.slots * args.features * static_cast<int>(sizeof(T)), projections()) +
        half * (kRankTiles == 1 ? 2 : 1) * static_cast<int>(sizeof(T));
    float* target = features + row * layout.feature_stride;
    if constexpr (kRankTiles == 1) {
      // An even rank up to 6 and one state: at most four pairs, of which the last is B and C. Two lanes a row take two
      // each.
      Packed<T, 2> pair[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (valid && 4 * i + 2 * half < args.features)
          pair[i] = load_constant<Packed<T, 2>>(source + 4 * i * static_cast<int>(sizeof(T)));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 4 * i + 2 * half;
        if (column < args.rank) {
          const float both[2] = {pair[i][0], pair[i][1]};
          store_vector<2>(target + column, both);
        } else if (column == args.rank) {
          rows[4 * row + 1] = pair[i][0] * kLn2;
          rows[4 * row + 3] = pair[i][1];
        }
      }
    } else {
#pragma unroll 4
      for (int column = half; column < args.features; column += 2) {
        const float value =
            valid ? load_constant<Packed<T, 1>>(source + (column - half) * static_cast<int>(sizeof(T)))[0] : 0.0f;
        const int state = column - args.rank;
        if (state < 0)
          target[column] = value;
        else if constexpr (kOneState)
          rows[4 * row + (state == 0 ? 1 : 3)] = state == 0 ? value * kLn2 : value;
        else
          target[column + skip] = state < args.states ? value * kLn2 : value;
      }
    }
    if (kProjected) target[args.rank] = 1.0f;
  }

  // The pre-activation step sizes of the slice into z, by tensor cores; the weights are there in two parts of 11 bits,
  // so that nothing is rounded to less than float32 has.
  __device__ __forceinline__ void project() {
    constexpr int kTiles = kWidth / 8;
    const int g = place.lane / 4, t = place.lane % 4;
    float sum[kTiles][4] = {};
    const int tiles = kRankTiles == 1 ? 1 : layout.rank_padded / kRankTile;
#pragma unroll 1
    for (int depth = 0; depth < tiles; ++depth) {
      const float* feature = features + g * layout.feature_stride + depth * kRankTile + t;
      const float p[4] = {feature[0], feature[8 * layout.feature_stride], feature[4],
                          feature[8 * layout.feature_stride + 4]};
      uint32_t high[4], low[4];
      split_operand<T>(p, high, low);
      const float* weight = weights + 4 * ((4 * depth + t) * layout.weight_stride + g);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Packed<float, 4> parts = *reinterpret_cast<const Packed<float, 4>*>(weight + 32 * tile);
        const uint32_t w_high[2] = {__float_as_uint(parts[0]), __float_as_uint(parts[1])};
        const uint32_t w_low[2] = {__float_as_uint(parts[2]), __float_as_uint(parts[3])};
        if constexpr (!kIsHalf<T>) mma_16x8x8_tf32(sum[tile], low, w_high);
        mma_16x8x8_tf32(sum[tile], high, w_low);
        mma_16x8x8_tf32(sum[tile], high, w_high);
      }
      if constexpr (kRankTiles == 1) break;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float* target = z + g * layout.z_stride + 8 * tile + 2 * t;
      const float upper[2] = {sum[tile][0], sum[tile][1]}, lower[2] = {sum[tile][2], sum[tile][3]};
      store_vector<2>(target, upper);
      store_vector<2>(target + 8 * layout.z_stride, lower);
    }
    __syncwarp();
    if (!is_full()) {
      const float neutral = has_softplus() ? -INFINITY : 0.0f;
#pragma unroll 1
      for (int row = 0; row < kRows; ++row)
        if (!has(row))
          for (int v = 0; v < V; ++v) z[row * layout.z_stride + V * place.lane + v] = neutral;
    }
  }

  // Step size of a row in units of ln 2; `bias` is used where step sizes are given.
  __device__ __forceinline__ void step_sizes(int row, const float (&bias)[V], float (&s)[V]) const {
    if constexpr (kProjected) {
      const Packed<float, V> raw =
          *reinterpret_cast<const Packed<float, V>*>(z + row * layout.z_stride + V * place.lane);
#pragma unroll
      for (int v = 0; v < V; ++v) s[v] = has_softplus() ? softplus2<T>(raw[v]) : raw[v];
    } else {
      const Packed<T, V> raw = load<Packed<T, V>, sizeof(T)>(delta, row);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float scaled = fmaf(raw[v], kLog2E, bias[v]);
        s[v] = has(row) ? (has_softplus() ? softplus2<T>(scaled) : scaled) : 0.0f;
      }
    }
  }

  // The step-size weights of a route into shared memory, times log2(e) and in two parts; by the whole block.
  __device__ __forceinline__ void load_weights(int route, float* target) const {
    if constexpr (!kProjected) return;
    const int within = args.channel_begin + place.tile * kWidth;
    const int first = place.group * args.group_channels + within;
    for (int i = threadIdx.x; i < kWidth * layout.rank_padded; i += blockDim.x) {
      const int channel = i / layout.rank_padded, feature = i % layout.rank_padded;
      const bool is_valid = within + channel < args.group_channels;
      const int64_t parameter = static_cast<int64_t>(route) * args.channels + first + channel;
      float weight = 0.0f;
      if (is_valid && feature < args.rank) weight = args.dt_weight[parameter * args.rank + feature];
      if (is_valid && feature == args.rank && args.dt_bias != nullptr) weight = args.dt_bias[parameter];
      weight *= kLog2E;
      const float high = first_part(weight), low = weight - high;
      // Rows t and t + 4 of a tile beside each other, first their high parts: what a lane needs is one vector.
      float* place_of = target + 4 * ((feature / kRankTile * 4 + feature % 4) * layout.weight_stride + channel) +
                        feature % kRankTile / 4;
      place_of[0] = high;
      place_of[2] = low == low ? low : 0.0f;  // an infinite weight has no remainder
    }
  }

  // log2(e) times the bias of given step sizes.
  __device__ __forceinline__ void load_bias(int route, float (&bias)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v)
      bias[v] = !kProjected && place.valid && args.dt_bias != nullptr
                    ? kLog2E * args.dt_bias[static_cast<int64_t>(route) * args.channels + place.channel + v]
                    : 0.0f;
  }

  // Decay rates of a state.
  __device__ __forceinline__ void load_rates(int route, int state, float (&A)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v)
      A[v] = place.valid
                 ? args.A[(static_cast<int64_t>(route) * args.channels + place.channel + v) * args.states + state]
                 : 0.0f;
  }
};

// Index of element (batch, route, i, state, channel) of a tensor (b, routes, count, n, d).
template <typename AnyPlace>
__device__ __forceinline__ int64_t state_index(const ScanArgs& args, const AnyPlace& place, int route, int count, int i,
                                               int state) {
  const int64_t outer = (static_cast<int64_t>(place.batch) * args.routes + route) * count + i;
  return (outer * args.states + state) * args.channels + place.channel;
}

template <int V>
__device__ __forceinline__ void load_states(const float* source, bool valid, float (&h)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) h[v] = valid ? source[v] : 0.0f;
}

template <int V>
__device__ __forceinline__ void store_states(float* target, bool valid, const float (&h)[V]) {
  if (!valid) return;
#pragma unroll
  for (int v = 0; v < V; ++v) target[v] = h[v];
}

}  // namespace mmvmamba
