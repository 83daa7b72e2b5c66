// State space duality with a decay per head (Mamba-2): inside a chunk a product with a lower triangular matrix of
// decays, between chunks a state.
//
// What is left of position s at position t is a product of decays, built row by row: a difference of sums of logarithms
// would cancel behind a strong decay, and an exponential per pair would cost more.
#pragma once

#include "ssd_impl.h"

namespace mmvmamba {
namespace {

template <typename T>
struct SsdScanScratch {
  int64_t n, p, q;                // padded widths; q: of a chunk
  T *raw, *step, *slope;          // (q): step sizes before softplus, after, and the derivative
  T *keep, *from_start, *to_end;  // (q): decay of a position, of the state before the chunk, what is left behind it
  T *left, *column;               // (q): a row of the triangle; a running sum
  T* drate;                       // (q)
  T *B, *C;                       // (q, n)
  T* turned;                      // (max(n, p), q) or (p, n): a right factor, turned
  T *scores, *triangle;           // (q, q): C B^T; times the decays
  T *x, *inputs, *y;              // (q, p)
  T* scaled;                      // (q, max(n, p))
  T* state;                       // (task_heads, n, p); backward: of one head
  // Backward
  T *dy, *dinputs;                    // (q, p)
  T *decays, *dscores, *dscores_sum;  // (q, q)
  T *read, *written;                  // (q, n)
  T *dB, *dC;                         // (q, n)
  T* adjoint;                         // (task_heads, n, p): gradient of the state behind the chunk
  int64_t size;

  SsdScanScratch(T* base, const SsdScanArgs<T>& a, bool backward)
      : n(padded<T>(a.states)), p(padded<T>(a.channels)), q(padded<T>(kSsdChunk)) {
    size = 0;
    auto take = [base, this](int64_t elements) {
      T* here = base == nullptr ? nullptr : base + size;
      size += ceil_div(elements, 16) * 16;
      return here;
    };
    raw = take(q);
    step = take(q);
    slope = take(q);
    keep = take(q);
    from_start = take(q);
    to_end = take(q);
    left = take(q);
    column = take(q);
    drate = take(q);
    B = take(q * n);
    C = take(q * n);
    const int64_t widest = n > p ? n : p;
    turned = take(widest * (q > widest ? q : widest));
    scores = take(q * q);
    triangle = take(q * q);
    x = take(q * p);
    inputs = take(q * p);
    y = take(q * p);
    scaled = take(q * widest);
    state = take((backward ? 1 : a.task_heads) * a.states * p);
    if (!backward) return;
    dy = take(q * p);
    dinputs = take(q * p);
    decays = take(q * q);
    dscores = take(q * q);
    dscores_sum = take(q * q);
    read = take(q * n);
    written = take(q * n);
    dB = take(q * n);
    dC = take(q * n);
    adjoint = take(a.task_heads * a.states * p);
  }
};

template <typename T>
int64_t ssd_scan_workspace(const SsdScanArgs<T>& a, bool backward) {
  return SsdScanScratch<T>(static_cast<T*>(nullptr), a, backward).size;
}

template <typename T>
struct SsdScanTask {
  int64_t batch, group, part, heads, first_head;

