// selective_scan on channel-first tensors (b, d, l): a chunk is transposed into rows of channels as it is gathered.
#pragma once

#include "kernels_impl.h"

namespace mmvmamba {
namespace {

// A task of selective_scan: one batch entry and one block of channels, all of one group.
template <typename T>
struct ScanTask {
  int64_t batch, group, block, first, width;  // first: channel; width: channels

  ScanTask(const SelectiveScanArgs<T>& a, int64_t task, int64_t block_size) {
    const int64_t per_group = a.channels / a.groups;
    const int64_t blocks = ceil_div(per_group, block_size);
    block = task % blocks;
    group = task / blocks % a.groups;
    batch = task / blocks / a.groups;
    first = group * per_group + block * block_size;
    width = min_of(block_size, per_group - block * block_size);
  }
};

// Transpose a chunk of (d, l) into rows of channels.
template <typename T>
MMVMAMBA_INLINE void gather_channels(T* rows, const T* source, int64_t length, int64_t steps, int64_t width,
                                     int64_t block) {
  for (int64_t c = 0; c < width; ++c)
    for (int64_t t = 0; t < steps; ++t) rows[t * kMaxBlock<T> + c] = source[c * length + t];
  for (int64_t t = 0; t < steps; ++t) fill(rows + t * kMaxBlock<T> + width, block - width, T(0));
}

template <typename T>
MMVMAMBA_INLINE void scatter_channels(T* target, const T* rows, int64_t length, int64_t steps, int64_t width) {
  for (int64_t c = 0; c < width; ++c)
    for (int64_t t = 0; t < steps; ++t) target[c * length + t] = rows[t * kMaxBlock<T> + c];
}

template <typename T, int NV>
MMVMAMBA_INLINE void gather_chunk(const SelectiveScanArgs<T>& a, Scratch<T>& s, const ScanTask<T>& task, int64_t start,
                                  int64_t steps) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t at = (task.batch * a.channels + task.first) * a.length + start;
  gather_channels(s.u, a.u + at, a.length, steps, task.width, block);
  gather_channels(s.delta, a.delta + at, a.length, steps, task.width, block);
  const int64_t row = (task.batch * a.groups + task.group) * a.states;
  for (int64_t n = 0; n < a.states; ++n)
    for (int64_t t = 0; t < steps; ++t) {
      s.B[t * a.states + n] = a.B[(row + n) * a.length + start + t];
      s.C[t * a.states + n] = a.C[(row + n) * a.length + start + t];
    }
  finish_delta<T, NV>(s, steps, a.delta_softplus);
}

template <typename T, int NV>
MMVMAMBA_INLINE void load_parameters(const SelectiveScanArgs<T>& a, Scratch<T>& s, const ScanTask<T>& task) {
  constexpr int64_t block = NV * kLanes<T>;
  load_transposed(s.A, a.A + task.first * a.states, a.states, task.width, block);
  load_row_or(s.D, a.D ? a.D + task.first : nullptr, T(0), task.width, block);
  load_row_or(s.bias, a.delta_bias ? a.delta_bias + task.first : nullptr, T(0), task.width, block);
}

template <typename T, int NV>
void selective_scan_tasks(const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, 0);
  constexpr int64_t row = kMaxBlock<T>;
  const int64_t chunks = ceil_div(a.length, kChunk);
  for (int64_t index = begin; index < end; ++index) {
    const ScanTask<T> task(a, index, NV * kLanes<T>);
    load_parameters<T, NV>(a, s, task);
    fill(s.h, a.states * row, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
      if (a.carries)
        for (int64_t n = 0; n < a.states; ++n)
          store_row(a.carries + ((task.batch * chunks + chunk) * a.states + n) * a.channels + task.first, s.h + n * row,
                    task.width);
      gather_chunk<T, NV>(a, s, task, start, steps);
      scan_chunk<T, NV>(s, steps, a.states);
      scatter_channels(a.out + (task.batch * a.channels + task.first) * a.length + start, s.y, a.length, steps,
                       task.width);
    }
    store_transposed(a.last_state + (task.batch * a.channels + task.first) * a.states, s.h, a.states, task.width);
  }
}

template <typename T, int NV>
void selective_scan_backward_tasks(const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, 0);
  constexpr int64_t row = kMaxBlock<T>, block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk);
  for (int64_t index = begin; index < end; ++index) {
    const ScanTask<T> task(a, index, block);
    load_parameters<T, NV>(a, s, task);
    clear_gradients(s, a.states);
    const int64_t channel = task.batch * a.channels + task.first;
    if (a.grad_last_state)
      load_transposed(s.q, a.grad_last_state + channel * a.states, a.states, task.width, block);
    else
      fill(s.q, a.states * row, T(0));
    const int64_t group_row = (task.block * a.batch * a.groups + task.batch * a.groups + task.group) * a.states;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
      gather_chunk<T, NV>(a, s, task, start, steps);
      gather_channels(s.y, a.grad_out + channel * a.length + start, a.length, steps, task.width, block);
      for (int64_t n = 0; n < a.states; ++n)
        load_row(s.h + n * row, a.carries + ((task.batch * chunks + chunk) * a.states + n) * a.channels + task.first,
                 task.width, block);
      scan_chunk_backward<T, NV>(s, steps, a.states, task.width, a.delta_softplus);
      scatter_channels(a.du + channel * a.length + start, s.du, a.length, steps, task.width);
      scatter_channels(a.ddelta + channel * a.length + start, s.ddelta, a.length, steps, task.width);
      for (int64_t n = 0; n < a.states; ++n)
        for (int64_t t = 0; t < steps; ++t) {
          a.dB[(group_row + n) * a.length + start + t] = s.dB[t * a.states + n];
          a.dC[(group_row + n) * a.length + start + t] = s.dC[t * a.states + n];
        }
    }
    store_transposed(a.dA + channel * a.states, s.dA, a.states, task.width);
    if (a.dD) store_row(a.dD + channel, s.dD, task.width);
    if (a.dbias) store_row(a.dbias + channel, s.dbias, task.width);
  }
}

}  // namespace
}  // namespace mmvmamba
