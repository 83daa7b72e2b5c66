// State space duality without decay: states that are sums over all positions, and their reading, as products of panels.
#pragma once

#include "products.h"

namespace mmvmamba {
namespace {

// Rows that are multiplied at a time, so that their panels stay in the nearest cache beside the state of a head.
constexpr int64_t kSsdRows = 48;

template <typename T>
struct SsdScratch {
  int64_t n, p;                   // padded widths
  T *rows, *other, *sum;          // (kSsdRows, p)
  T *B, *C;                       // (range, n)
  T *dB, *dC;                     // (range, n)
  T *state, *grad;                // (states, p)
  T *state_turned, *grad_turned;  // (channels, n)
  int64_t size;

  SsdScratch(T* base, const SsdArgs<T>& a) : n(padded<T>(a.states)), p(padded<T>(a.channels)) {
    size = 0;
    auto take = [base, this](int64_t elements) {
      T* here = base == nullptr ? nullptr : base + size;
      size += ceil_div(elements, 16) * 16;
      return here;
    };
    rows = take(kSsdRows * p);
    other = take(kSsdRows * p);
    sum = take(kSsdRows * p);
    B = take(a.range * n);
    C = take(a.range * n);
    dB = take(a.range * n);
    dC = take(a.range * n);
    state = take(a.states * p);
    grad = take(a.states * p);
    state_turned = take(a.channels * n);
    grad_turned = take(a.channels * n);
  }
};

template <typename T>
int64_t ssd_workspace(const SsdArgs<T>& a) {
  return SsdScratch<T>(static_cast<T*>(nullptr), a).size;
}

// One range of positions of one batch entry, one group.
template <typename T>
struct SsdTask {
  int64_t batch, range, group, first, rows;