  SsdScanTask(const SsdScanArgs<T>& a, int64_t index) {
    part = index % a.parts;
    group = index / a.parts % a.groups;
    batch = index / a.parts / a.groups;
    first_head = part * a.task_heads;
    heads = min_of(a.task_heads, a.heads / a.groups - first_head);
  }
  int64_t head(const SsdScanArgs<T>& a, int64_t i) const {
    return head_of(group, first_head + i, a.heads, a.groups, a.blocked);
  }
};

// The step sizes and decays of one head in a chunk.
template <typename T>
void chunk_steps(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, int64_t row, int64_t rows, int64_t head) {
  const T bias = a.dt_bias == nullptr ? T(0) : a.dt_bias[head];
  for (int64_t t = 0; t < m.q; ++t) m.raw[t] = t < rows ? a.dt[(row + t) * a.heads + head] + bias : T(0);
  for (int64_t t = 0; t < m.q; t += kLanes<T>) {
    Vec<T> step = load(m.raw + t), slope = splat(T(1));
    if (a.softplus) {
      const Vec<T> z = step * T(kLog2E);
      Vec<T> e;
      step = softplus2(z, e) * T(kLn2);
      slope = softplus_slope(z, e);
    }
    store<T>(m.step + t, step);
    store<T>(m.slope + t, slope);
    const Vec<T> rate = step * a.decay[head], keep = exp_vec<T>(rate);
    store<T>(m.keep + t, rate != rate ? rate : keep);
  }
  T product = T(1);
  for (int64_t t = 0; t < rows; ++t) m.from_start[t] = product *= m.keep[t];
}

// A mask of the first `count` lanes, for any count.
template <typename T>
MMVMAMBA_INLINE VecMask<T> lanes_before(int64_t count) {
  VecMask<T> lane, limit;
  for (int i = 0; i < kLanes<T>; ++i) {
    lane[i] = i;
    limit[i] = count;
  }
  return lane < limit;
}

// triangle[t][s] = scores[t][s] times what is left of s at t, 0 for s > t; the decays alone too, unless null. Behind
// the last row to_end has what is left at the end of the chunk.
template <typename T>
void decay_scores(const SsdScanScratch<T>& m, int64_t rows, T* decays) {
  fill_zero(m.left, m.q);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t s = 0; s < m.q; s += kLanes<T>) store<T>(m.left + s, m.keep[t] * load(m.left + s));
    m.left[t] = T(1);  // what stands behind it is zero: nothing came later yet
    if (m.keep[t] != m.keep[t]) fill_zero(m.left + t + 1, m.q - t - 1);  // but a NaN times zero is NaN
    for (int64_t s = 0; s < m.q; s += kLanes<T>) {
      const Vec<T> left = load(m.left + s);
      if (decays != nullptr) store<T>(decays + t * m.q + s, left);
      // Scores behind position t were not computed.
      store<T>(m.triangle + t * m.q + s, keep<T>(lanes_before<T>(t + 1 - s), left * load(m.scores + t * m.q + s)));
    }
  }
  for (int64_t s = 0; s < m.q; ++s) m.to_end[s] = m.left[s];
}

// The rows of a chunk that all heads of a task share, and C B^T.
template <typename T>
void chunk_projections(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, const SsdScanTask<T>& task, int64_t first,
                       int64_t rows) {
  read_panel<T>(m.B, a.b_in, task.batch, first, rows, task.group, nullptr, 0);
  read_panel<T>(m.C, a.c_out, task.batch, first, rows, task.group, nullptr, 0);
  const int64_t width = padded<T>(rows);
  turn_panel(m.turned, m.B, rows, a.states);
  product<T, false, Part::kResultLower>(rows, {m.C, m.n, 1}, m.turned, width, a.states, m.scores, m.q, width);
}

// state = total state + B^T inputs decayed to the end of the chunk
template <typename T>
void advance_state(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, int64_t rows, T* state) {
  const T total = m.from_start[rows - 1];
  for (int64_t i = 0; i < a.states * m.p; i += kLanes<T>) store<T>(state + i, total * load(state + i));
  scale_rows(m.scaled, m.inputs, rows, m.p, m.to_end);
  product<T, true>(a.states, {m.B, 1, m.n}, m.scaled, m.p, rows, state, m.p, m.p);
}

template <typename T>
void ssd_scan_head(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, int64_t batch, int64_t head, int64_t first,
                   int64_t rows, T* state) {
  const int64_t row = batch * a.length + first;
  chunk_steps(a, m, row, rows, head);
  decay_scores<T>(m, rows, nullptr);
  read_panel<T>(m.x, a.x, batch, first, rows, head, nullptr, 0);
  scale_rows(m.inputs, m.x, rows, m.p, m.step);
  scale_rows(m.scaled, m.C, rows, m.n, m.from_start);
  product<T, false>(rows, {m.scaled, m.n, 1}, state, m.p, a.states, m.y, m.p, m.p);
  product<T, true, Part::kLeftLower>(rows, {m.triangle, m.q, 1}, m.inputs, m.p, rows, m.y, m.p, m.p);
  if (a.skip != nullptr)
    for (int64_t i = 0; i < rows * m.p; i += kLanes<T>) store<T>(m.y + i, load(m.y + i) + a.skip[head] * load(m.x + i));
  write_panel<T>(a.out, m.y, row, rows, head);
  advance_state(a, m, rows, state);
}

template <typename T>
void ssd_scan_tasks(const SsdScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const SsdScanScratch<T> m(memory, a, false);
  const int64_t chunks = ceil_div(a.length, kSsdChunk), dense = a.states * a.channels, wide = a.states * m.p;
  for (int64_t index = begin; index < end; ++index) {
    const SsdScanTask<T> task(a, index);
    fill_zero(m.state, a.task_heads * wide);
    for (int64_t i = 0; i < task.heads && a.initial_state != nullptr; ++i)
      read_matrix(m.state + i * wide, a.initial_state + (task.batch * a.heads + task.head(a, i)) * dense, a.states,
                  a.channels);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * kSsdChunk, rows = min_of(kSsdChunk, a.length - first);
      chunk_projections(a, m, task, first, rows);
      for (int64_t i = 0; i < task.heads; ++i) {
        const int64_t head = task.head(a, i);
        T* state = m.state + i * wide;
        if (a.carries != nullptr)
          write_matrix(a.carries + ((task.batch * chunks + chunk) * a.heads + head) * dense, state, a.states,
                       a.channels);
        ssd_scan_head(a, m, task.batch, head, first, rows, state);
      }
    }
    for (int64_t i = 0; i < task.heads; ++i)
      write_matrix(a.last_state + (task.batch * a.heads + task.head(a, i)) * dense, m.state + i * wide, a.states,
                   a.channels);
  }
}

