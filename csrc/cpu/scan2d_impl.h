// scan2d on channels-last maps: routes are walked one after another into the same output block, so that no sum
// crosses threads; a chunk gathers the pixels a route visits, which costs the same for rows, columns and permutations.
#pragma once

#include "kernels_impl.h"

namespace mmvmamba {
namespace {

// A task of scan2d: one batch entry and one block of channels, all routes.
template <typename T>
struct MapTask {
  int64_t batch, block, first, width;  // first: channel; width: channels

  MapTask(const Scan2dArgs<T>& a, int64_t task, int64_t block_size) {
    const int64_t blocks = ceil_div(a.channels, block_size);
    block = task % blocks;
    batch = task / blocks;
    first = block * block_size;
    width = min_of(block_size, a.channels - first);
  }
};

// The pixels that positions start .. start + steps - 1 of a route visit.
template <typename T>
MMVMAMBA_INLINE void visited_pixels(const Scan2dArgs<T>& a, int64_t route, int64_t start, int64_t steps,
                                    int64_t* pixels) {
  if (a.permutation) {
    for (int64_t t = 0; t < steps; ++t) pixels[t] = a.permutation[route * a.length + start + t];
    return;
  }
  const int64_t order = a.orders[route];
  const bool reversed = order == kRowReversed || order == kColumnReversed;
  const bool columns = order == kColumn || order == kColumnReversed;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t position = reversed ? a.length - 1 - (start + t) : start + t;
    pixels[t] = columns ? position % a.height * a.width + position / a.height : position;
  }
}

template <typename T, int NV>
MMVMAMBA_INLINE void gather_chunk(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                  const int64_t* pixels, int64_t steps) {
  typedef Vec<T> V;
  constexpr int64_t row = kMaxBlock<T>, block = NV * kLanes<T>;
  const int64_t map = a.height * a.width, features = a.rank + 2 * a.states;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t pixel = task.batch * map + pixels[t];
    load_row(s.u + t * row, a.x + pixel * a.channels + task.first, task.width, block);
    const T* projection = a.projections + (pixel * a.routes + route) * features;
    V raw[NV];
    for (int v = 0; v < NV; ++v) raw[v] = V{};
    for (int64_t r = 0; r < a.rank; ++r)
      for (int v = 0; v < NV; ++v) raw[v] += load(s.W + r * row + v * kLanes<T>) * projection[r];
    for (int v = 0; v < NV; ++v) store<T>(s.delta + t * row + v * kLanes<T>, raw[v]);
    __builtin_memcpy(s.dt + t * a.rank, projection, a.rank * sizeof(T));
    __builtin_memcpy(s.B + t * a.states, projection + a.rank, a.states * sizeof(T));
    __builtin_memcpy(s.C + t * a.states, projection + a.rank + a.states, a.states * sizeof(T));
  }
  finish_delta<T, NV>(s, steps, a.delta_softplus);
}

template <typename T, int NV>
MMVMAMBA_INLINE void load_parameters(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t channel = route * a.channels + task.first;
  load_transposed(s.A, a.A + channel * a.states, a.states, task.width, block);
  load_transposed(s.W, a.dt_weight + channel * a.rank, a.rank, task.width, block);
  load_row_or(s.D, a.D ? a.D + channel : nullptr, T(0), task.width, block);
  load_row_or(s.bias, a.dt_bias ? a.dt_bias + channel : nullptr, T(0), task.width, block);
}

template <typename T>
MMVMAMBA_INLINE void clear_map(T* map, int64_t pixels, int64_t channels, int64_t width) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) fill(map + pixel * channels, width, T(0));
}

template <typename T, int NV>
void scan2d_tasks(const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, a.rank);
  constexpr int64_t row = kMaxBlock<T>;
  const int64_t chunks = ceil_div(a.length, kChunk), map = a.height * a.width;
  int64_t pixels[kChunk];
  for (int64_t index = begin; index < end; ++index) {
    const MapTask<T> task(a, index, NV * kLanes<T>);
    T* out = a.out + task.batch * map * a.channels + task.first;
    clear_map(out, map, a.channels, task.width);
    for (int64_t route = 0; route < a.routes; ++route) {
      load_parameters<T, NV>(a, s, task, route);
      fill(s.h, a.states * row, T(0));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
        const int64_t carry = ((task.batch * a.routes + route) * chunks + chunk) * a.states;
        if (a.carries)
          for (int64_t n = 0; n < a.states; ++n)
            store_row(a.carries + (carry + n) * a.channels + task.first, s.h + n * row, task.width);
        visited_pixels(a, route, start, steps, pixels);
        gather_chunk<T, NV>(a, s, task, route, pixels, steps);
        scan_chunk<T, NV>(s, steps, a.states);
        for (int64_t t = 0; t < steps; ++t) add_row(out + pixels[t] * a.channels, s.y + t * row, task.width);
      }
    }
  }
}

