// selective_scan on channel-first tensors (b, d, l): a chunk is transposed into rows of channels as it is gathered.
#pragma once

#include "chunk_backward.h"

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

// Read `width` channels of (d, l) as rows of one position each, padded with zeros.
template <typename T>
MMVMAMBA_INLINE void gather_channels(T* rows, const T* source, int64_t length, int64_t steps, int64_t width,
                                     int64_t block) {
  if (width < block) fill(rows, kChunk * block, T(0));
  transpose(rows, block, source, length, width, steps);
}

template <typename T, int NV, bool kBackward>
MMVMAMBA_INLINE void gather_chunk(const SelectiveScanArgs<T>& a, Scratch<T>& s, const ScanTask<T>& task, int64_t start,
                                  int64_t steps) {
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t at = (task.batch * a.channels + task.first) * a.length + start;
  gather_channels(s.u_rows, a.u + at, a.length, steps, task.width, block);
  gather_channels(s.delta, a.delta + at, a.length, steps, task.width, block);
  const int64_t group = (task.batch * a.groups + task.group) * a.states * a.length + start;
  transpose(s.B_rows, a.states, a.B + group, a.length, a.states, steps);
  transpose(s.C_rows, a.states, a.C + group, a.length, a.states, steps);
  for (int64_t t = 0; t < steps; ++t) {
    s.u[t] = s.u_rows + t * block;
    s.B[t] = s.B_rows + t * a.states;
    s.C[t] = s.C_rows + t * a.states;
  }
  finish_chunk<T, NV, kBackward>(s, steps, a.delta_softplus);
}

template <typename T, int NV, bool kBackward>
MMVMAMBA_INLINE void load_channels(const SelectiveScanArgs<T>& a, Scratch<T>& s, const ScanTask<T>& task) {
  const T* no_weight = nullptr;
  load_parameters<T, NV, kBackward>(s, a.A + task.first * a.states, no_weight, a.D ? a.D + task.first : nullptr,
                                    a.delta_bias ? a.delta_bias + task.first : nullptr, task.width, a.delta_softplus);
}

template <typename T, int NV>
void selective_scan_tasks(const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, 0);
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk);
  for (int64_t t = 0; t < kChunk; ++t) s.y[t] = s.y_rows + t * block;
  for (int64_t index = begin; index < end; ++index) {
    const ScanTask<T> task(a, index, block);
    const int64_t channel = task.batch * a.channels + task.first;
    load_channels<T, NV, false>(a, s, task);
    fill(s.h, a.states * block, T(0));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
      if (a.carries)
        for (int64_t n = 0; n < a.states; ++n)
          store_row(a.carries + ((task.batch * chunks + chunk) * a.states + n) * a.channels + task.first,
                    s.h + n * block, task.width);
      gather_chunk<T, NV, false>(a, s, task, start, steps);
      scan_chunk<T, NV>(s, steps, false);
      transpose(a.out + channel * a.length + start, a.length, s.y_rows, block, steps, task.width);
    }
    transpose(a.last_state + channel * a.states, a.states, s.h, block, a.states, task.width);
  }
}

template <typename T, int NV>
void selective_scan_backward_tasks(const SelectiveScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  Scratch<T> s(memory, a.states, 0);
  constexpr int64_t block = NV * kLanes<T>;
  const int64_t chunks = ceil_div(a.length, kChunk);
  for (int64_t t = 0; t < kChunk; ++t) {
    s.dy[t] = s.dy_rows + t * block;
    s.du[t] = s.du_rows + t * block;
  }
  for (int64_t index = begin; index < end; ++index) {
    const ScanTask<T> task(a, index, block);
    load_channels<T, NV, true>(a, s, task);
    clear_gradients<T, NV>(s);
    const int64_t channel = task.batch * a.channels + task.first;
    fill(s.q, a.states * block, T(0));
    if (a.grad_last_state)
      transpose(s.q, block, a.grad_last_state + channel * a.states, a.states, task.width, a.states);
    const int64_t group_row = (task.block * a.batch * a.groups + task.batch * a.groups + task.group) * a.states;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t start = chunk * kChunk, steps = min_of(kChunk, a.length - start);
      gather_chunk<T, NV, true>(a, s, task, start, steps);
      gather_channels(s.dy_rows, a.grad_out + channel * a.length + start, a.length, steps, task.width, block);
      for (int64_t n = 0; n < a.states; ++n)
        load_row(s.h + n * block, a.carries + ((task.batch * chunks + chunk) * a.states + n) * a.channels + task.first,
                 task.width, block);
      scan_chunk_backward<T, NV>(s, steps, false, task.width);
      transpose(a.du + channel * a.length + start, a.length, s.du_rows, block, steps, task.width);
      transpose(a.ddelta + channel * a.length + start, a.length, s.ddelta, block, steps, task.width);
      for (int64_t n = 0; n < a.states; ++n) {
        store_row(a.dB + (group_row + n) * a.length + start, s.dfeatures + n * kChunk, steps);
        store_row(a.dC + (group_row + n) * a.length + start, s.dfeatures + (a.states + n) * kChunk, steps);
      }
    }
    transpose(a.dA + channel * a.states, a.states, s.dA, block, a.states, task.width);
    if (a.dD) store_row(a.dD + channel, s.dD, task.width);
    if (a.dbias) store_row(a.dbias + channel, s.dbias, task.width);
  }
}

}  // namespace
}  // namespace mmvmamba