// drate[u] = all that passes position u: read at t >= u what was there before the chunk, read at t >= u what came at
// s < u, and the gradient of the state behind the chunk of what came at s < u and of what was there before.
template <typename T>
void gradient_of_rates(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, int64_t rows, const T* adjoint) {
  T through = T(0);
  for (int64_t i = 0; i < a.states; ++i) through += dot(adjoint + i * m.p, m.state + i * m.p, m.p);
  through *= m.from_start[rows - 1];
  for (int64_t u = 0; u < rows; ++u) {
    m.drate[u] = through;
    through += dot(m.B + u * m.n, m.written + u * m.n, m.n);
  }
  fill_zero(m.column, m.q);
  T read = T(0);
  for (int64_t u = rows - 1; u >= 0; --u) {
    read += dot(m.C + u * m.n, m.read + u * m.n, m.n);
    Vec<T> sum = {};
    for (int64_t s = 0; s <= u; s += kLanes<T>) {
      // Pairs at and right of the diagonal are masked before they are added: u falls, so they stay out.
      const Vec<T> pair = load(m.dscores + u * m.q + s) * load(m.scores + u * m.q + s);
      const Vec<T> column = load(m.column + s) + keep<T>(lanes_before<T>(u - s), pair);
      store<T>(m.column + s, column);
      sum += keep<T>(lanes_before<T>(u - s), column);
    }
    m.drate[u] += read + sum_lanes(sum);
  }
}

// Sums over all positions of one head: many terms, so in double.
struct SsdHeadSums {
  double ddecay = 0, dskip = 0, dbias = 0;
};

template <typename T>
void ssd_scan_backward_head(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, int64_t batch, int64_t head,
                            int64_t first, int64_t rows, T* adjoint, SsdHeadSums& sums) {
  const int64_t row = batch * a.length + first, width = padded<T>(rows);
  chunk_steps(a, m, row, rows, head);
  decay_scores(m, rows, m.decays);
  read_panel<T>(m.x, a.x, batch, first, rows, head, nullptr, 0);
  scale_rows(m.inputs, m.x, rows, m.p, m.step);
  if (a.grad_out.data != nullptr)
    read_panel<T>(m.dy, a.grad_out, batch, first, rows, head, nullptr, 0);
  else
    fill_zero(m.dy, rows * m.p);

  turn_panel(m.turned, m.inputs, rows, a.channels);
  product<T, false, Part::kResultLower>(rows, {m.dy, m.p, 1}, m.turned, width, a.channels, m.dscores, m.q, width);
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t s = 0; s < m.q; s += kLanes<T>) {
      const int64_t at = t * m.q + s;  // behind position t nothing was computed
      store<T>(m.dscores + at, keep<T>(lanes_before<T>(t + 1 - s), load(m.decays + at) * load(m.dscores + at)));
    }
  turn_panel(m.turned, m.state, a.states, a.channels);
  product<T, false>(rows, {m.dy, m.p, 1}, m.turned, m.n, a.channels, m.read, m.n, m.n);
  scale_rows(m.read, m.read, rows, m.n, m.from_start);
  turn_panel(m.turned, adjoint, a.states, a.channels);
  product<T, false>(rows, {m.inputs, m.p, 1}, m.turned, m.n, a.channels, m.written, m.n, m.n);
  scale_rows(m.written, m.written, rows, m.n, m.to_end);
  gradient_of_rates(a, m, rows, adjoint);
  for (int64_t i = 0; i < rows * m.n; i += kLanes<T>) {
    store<T>(m.dC + i, load(m.dC + i) + load(m.read + i));
    store<T>(m.dB + i, load(m.dB + i) + load(m.written + i));
  }
  for (int64_t i = 0; i < rows * m.q; i += kLanes<T>)
    store<T>(m.dscores_sum + i, load(m.dscores_sum + i) + load(m.dscores + i));

  product<T, false>(rows, {m.B, m.n, 1}, adjoint, m.p, a.states, m.dinputs, m.p, m.p);
  scale_rows(m.dinputs, m.dinputs, rows, m.p, m.to_end);
  product<T, true, Part::kLeftUpper>(rows, {m.triangle, 1, m.q}, m.dy, m.p, rows, m.dinputs, m.p, m.p);

  const T total = m.from_start[rows - 1];
  for (int64_t i = 0; i < a.states * m.p; i += kLanes<T>) store<T>(adjoint + i, total * load(adjoint + i));
  scale_rows(m.scaled, m.dy, rows, m.p, m.from_start);
  product<T, true>(a.states, {m.C, 1, m.n}, m.scaled, m.p, rows, adjoint, m.p, m.p);

  for (int64_t t = 0; t < rows; ++t) {
    T *x = m.x + t * m.p, *dx = m.dinputs + t * m.p, *dy = m.dy + t * m.p;
    const T ddt = (m.drate[t] * a.decay[head] + dot(x, dx, m.p)) * m.slope[t];
    a.ddt[(row + t) * a.heads + head] = ddt;
    sums.dbias += ddt;
    sums.ddecay += m.drate[t] * m.step[t];
    if (a.skip != nullptr) sums.dskip += dot(dy, x, m.p);
    for (int64_t j = 0; j < m.p; j += kLanes<T>) {
      Vec<T> value = m.step[t] * load(dx + j);
      if (a.skip != nullptr) value += a.skip[head] * load(dy + j);
      store<T>(dx + j, value);
    }
  }
  write_panel<T>(a.dx, m.dinputs, row, rows, head);
}

