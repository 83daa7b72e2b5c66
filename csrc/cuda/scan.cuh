// What the forward and the backward kernels of both operators share: arguments, shared memory, and which part of the
// work is whose.
//
// Lanes are channels, V adjacent ones each; a warp works on a slice of 16 consecutive positions of a route at a time,
// the warps of a block on consecutive slices (a turn). A block belongs to one batch entry, one tile of 32 V channels
// and one band of positions, and does all routes of a launch one after another: nothing is added by two blocks.
//
// Units: step sizes are kept as s = delta / ln 2, so that the decay is 2^(A s); log2(e) is folded into the step-size
// weights, ln 2 into B.
#pragma once

#include "device.cuh"

namespace mmvmamba {

constexpr int kRows = 16;     // positions of a slice: the height of a tensor-core tile
constexpr int kLanes = 32;    // of a warp
constexpr int kRankTile = 8;  // depth of a tensor-core tile
constexpr int kChunk = 32;    // positions between two saved states, as in mmvmamba/ops/library.py
constexpr int kMaxRoutes = 64;
constexpr int kRowSumStride = 2 * kLanes + 4;  // keeps vectors of four apart in the banks
constexpr int kMaxBackwardWarps = 4, kMaxAggregateWarps = 8;
// Of the forward: pairs of float32 need more registers than 16 warps have.
constexpr int max_forward_warps(int channels_per_lane, int element_size) {
  return channels_per_lane == 2 && element_size == 4 ? 8 : 16;
}
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;
constexpr float kLargestExponent = 127.99f;  // 2^ of it is finite: a decay never becomes infinite

// Scan orders, as in mmvmamba/ops/scan2d/orders.py.
enum Order : uint8_t { kRow = 0, kColumn = 1, kRowReversed = 2, kColumnReversed = 3, kPermuted = 4 };
// Which routes a launch does: those along rows, those along columns, or all. A set of bits.
enum Axes : int { kRowAxis = 1, kColumnAxis = 2, kAllAxes = 3 };

// Division of 0 <= x < 2^31 by a constant of the launch.
struct Divider {
  uint32_t divisor, multiplier, shift;
};

struct ScanArgs {
  // Inputs: x (b, pixels, d), or a map for each route (b, pixels, routes, d), and projections (b, pixels, slots,
  // features) in the type of the kernel; delta (b, pixels, d), only where step sizes are given and not projected. slots
  // is routes * groups, of which one is 1.
  const void *x, *delta, *projections;
  const float *dt_weight, *dt_bias, *A, *D;  // (routes, d, r), (routes, d), (routes, d, n), (routes, d)
  const int64_t* permutation;                // (routes, length) or null
  float* out;                                // (b, pixels, d), or by visit (b, routes, length, d)
  float *carries, *last_state;               // (b, routes, chunks, n, d), (b, d, n)
  // Of every band: log2 of the product of its decays; its end from a start of zero, then the state it starts with
  // (b, routes, bands, n, d). The adjoint has the same.
  float *band_decay, *band_state;
  // Backward. Gradients of parameters and of the projections are partial sums.
  const float *grad_out, *grad_last_state;
  float *dx, *ddelta;   // as out; of a map for each route (b, pixels, routes, d), or by visit (b, length, routes, d)
  float* dprojections;  // (tiles, b, pixels or length, slots, features)
  float* ddt_weight;    // (b, bands, routes, d, r)
  float* ddt_bias;      // (b, bands, routes, d); of given step sizes (b, bands, warps, routes, d)
  float *dA, *dD;       // (b, bands, warps, routes, d, n), (b, bands, warps, routes, d)
  int batch, height, width, pixels, length;
  int channels, groups, group_channels;  // channels = groups * group_channels
  int routes, states, rank, features, slots;
  int tiles, bands, band_length, chunks;  // tiles of a group that this launch does
  int channel_begin, tile_begin;          // the first of them, in a group
  int x_pixel, x_route;                   // elements of x from pixel to pixel, and from route to route or 0
  int axes;                               // of this launch
  bool first_launch;                      // writes the merged map; later launches add
  bool by_visit;  // results per visit of a route; else the merged map of the band is kept in shared memory
  bool at_pixel;  // visits are counted by pixel, where every route visits each once; else by position of the route
  bool delta_softplus;
  Divider by_height;
  uint8_t orders[kMaxRoutes];
};

__device__ __forceinline__ int divide(int x, const Divider& by) {
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(static_cast<uint32_t>(x)) * by.multiplier) >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(x)) >> by.shift);
}

// What decides about the shared memory of a block.
struct SharedSizes {
  int width, warps, rank, states;  // width: channels of a tile
  bool one_state, projected, backward = false;
  int carried = 0;       // states handed from turn to turn
  int exchanged = 0;     // tables of effects in which warps meet
  int64_t map_rows = 0;  // of the merged map
};