// d(dt) = ddelta W^T and dW += dt^T ddelta of one chunk. Lanes are positions in the first: no sum across lanes.
template <typename T, int NV>
MMVMAMBA_INLINE void step_size_gradients(Scratch<T>& s, int64_t steps, int64_t rank, int64_t width) {
  typedef Vec<T> V;
  constexpr int64_t row = kMaxBlock<T>;
  constexpr int kVectors = kChunk / kLanes<T>;
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t t = 0; t < steps; ++t) s.transposed[c * kChunk + t] = s.ddelta[t * row + c];
    for (int64_t t = steps; t < kChunk; ++t) s.transposed[c * kChunk + t] = T(0);
  }
  for (int64_t r = 0; r < rank; ++r) {
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = V{};
    for (int64_t c = 0; c < width; ++c)
      for (int v = 0; v < kVectors; ++v) sum[v] += load(s.transposed + c * kChunk + v * kLanes<T>) * s.W[r * row + c];
    T by_position[kChunk];
    for (int v = 0; v < kVectors; ++v) store<T>(by_position + v * kLanes<T>, sum[v]);
    for (int64_t t = 0; t < steps; ++t) s.ddt[t * rank + r] = by_position[t];
    V dW[NV];
    for (int v = 0; v < NV; ++v) dW[v] = V{};
    for (int64_t t = 0; t < steps; ++t)
      for (int v = 0; v < NV; ++v) dW[v] += load(s.ddelta + t * row + v * kLanes<T>) * s.dt[t * rank + r];
    for (int v = 0; v < NV; ++v) store<T>(s.dW + r * row + v * kLanes<T>, load(s.dW + r * row + v * kLanes<T>) + dW[v]);
  }
}

template <typename T, int NV>
MMVMAMBA_INLINE void scatter_gradients(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                       const int64_t* pixels, int64_t steps) {
  const int64_t map = a.height * a.width, features = a.rank + 2 * a.states;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t pixel = task.batch * map + pixels[t];
    add_row(a.dx + pixel * a.channels + task.first, s.du + t * kMaxBlock<T>, task.width);
    T* projection = a.dprojections + ((task.block * a.batch * map + pixel) * a.routes + route) * features;
    add_row(projection, s.ddt + t * a.rank, a.rank);
    add_row(projection + a.rank, s.dB + t * a.states, a.states);
    add_row(projection + a.rank + a.states, s.dC + t * a.states, a.states);
  }
}

template <typename T, int NV>
MMVMAMBA_INLINE void scan2d_route_backward(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task,
                                           int64_t route) {
  constexpr int64_t row = kMaxBlock<T>, block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk), map = a.height * a.width;
  int64_t pixels[kChunk];
  load_parameters<T, NV>(a, s, task, route);
  clear_gradients(s, a.states);
  fill(s.q, a.states * row, T(0));
  fill(s.dW, a.rank * row, T(0));
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
    visited_pixels(a, route, start, steps, pixels);
    gather_chunk<T, NV>(a, s, task, route, pixels, steps);
    for (int64_t t = 0; t < steps; ++t)
      load_row(s.y + t * row, a.grad_out + (task.batch * map + pixels[t]) * a.channels + task.first, task.width, block);
    const int64_t carry = ((task.batch * a.routes + route) * chunks + chunk) * a.states;
    for (int64_t n = 0; n < a.states; ++n)
      load_row(s.h + n * row, a.carries + (carry + n) * a.channels + task.first, task.width, block);
    scan_chunk_backward<T, NV>(s, steps, a.states, task.width, a.delta_softplus);
    step_size_gradients<T, NV>(s, steps, a.rank, task.width);
    scatter_gradients<T, NV>(a, s, task, route, pixels, steps);
  }
  const int64_t channel = (task.batch * a.routes + route) * a.channels + task.first;
  store_transposed(a.dA + channel * a.states, s.dA, a.states, task.width);
  store_transposed(a.ddt_weight + channel * a.rank, s.dW, a.rank, task.width);
  if (a.dD) store_row(a.dD + channel, s.dD, task.width);
  if (a.ddt_bias) store_row(a.ddt_bias + channel, s.dbias, task.width);
}

template <typename T, int NV>
void scan2d_backward_tasks(const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, a.rank);
  const int64_t map = a.height * a.width, features = a.routes * (a.rank + 2 * a.states);
  for (int64_t index = begin; index < end; ++index) {
    const MapTask<T> task(a, index, NV * kLanes<T>);
    clear_map(a.dx + task.batch * map * a.channels + task.first, map, a.channels, task.width);
    fill(a.dprojections + (task.block * a.batch + task.batch) * map * features, map * features, T(0));
    for (int64_t route = 0; route < a.routes; ++route) scan2d_route_backward<T, NV>(a, s, task, route);
  }
}

}  // namespace
}  // namespace mmvmamba