template <typename T>
void ssd_scan_backward_chunk(const SsdScanArgs<T>& a, const SsdScanScratch<T>& m, const SsdScanTask<T>& task,
                             int64_t chunk, SsdHeadSums* sums) {
  const int64_t chunks = ceil_div(a.length, kSsdChunk), dense = a.states * a.channels;
  const int64_t first = chunk * kSsdChunk, rows = min_of(kSsdChunk, a.length - first);
  chunk_projections(a, m, task, first, rows);
  fill_zero(m.dB, rows * m.n);
  fill_zero(m.dC, rows * m.n);
  fill_zero(m.dscores_sum, rows * m.q);
  for (int64_t i = 0; i < task.heads; ++i) {
    const int64_t head = task.head(a, i);
    read_matrix(m.state, a.carries + ((task.batch * chunks + chunk) * a.heads + head) * dense, a.states, a.channels);
    ssd_scan_backward_head(a, m, task.batch, head, first, rows, m.adjoint + i * a.states * m.p, sums[i]);
  }
  product<T, true, Part::kLeftLower>(rows, {m.dscores_sum, m.q, 1}, m.B, m.n, rows, m.dC, m.n, m.n);
  product<T, true, Part::kLeftUpper>(rows, {m.dscores_sum, 1, m.q}, m.C, m.n, rows, m.dB, m.n, m.n);
  const int64_t at = (task.part * a.batch + task.batch) * a.length + first;
  write_panel<T>({a.db, Element::kSame, a.groups, a.states}, m.dB, at, rows, task.group);
  write_panel<T>({a.dc, Element::kSame, a.groups, a.states}, m.dC, at, rows, task.group);
}

template <typename T>
void ssd_scan_backward_tasks(const SsdScanArgs<T>& a, int64_t begin, int64_t end, T* memory) {
  const SsdScanScratch<T> m(memory, a, true);
  const int64_t dense = a.states * a.channels, wide = a.states * m.p;
  for (int64_t index = begin; index < end; ++index) {
    const SsdScanTask<T> task(a, index);
    SsdHeadSums sums[kMaxTaskHeads];
    fill_zero(m.adjoint, a.task_heads * wide);
    for (int64_t i = 0; i < task.heads && a.grad_last_state != nullptr; ++i)
      read_matrix(m.adjoint + i * wide, a.grad_last_state + (task.batch * a.heads + task.head(a, i)) * dense, a.states,
                  a.channels);
    for (int64_t chunk = ceil_div(a.length, kSsdChunk) - 1; chunk >= 0; --chunk)
      ssd_scan_backward_chunk(a, m, task, chunk, sums);
    for (int64_t i = 0; i < task.heads; ++i) {
      const int64_t entry = task.batch * a.heads + task.head(a, i);
      a.ddecay[entry] = static_cast<T>(sums[i].ddecay);
      if (a.dskip != nullptr) a.dskip[entry] = static_cast<T>(sums[i].dskip);
      if (a.dbias != nullptr) a.dbias[entry] = static_cast<T>(sums[i].dbias);
      if (a.dinitial != nullptr) write_matrix(a.dinitial + entry * dense, m.adjoint + i * wide, a.states, a.channels);
    }
  }
}

}  // namespace
}  // namespace mmvmamba
