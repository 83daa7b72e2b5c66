// scan2d on channels-last maps: routes are walked one after another into the same output block, so that no sum
// crosses threads; a chunk gathers the pixels a route visits, which costs the same for rows, columns and permutations.
#pragma once

#include "chunk_backward.h"

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
  const int64_t position = reversed ? a.length - 1 - start : start, step = reversed ? -1 : 1;
  if (order == kRow || order == kRowReversed) {
    for (int64_t t = 0; t < steps; ++t) pixels[t] = position + t * step;
    return;
  }
  int64_t column = position / a.height, row = position % a.height;
  for (int64_t t = 0; t < steps; ++t) {
    pixels[t] = row * a.width + column;
    row += step;
    if (row == a.height) {
      row = 0;
      ++column;
    } else if (row < 0) {
      row = a.height - 1;
      --column;
    }
  }
}

// Element of x, or of dx, where the block of channels of a route's pixel 0 begins.
template <typename T>
MMVMAMBA_INLINE int64_t first_element(const Scan2dArgs<T>& a, const MapTask<T>& task, int64_t route) {
  return task.batch * a.height * a.width * a.x_pixel + route * a.x_route + task.first;
}

// Routes along columns and permutations read lines that no hardware prefetcher foresees; ask for those of the next
// chunk.
MMVMAMBA_INLINE void prefetch_rows(const void* map, int64_t element_size, int64_t first, int64_t channels,
                                   int64_t width, const int64_t* pixels, int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    const char* row = static_cast<const char*>(map) + (first + pixels[t] * channels) * element_size;
    for (int64_t at = 0; at < width * element_size; at += 64) __builtin_prefetch(row + at);
  }
}

template <typename T>
MMVMAMBA_INLINE int64_t element_size(const Input<T>& input) {
  return input.element == Element::kSame ? sizeof(T) : 2;
}

template <typename T, int NV>
MMVMAMBA_INLINE void gather_chunk(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                  const int64_t* pixels, int64_t steps) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t map = a.height * a.width, features = a.rank + 2 * a.states, first = first_element(a, task, route);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t pixel = task.batch * map + pixels[t];
    s.u[t] = input_row(a.x, first + pixels[t] * a.x_pixel, s.u_rows + t * block, task.width, block);
    s.dt[t] = input_row(a.projections, (pixel * a.routes + route) * features, s.feature_rows + t * s.features, features,
                        features);
    s.B[t] = s.dt[t] + a.rank;
    s.C[t] = s.B[t] + a.states;
  }
}

template <typename T, int NV, bool kBackward>
MMVMAMBA_INLINE void load_route(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route) {
  const int64_t channel = route * a.channels + task.first;
  load_parameters<T, NV, kBackward>(s, a.A + channel * a.states, a.dt_weight + channel * a.rank,
                                    a.D ? a.D + channel : nullptr, a.dt_bias ? a.dt_bias + channel : nullptr,
                                    task.width, a.delta_softplus);
}

template <typename T>
MMVMAMBA_INLINE void clear_map(T* map, int64_t pixels, int64_t channels, int64_t width) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) fill(map + pixel * channels, width, T(0));
}

// Whether the first route, or each on a map of its own, may overwrite what a block of the map holds: it writes whole
// rows, each exactly once.
template <typename T>
MMVMAMBA_INLINE bool first_route_overwrites(const Scan2dArgs<T>& a, const MapTask<T>& task, int64_t block) {
  const bool every_pixel = a.permutation == nullptr && a.length == a.height * a.width;
  return a.routes > 0 && every_pixel && task.width == block;
}

template <typename T, int NV>
MMVMAMBA_INLINE void scan2d_route(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                  bool add) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk), map = a.height * a.width;
  const bool whole = task.width == block;
  T* out = a.out + task.batch * map * a.channels + task.first;
  int64_t pixels[kChunk], next_pixels[kChunk];
  load_route<T, NV, false>(a, s, task, route);
  fill(s.h, a.states * block, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
    const int64_t carry = ((task.batch * a.routes + route) * chunks + chunk) * a.states;
    if (a.carries)
      for (int64_t n = 0; n < a.states; ++n)
        store_row(a.carries + (carry + n) * a.channels + task.first, s.h + n * block, task.width);
    visited_pixels(a, route, start, steps, pixels);
    if (chunk + 1 < chunks) {
      const int64_t next_steps = min_of(kChunk, a.length - start - kChunk);
      visited_pixels(a, route, start + kChunk, next_steps, next_pixels);
      const int64_t first = task.batch * map * a.channels + task.first;
      prefetch_rows(a.x.data, element_size(a.x), first_element(a, task, route), a.x_pixel, block, next_pixels,
                    next_steps);
      if (add) prefetch_rows(a.out, sizeof(T), first, a.channels, block, next_pixels, next_steps);
    }
    gather_chunk<T, NV>(a, s, task, route, pixels, steps);
    for (int64_t t = 0; t < steps; ++t) s.y[t] = whole ? out + pixels[t] * a.channels : s.y_rows + t * block;
    project_chunk<T, NV, false>(s, steps, a.delta_softplus);
    scan_chunk<T, NV>(s, steps, whole && add);
    if (!whole)
      for (int64_t t = 0; t < steps; ++t) add_row(out + pixels[t] * a.channels, s.y[t], task.width);
  }
}