  SsdTask(const SsdArgs<T>& a, int64_t index) {
    group = index % a.groups;
    range = index / a.groups % a.ranges;
    batch = index / a.groups / a.ranges;
    first = range * a.range;
    rows = min_of(a.range, a.length - first);
  }
};

// The head that is number `i` of its group.
MMVMAMBA_INLINE int64_t head_of(int64_t group, int64_t i, int64_t heads, int64_t groups, bool blocked) {
  return blocked ? group * (heads / groups) + i : i * groups + group;
}

template <typename T>
void ssd_state_tasks(const SsdArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const SsdScratch<T> m(memory, a);
  const bool reads = a.grad_out.data != nullptr;
  const RowView &view = reads ? a.grad_out : a.x, &projection = reads ? a.c_out : a.b_in;
  const T* weight = reads ? nullptr : a.weight;
  for (int64_t index = begin; index < end; ++index) {
    const SsdTask<T> task(a, index);
    read_panel<T>(m.B, projection, task.batch, task.first, task.rows, task.group, nullptr, 0);
    for (int64_t i = 0; i < a.heads / a.groups; ++i) {
      const int64_t head = head_of(task.group, i, a.heads, a.groups, a.blocked);
      fill_zero(m.state, a.states * m.p);
      for (int64_t row = 0; row < task.rows; row += kSsdRows) {
        const int64_t rows = min_of(kSsdRows, task.rows - row), at = task.batch * a.length + task.first + row;
        read_panel<T>(m.rows, view, task.batch, task.first + row, rows, head,
                      weight == nullptr ? nullptr : weight + at * a.heads + head, a.heads);
        product<T, true>(a.states, {m.B + row * m.n, 1, m.n}, m.rows, m.p, rows, m.state, m.p, m.p);
      }
      const int64_t entry = (task.range * a.batch + task.batch) * a.heads + head;
      write_matrix(a.partial_state + entry * a.states * a.channels, m.state, a.states, a.channels);
    }
  }
}

template <typename T>
void ssd_read_tasks(const SsdArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const SsdScratch<T> m(memory, a);
  for (int64_t index = begin; index < end; ++index) {
    const SsdTask<T> task(a, index);
    read_panel<T>(m.C, a.c_out, task.batch, task.first, task.rows, task.group, nullptr, 0);
    for (int64_t i = 0; i < a.heads / a.groups; ++i) {
      const int64_t head = head_of(task.group, i, a.heads, a.groups, a.blocked);
      read_matrix(m.state, a.state + (task.batch * a.heads + head) * a.states * a.channels, a.states, a.channels);
      for (int64_t row = 0; row < task.rows; row += kSsdRows) {
        const int64_t rows = min_of(kSsdRows, task.rows - row), at = task.batch * a.length + task.first + row;
        const Left<T> left = {m.C + row * m.n, m.n, 1};
        if (a.skip != nullptr) {
          read_panel<T>(m.sum, a.x, task.batch, task.first + row, rows, head, a.skip + head, 0);
          product<T, true>(rows, left, m.state, m.p, a.states, m.sum, m.p, m.p);
        } else {
          product<T, false>(rows, left, m.state, m.p, a.states, m.sum, m.p, m.p);
        }
        write_panel<T>(a.out, m.sum, at, rows, head);
      }
    }
  }
}

// The gradients of one head in one range; m.dB and m.dC gather those of the projections.
template <typename T>
void ssd_backward_head(const SsdArgs<T>& a, const SsdScratch<T>& m, const SsdTask<T>& task, int64_t head) {
  const int64_t entry = (task.batch * a.heads + head) * a.states * a.channels;
  const bool made = a.grad_state != nullptr, read = a.grad_out.data != nullptr;
  if (read) {
    read_matrix(m.state, a.state + entry, a.states, a.channels);
    turn_panel(m.state_turned, m.state, a.states, a.channels);
  }
  if (made) {
    read_matrix(m.grad, a.grad_state + entry, a.states, a.channels);
    turn_panel(m.grad_turned, m.grad, a.states, a.channels);
  }
  double dskip = 0;  // rows are many
  for (int64_t row = 0; row < task.rows; row += kSsdRows) {
    const int64_t rows = min_of(kSsdRows, task.rows - row), at = task.batch * a.length + task.first + row;
    const T* weight = a.weight == nullptr ? nullptr : a.weight + at * a.heads + head;
    if (read) {
      read_panel<T>(m.other, a.grad_out, task.batch, task.first + row, rows, head, nullptr, 0);
      product<T, true>(rows, {m.other, m.p, 1}, m.state_turned, m.n, a.channels, m.dC + row * m.n, m.n, m.n);
    }
    if (!made) continue;
    read_panel<T>(m.rows, a.x, task.batch, task.first + row, rows, head, nullptr, 0);
    product<T, false>(rows, {m.B + row * m.n, m.n, 1}, m.grad, m.p, a.states, m.sum, m.p, m.p);
    for (int64_t t = 0; t < rows; ++t) {
      T *x = m.rows + t * m.p, *dx = m.sum + t * m.p, *dy = m.other + t * m.p;
      const T factor = weight == nullptr ? T(1) : weight[t * a.heads];
      if (a.dweight != nullptr) a.dweight[(at + t) * a.heads + head] = dot(dx, x, m.p);
      if (a.skip != nullptr) dskip += dot(dy, x, m.p);
      for (int64_t j = 0; j < m.p; j += kLanes<T>) {
        Vec<T> value = factor * load(dx + j);
        if (a.skip != nullptr) value += a.skip[head] * load(dy + j);
        store<T>(dx + j, value);
        store<T>(x + j, factor * load(x + j));
      }
    }
    product<T, true>(rows, {m.rows, m.p, 1}, m.grad_turned, m.n, a.channels, m.dB + row * m.n, m.n, m.n);
    write_panel<T>(a.dx, m.sum, at, rows, head);
  }
  if (a.dskip != nullptr) a.dskip[(task.range * a.batch + task.batch) * a.heads + head] = static_cast<T>(dskip);
}

template <typename T>
void ssd_backward_tasks(const SsdArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const SsdScratch<T> m(memory, a);
  const bool made = a.grad_state != nullptr, read = a.grad_out.data != nullptr;
  for (int64_t index = begin; index < end; ++index) {
    const SsdTask<T> task(a, index);
    if (made) {
      read_panel<T>(m.B, a.b_in, task.batch, task.first, task.rows, task.group, nullptr, 0);
      fill_zero(m.dB, task.rows * m.n);
    }
    if (read) fill_zero(m.dC, task.rows * m.n);
    for (int64_t i = 0; i < a.heads / a.groups; ++i)
      ssd_backward_head(a, m, task, head_of(task.group, i, a.heads, a.groups, a.blocked));
    const int64_t at = task.batch * a.length + task.first;
    if (made) write_panel<T>(a.db, m.dB, at, task.rows, task.group);
    if (read) write_panel<T>(a.dc, m.dC, at, task.rows, task.group);
  }
}

}  // namespace
}  // namespace mmvmamba
