// Small kernels around the scans: the scan over bands, sums of partial gradients, and the merge of visits into pixels.
// One thread an element; every sum has a fixed order.
#pragma once

#include "scan.cuh"

namespace mmvmamba {

constexpr int kPartsOfGroup = 32;

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// From what each band does to a state to the state each band starts with. What enters the
// first: zero, or of the adjoint the gradient of the last state.
template <bool kAdjoint>
__global__ void scan_bands_kernel(const __grid_constant__ ScanArgs args) {
  const int64_t i = thread_index(), inner = static_cast<int64_t>(args.states) * args.channels;
  if (i >= args.batch * args.routes * inner) return;
  const int route = static_cast<int>(i / inner % args.routes);
  const int64_t batch = i / inner / args.routes;
  const Order order = static_cast<Order>(args.orders[route]);
  const bool descending = (order == kRowReversed || order == kColumnReversed) != kAdjoint;
  const int64_t state = i % inner / args.channels, channel = i % args.channels;
  float h = 0.0f;
  if (kAdjoint && args.grad_last_state != nullptr)
    h = args.grad_last_state[(batch * args.channels + channel) * args.states + state];
  for (int step = 0; step < args.bands; ++step) {
    const int band = descending ? args.bands - 1 - step : step;
    const int64_t at = ((batch * args.routes + route) * args.bands + band) * inner + i % inner;
    const float log_decay = args.band_decay[at], end = args.band_state[at];
    args.band_state[at] = h;
    h = fmaf(exp2_approx(min_nan(log_decay, kLargestExponent)), h, end);
  }
}

// Sums of kPartsOfGroup neighbouring parts: partial (parts, count) to out (groups, count).
__global__ inline void sum_groups_kernel(const float* partial, float* out, int64_t count, int64_t parts) {
  const int64_t at = thread_index(), first = at / count * kPartsOfGroup;
  if (first >= parts) return;
  const int64_t last = first + kPartsOfGroup < parts ? first + kPartsOfGroup : parts;
  float sum = 0.0f;
  for (int64_t part = first; part < last; ++part) sum += partial[part * count + at % count];
  out[at] = sum;
}

// out[i] = partial[0][i] + partial[1][i] + ...
template <typename T>
__global__ void sum_partials_kernel(const float* partial, T* out, int64_t count, int64_t parts) {
  const int64_t i = thread_index();
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
  out[i] = from_float<T>(sum);
}

// The visits of every pixel by every route as lists: head (routes, pixels), filled with -1 before, and next (routes,
// length), -1 at the end. The order within a list is that of the threads; who sums does not rely on it.
__global__ inline void list_visits_kernel(const int64_t* permutation, int* head, int* next, int64_t count, int length,
                                          int pixels) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const int64_t pixel = permutation[i];
  if (pixel < 0 || pixel >= pixels) return;  // the interface refuses such routes where it can look at them
  next[i] = atomicExch(head + i / length * pixels + pixel, static_cast<int>(i % length));
}

// The next visit of a list after `last` in the order of positions; length where there is none.
__device__ __forceinline__ int next_visit(int first, const int* next, int last, int length) {
  int found = length;
  for (int visit = first; visit >= 0; visit = next[visit])
    if (visit > last && visit < found) found = visit;
  return found;
}

// Sum the visits (b, routes, length, width) of every pixel over all routes: (b, pixels, width).
template <typename T>
__global__ void merge_visits_kernel(const float* visits, const int* head, const int* next, T* out, int64_t count,
                                    int routes, int length, int pixels, int width) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const int64_t batch = i / width / pixels;
  const int pixel = static_cast<int>(i / width % pixels), column = static_cast<int>(i % width);
  float sum = 0.0f;
  for (int route = 0; route < routes; ++route) {
    const int first = head[static_cast<int64_t>(route) * pixels + pixel];
    const int* list = next + static_cast<int64_t>(route) * length;
    for (int visit = next_visit(first, list, -1, length); visit < length;
         visit = next_visit(first, list, visit, length))
      sum += visits[((batch * routes + route) * length + visit) * width + column];
  }
  out[i] = from_float<T>(sum);
}

// The same for tensors with a slot for every route, whose partial sums are added on the way: from (tiles, b, length,
// routes, width) to (b, pixels, routes, width).
template <typename T>
__global__ void merge_slots_kernel(const float* visits, const int* head, const int* next, T* out, int64_t count,
                                   int tiles, int routes, int length, int pixels, int width, int batches) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const int64_t row = i / width, batch = row / routes / pixels;
  const int route = static_cast<int>(row % routes), pixel = static_cast<int>(row / routes % pixels);
  const int column = static_cast<int>(i % width);
  const int first = head[static_cast<int64_t>(route) * pixels + pixel];
  const int* list = next + static_cast<int64_t>(route) * length;
  float sum = 0.0f;
  for (int visit = next_visit(first, list, -1, length); visit < length; visit = next_visit(first, list, visit, length))
    for (int tile = 0; tile < tiles; ++tile)
      sum +=
          visits[(((static_cast<int64_t>(tile) * batches + batch) * length + visit) * routes + route) * width + column];
  out[i] = from_float<T>(sum);
}

}  // namespace mmvmamba
