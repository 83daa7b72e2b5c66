// Interface between the PyTorch glue (selective_scan.cpp, scan2d.cpp) and the kernels, which are compiled once per
// instruction set. No library header may be included here or in what they include: an inline function of a library
// header compiled with AVX-512 could be picked by the linker for the portable code and crash on an older processor.
#pragma once

#include <stdint.h>

namespace mmvmamba {

// Positions between two saved states; CHUNK in mmvmamba/ops/library.py.
constexpr int kChunk = 32;

// Numbers of 2 bytes as they stand in memory; convert.h turns them into float32 and back.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Positions of a chunk of the causal state space duality; CHUNK in mmvmamba/ops/ssd/reference.py.
constexpr int kSsdChunk = 64;
// Heads of one task of it, at most.
constexpr int kMaxTaskHeads = 4;

// Codes of the named routes; ScanOrder in mmvmamba/ops/scan2d/orders.py.
enum ScanOrder : int64_t { kRow = 0, kColumn = 1, kRowReversed = 2, kColumnReversed = 3 };

// Numbers in memory that a kernel reads as type T.
enum class Element { kSame, kBFloat16, kFloat16 };  // kSame: T itself

template <typename T>
struct Input {
  const void* data;
  Element element;
};

// All tensors are contiguous and of type T but for Input. Pointers marked "or null" belong to optional arguments.
template <typename T>
struct SelectiveScanArgs {
  const T* u;           // (b, d, l)
  const T* delta;       // (b, d, l)
  const T* A;           // (d, n)
  const T* B;           // (b, g, n, l)
  const T* C;           // (b, g, n, l)
  const T* D;           // (d) or null
  const T* delta_bias;  // (d) or null
  int64_t batch, channels, length, states, groups;
  bool delta_softplus;
  T* out;                    // forward: (b, d, l)
  T* last_state;             // forward: (b, d, n)
  T* carries;                // (b, chunks, n, d): written by the forward unless null, read by the backward
  const T* grad_out;         // backward: (b, d, l)
  const T* grad_last_state;  // backward: (b, d, n) or null
  T* du;                     // (b, d, l)
  T* ddelta;                 // (b, d, l)
  // Partial sums, one slice per task, added up in index order afterwards: the result does not depend on threads.
  T* dA;     // (b, d, n)
  T* dD;     // (b, d) or null
  T* dbias;  // (b, d) or null
  T* dB;     // (blocks, b, g, n, l)
  T* dC;     // (blocks, b, g, n, l)
};

template <typename T>
struct Scan2dArgs {
  Input<T> x;                  // (b, h w, d), or a map for each route (b, h w, k, d)
  Input<T> projections;        // (b, h w, k, r + 2 n)
  const T* dt_weight;          // (k, d, r)
  const T* dt_bias;            // (k, d) or null
  const T* A;                  // (k, d, n)
  const T* D;                  // (k, d) or null
  const int64_t* orders;       // (k) ScanOrder codes, or null
  const int64_t* permutation;  // (k, l) pixel indices, or null
  int64_t batch, height, width, channels, routes, rank, states, length;
  int64_t x_pixel,
      x_route;  // elements of x, and of dx, from pixel to pixel and from route to route: d and 0, or k d, d
  bool delta_softplus;
  T* out;             // forward: (b, h w, d)
  T* carries;         // (b, k, chunks, n, d): written by the forward unless null, read by the backward
  Input<T> grad_out;  // backward: (b, h w, d)
  T* dx;              // as x
  // Partial sums, as above.
  T* dprojections;  // (blocks, b, h w, k, r + 2 n)
  T* ddt_weight;    // (b, k, d, r)
  T* ddt_bias;      // (b, k, d) or null
  T* dA;            // (b, k, d, n)
  T* dD;            // (b, k, d) or null
};

// A map (b, h, w, d) whose channels lie beside each other; the strides count elements.
struct MapView {
  const void* data;
  int64_t batch_stride, row_stride, pixel_stride;
};

template <typename T>
struct DepthwiseConvArgs {
  MapView x;
  const T* weight;  // (kh kw, d)
  const T* bias;    // (d) or null
  int64_t batch, height, width, channels, kernel_height, kernel_width;
  int64_t bands;  // every map is cut into so many bands of rows
  bool silu;
  Element storage;
  void* out;         // forward: (b, h, w, d)
  MapView grad_out;  // backward
  void* dx;          // (b, h, w, d) or null
  // Partial sums, one slice per map and band, added up in index order afterwards.
  T* dweight;  // (b bands, kh kw, d) or null
  T* dbias;    // (b bands, d) or null
};

// Sequences (b, l, d), or results (b, l, k, d), whose channels lie beside each other; the strides count elements.
struct SequenceView {
  const void* data;
  int64_t batch_stride, position_stride, direction_stride;
};

template <typename T>
struct CausalConvArgs {
  SequenceView x;          // (b, l, d)
  const T* weight;         // (k, taps, d): the last tap meets the position itself
  const T* bias;           // (k, d) or null
  const int64_t* reverse;  // (k): 1 where the taps before the last meet later positions, 0 where earlier ones
  int64_t batch, length, channels, directions, taps;
  int64_t bands;  // every sequence is cut into so many stretches of positions
  bool silu;
  Element storage;
  void* out;              // forward: (b, l, k, d)
  SequenceView grad_out;  // backward: (b, l, k, d)
  void* dx;               // (b, l, d) or null
  // Partial sums, one slice per sequence and band, added up in index order afterwards.
  T* dweight;  // (b bands, k, taps, d) or null
  T* dbias;    // (b bands, k, d) or null
};

// Rows (b, l, heads, width) whose last axis lies together; the strides count elements.
struct RowView {
  const void* data;
  Element element;
  int64_t batch_stride, row_stride, head_stride, width;
};

// A contiguous tensor (b, l, heads, width).
struct RowOutput {
  void* data;
  Element element;
  int64_t heads, width;
};

// State space duality without decay: k heads of p channels, n states; head j uses group j / (k / g) of the projections
// if blocked, else j % g. Positions are cut into `ranges` of `range` each.
template <typename T>
struct SsdArgs {
  int64_t batch, length, heads, channels, groups, states, range, ranges;
  bool blocked;
  RowView x;             // (b, l, k, p)
  RowView b_in, c_out;   // (b, l, g, n)
  const T* weight;       // (b, l, k) or null
  const T* skip;         // (k) or null
  const T* state;        // (b, k, n, p): read at every position
  RowOutput out;         // (b, l, k, p)
  T* partial_state;      // (ranges, b, k, n, p): sums over the positions of every range
  RowView grad_out;      // (b, l, k, p); data null where nothing was read
  const T* grad_state;   // (b, k, n, p); null where no state was made
  RowOutput dx, db, dc;  // (b, l, k, p), (b, l, g, n); dx and db where a state was made, dc where one was read
  T* dweight;            // (b, l, k) or null
  T* dskip;              // (ranges b, k) or null
};

// The causal form, with a decay for every head. A task has `task_heads` heads of one group, of which there are `parts`
// such blocks.
template <typename T>
struct SsdScanArgs {
  int64_t batch, length, heads, channels, groups, states, task_heads, parts;
  bool blocked, softplus;
  RowView x;                        // (b, l, k, p)
  RowView b_in, c_out;              // (b, l, g, n)
  const T* dt;                      // (b, l, k)
  const T *decay, *skip, *dt_bias;  // (k); the last two or null
  const T* initial_state;           // (b, k, n, p) or null
  RowOutput out;                    // (b, l, k, p)
  T* last_state;                    // (b, k, n, p)
  T* carries;        // (b, chunks, k, n, p): states before every chunk; written unless null, read by the backward
  RowView grad_out;  // (b, l, k, p); data null for zeros
  const T* grad_last_state;   // (b, k, n, p) or null
  RowOutput dx;               // (b, l, k, p)
  T* ddt;                     // (b, l, k)
  T *db, *dc;                 // (parts, b, l, g, n)
  T* dinitial;                // (b, k, n, p) or null
  T *ddecay, *dskip, *dbias;  // (b, k); the last two or null
};

// The kernels of one instruction set. A task is one batch entry and one block of channels; tasks are independent.
template <typename T>
struct Kernels {
  int64_t (*block_width)(int64_t channels);            // channels per task
  int64_t (*workspace)(int64_t states, int64_t rank);  // scratch of one thread, in elements
  void (*selective_scan)(const SelectiveScanArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*selective_scan_backward)(const SelectiveScanArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*scan2d)(const Scan2dArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*scan2d_backward)(const Scan2dArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  // A task is one band of rows of one map and one block of channels, blocks counted fastest.
  int64_t (*depthwise_conv_blocks)(int64_t channels);                // tasks per band
  int64_t (*depthwise_conv_workspace)(const DepthwiseConvArgs<T>&);  // scratch of one thread, in elements
  void (*depthwise_conv)(const DepthwiseConvArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*depthwise_conv_backward)(const DepthwiseConvArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  // A task is one band of positions of one sequence and one block of channels, blocks counted fastest.
  int64_t (*causal_conv_blocks)(int64_t channels);             // tasks per band
  int64_t (*causal_conv_workspace)(const CausalConvArgs<T>&);  // scratch of one thread, in elements
  void (*causal_conv)(const CausalConvArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*causal_conv_backward)(const CausalConvArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  // A task is one range of positions of one batch entry and one group of heads, groups counted fastest.
  int64_t (*ssd_workspace)(const SsdArgs<T>&);  // scratch of one thread, in elements
  // Sums over positions of b_in (x weight), or of c_out grad_out where grad_out is there.
  void (*ssd_state)(const SsdArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*ssd_read)(const SsdArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*ssd_backward)(const SsdArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  // A task is a block of heads of one group of one batch entry.
  int64_t (*ssd_scan_workspace)(const SsdScanArgs<T>&, bool backward);
  void (*ssd_scan)(const SsdScanArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
  void (*ssd_scan_backward)(const SsdScanArgs<T>&, int64_t task_begin, int64_t task_end, T* workspace);
};

struct KernelTable {
  Kernels<float> f32;
  Kernels<double> f64;
};

// Defined in kernels_<name>.cpp.
const KernelTable& baseline_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

}  // namespace mmvmamba