// Where the arrays of a block lie in its shared memory, in floats.
struct SharedLayout {
  int bases, rates, weights, rows, pixels, features, z, exchange, carry, dweights, row_sums, first_states, map;
  int weight_stride, feature_stride, z_stride, dweight_stride, rank_padded;
  int64_t size;

  __host__ __device__ __forceinline__ explicit SharedLayout(const SharedSizes& of) {
    // One column more than the rank, which holds 1: its weight is the bias.
    rank_padded = of.projected ? (of.rank / kRankTile + 1) * kRankTile : 0;
    weight_stride = of.width + 2;  // of four floats: banks 8 apart for the rows of a tile
    // Banks 4 apart for the eight rows of a tile. B and C of one state lie elsewhere.
    feature_stride = (rank_padded + (of.one_state ? 0 : 2 * of.states) + 7) / 8 * 8 + 4;
    z_stride = of.width + 8;
    dweight_stride = of.width + 4;
    const int slices = of.warps * kRows;
    int64_t at = 0;
    auto take = [&at](int64_t count) {
      const int here = static_cast<int>(at);
      at += (count + 3) / 4 * 4;
      return here;
    };
    bases = take(4);
    rates = take(of.width);
    weights = take(2 * rank_padded * weight_stride);  // rank_padded / 8 times 4 rows of 4 floats
    rows = take(4 * slices);
    pixels = take(slices);
    features = take(static_cast<int64_t>(slices) * feature_stride);
    z = take(slices * z_stride);
    exchange = take(static_cast<int64_t>(of.exchanged) * of.warps * of.width * 2);
    carry = take(static_cast<int64_t>(2) * of.carried * of.width);
    dweights = take(of.backward ? rank_padded * dweight_stride : 0);
    row_sums = take(of.backward ? slices * kRowSumStride : 0);
    first_states = take(of.backward ? static_cast<int64_t>(of.states) * of.width : 0);
    map = take(of.map_rows * of.width);
    size = at;
  }
};

// The block's part of the work.
// kFull: every lane has a channel.
template <int V, bool kFull>
struct Place {
  int lane, warp, warps;
  int batch, band, group, tile;
  int channel;  // of this lane, counted over all groups
  bool valid;   // whether the lane has a channel; else it computes with the first one, and nobody reads its results

  __device__ __forceinline__ explicit Place(const ScanArgs& args) {
    lane = threadIdx.x % kLanes;
    warp = threadIdx.x / kLanes;
    warps = blockDim.x / kLanes;
    int rest = blockIdx.x;
    tile = rest % args.tiles;
    rest /= args.tiles;
    group = rest % args.groups;
    rest /= args.groups;
    band = rest % args.bands;
    batch = rest / args.bands;
    const int within = args.channel_begin + tile * kLanes * V + V * lane;
    valid = kFull || within < args.group_channels;
    channel = group * args.group_channels + (valid ? within : 0);
  }
};

// Where a band that starts at a place ends.
__device__ __forceinline__ int end_of_band(const ScanArgs& args, int from) {
  return args.length - from > args.band_length ? from + args.band_length : args.length;
}

// The positions of a band on one route.
struct Span {
  int begin, end;  // positions t of the route
  Order order;
  bool by_column;
  // Position t of the route is place origin + step * t along its axis.
  int origin, step;

  __device__ __forceinline__ Span(const ScanArgs& args, int route, int band) {
    order = static_cast<Order>(args.orders[route]);
    by_column = order == kColumn || order == kColumnReversed;
    const bool reversed = order == kRowReversed || order == kColumnReversed;
    origin = reversed ? args.length - 1 : 0;
    step = reversed ? -1 : 1;
    // Bands are cut along the axis, so that a route and its reverse share them.
    const int from = band * args.band_length, until = end_of_band(args, from);
    begin = reversed ? args.length - until : from;
    end = reversed ? args.length - from : until;
  }
};

__device__ __forceinline__ bool in_launch(const ScanArgs& args, int route) {
  const Order order = static_cast<Order>(args.orders[route]);
  const int axis = order == kColumn || order == kColumnReversed ? kColumnAxis : kRowAxis;
  return (args.axes & axis) != 0;
}

// Pixel at a place along the rows or along the columns.
__device__ __forceinline__ int pixel_at(const ScanArgs& args, bool by_column, int along) {
  if (!by_column) return along;
  const int column = divide(along, args.by_height);
  return (along - column * args.height) * args.width + column;
}

// Pixel of position t of a permuted route. The interface checks the range where it can; what reaches this is kept
// inside the map.
__device__ __forceinline__ int permuted_pixel(const ScanArgs& args, int route, int t) {
  const int64_t pixel = args.permutation[static_cast<int64_t>(route) * args.length + t];
  return static_cast<int>(pixel < 0 ? 0 : pixel >= args.pixels ? args.pixels - 1 : pixel);
}

}  // namespace mmvmamba