template <typename T, int NV>
void scan2d_tasks(const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, a.rank);
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t map = a.height * a.width;
  for (int64_t index = begin; index < end; ++index) {
    const MapTask<T> task(a, index, block);
    const bool overwrites = first_route_overwrites(a, task, block);
    if (!overwrites) clear_map(a.out + task.batch * map * a.channels + task.first, map, a.channels, task.width);
    for (int64_t route = 0; route < a.routes; ++route) scan2d_route<T, NV>(a, s, task, route, route > 0 || !overwrites);
  }
}

// Add the gradients of a chunk to their pixels: dx where it is not there already, and of the projections.
template <typename T, int NV>
MMVMAMBA_INLINE void scatter_gradients(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                       const int64_t* pixels, int64_t steps) {
  const int64_t map = a.height * a.width, features = a.rank + 2 * a.states, first = first_element(a, task, route);
  if (task.width != NV * kLanes<T>)
    for (int64_t t = 0; t < steps; ++t) add_row(a.dx + first + pixels[t] * a.x_pixel, s.du[t], task.width);
  transpose(s.dfeature_rows, s.features, s.dfeatures, kChunk, s.features, kChunk);
  T* target = a.dprojections + ((task.block * a.batch + task.batch) * map * a.routes + route) * features;
  for (int64_t t = 0; t < steps; ++t)
    add_row(target + pixels[t] * a.routes * features, s.dfeature_rows + t * s.features, features);
}

template <typename T, int NV>
MMVMAMBA_INLINE void scan2d_route_backward(const Scan2dArgs<T>& a, Scratch<T>& s, const MapTask<T>& task, int64_t route,
                                           bool add) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk), map = a.height * a.width, x_first = first_element(a, task, route);
  const bool whole = task.width == block;
  int64_t pixels[kChunk], next_pixels[kChunk];
  load_route<T, NV, true>(a, s, task, route);
  clear_gradients<T, NV>(s);
  fill(s.q, a.states * block, T(0));
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
    visited_pixels(a, route, start, steps, pixels);
    if (chunk > 0) {
      visited_pixels(a, route, start - kChunk, kChunk, next_pixels);
      const int64_t first = task.batch * map * a.channels + task.first;
      prefetch_rows(a.x.data, element_size(a.x), x_first, a.x_pixel, block, next_pixels, kChunk);
      prefetch_rows(a.grad_out.data, element_size(a.grad_out), first, a.channels, block, next_pixels, kChunk);
      if (add) prefetch_rows(a.dx, sizeof(T), x_first, a.x_pixel, block, next_pixels, kChunk);
    }
    gather_chunk<T, NV>(a, s, task, route, pixels, steps);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (task.batch * map + pixels[t]) * a.channels + task.first;
      s.dy[t] = input_row(a.grad_out, at, s.dy_rows + t * block, task.width, block);
      s.du[t] = whole ? a.dx + x_first + pixels[t] * a.x_pixel : s.du_rows + t * block;
    }
    const int64_t carry = ((task.batch * a.routes + route) * chunks + chunk) * a.states;
    for (int64_t n = 0; n < a.states; ++n)
      load_row(s.h + n * block, a.carries + (carry + n) * a.channels + task.first, task.width, block);
    project_chunk<T, NV, true>(s, steps, a.delta_softplus);
    scan_chunk_backward<T, NV>(s, steps, whole && add, task.width);
    project_chunk_backward<T, NV>(s, steps, task.width);
    scatter_gradients<T, NV>(a, s, task, route, pixels, steps);
  }
  const int64_t channel = (task.batch * a.routes + route) * a.channels + task.first;
  transpose(a.dA + channel * a.states, a.states, s.dA, block, a.states, task.width);
  transpose(a.ddt_weight + channel * a.rank, a.rank, s.dW, block, a.rank, task.width);
  if (a.dD) store_row(a.dD + channel, s.dD, task.width);
  if (a.ddt_bias) store_row(a.ddt_bias + channel, s.dbias, task.width);
}

template <typename T, int NV>
void scan2d_backward_tasks(const Scan2dArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, a.rank);
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t map = a.height * a.width, features = a.routes * (a.rank + 2 * a.states);
  for (int64_t index = begin; index < end; ++index) {
    const MapTask<T> task(a, index, block);
    const bool overwrites = first_route_overwrites(a, task, block), apart = a.x_route != 0;
    for (int64_t route = 0; !overwrites && route < (apart ? a.routes : 1); ++route)
      clear_map(a.dx + first_element(a, task, route), map, a.x_pixel, task.width);
    fill(a.dprojections + (task.block * a.batch + task.batch) * map * features, map * features, T(0));
    for (int64_t route = 0; route < a.routes; ++route)
      scan2d_route_backward<T, NV>(a, s, task, route, (route > 0 && !apart) || !overwrites);
  }
}

}  // namespace
}  // namespace mmvmamba
