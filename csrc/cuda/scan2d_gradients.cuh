// Sums of the backward that cross channels or positions: rows over lanes, features of the step size, their weights.
#pragma once

#include "slice.cuh"

namespace mmvmamba {

// The sums of row lane / 2 of two tables over all lanes, by way of `memory` (rows, kRowSumStride) of the warp: fewer
// instructions than shuffles. Even lanes get that of the first table, odd lanes that of the second.
__device__ __forceinline__ float sum_rows(const float (&first)[kRows], const float (&second)[kRows], float* memory,
                                          int lane) {
  __syncwarp();
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float pair[2] = {first[row], second[row]};
    store_vector<2>(memory + row * kRowSumStride + 2 * lane, pair);
  }
  __syncwarp();
  const float* half = memory + lane / 2 * kRowSumStride + lane % 2 * kLanes;
  float sum[4];
  load_vector<4>(half, sum);
#pragma unroll
  for (int i = 4; i < kLanes; i += 4) {
    float more[4];
    load_vector<4>(half + i, more);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] += more[j];
  }
  // What this lane keeps, and what its neighbour keeps.
  const float own = lane % 2 == 0 ? sum[0] + sum[2] : sum[1] + sum[3];
  const float other = lane % 2 == 0 ? sum[1] + sum[3] : sum[0] + sum[2];
  return own + __shfl_xor_sync(0xffffffffu, other, 1);
}

// Write the gradient of feature `column` of a row; `target` is the address of that of column 0 of row 0.
template <typename AnySlice>
__device__ __forceinline__ void store_feature(const AnySlice& slice, int64_t target, int row, int column, float value) {
  const int row_bytes = slice.args.slots * slice.args.features * static_cast<int>(sizeof(float));
  store_global(multiply_add_wide(slice.result_row(row), row_bytes, target) + column * static_cast<int>(sizeof(float)),
               value);
}

// Numbers are cut off, not rounded, where the tensor cores read them, which makes them smaller by 2^-11 ln 2 on
// average. What is stored for them in half precision is larger by as much.
constexpr float kCutOff = 3.3845e-4f;

template <typename T>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4],
                                               const uint32_t (&b_high)[2], const uint32_t (&b_low)[2]) {
  if constexpr (!kIsHalf<T>) {
    mma_16x8x8_tf32(sum, a_low, b_high);
    mma_16x8x8_tf32(sum, a_high, b_low);
  }
  mma_16x8x8_tf32(sum, a_high, b_high);
}

// Gradients of the step-size features of the slice: dz (16, channels of the tile) times the weights (channels, r).
template <typename T, int V, bool kOneState, int kRankTiles>
__device__ __forceinline__ void feature_gradients(const Slice<T, V, kOneState, kRankTiles>& slice, int64_t dfeatures) {
  const SharedLayout& layout = slice.layout;
  const int g = slice.place.lane / 4, t = slice.place.lane % 4;
  const int tiles = kRankTiles == 1 ? 1 : (slice.args.rank + kRankTile - 1) / kRankTile;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    __syncwarp();  // lanes part where rows or columns are missing
    float sum[4] = {};
    const float* weight = slice.weights + 4 * ((4 * tile + g % 4) * layout.weight_stride + t) + g / 4;
#pragma unroll
    for (int depth = 0; depth < 4 * V; ++depth) {
      const float* dz = slice.z + g * layout.z_stride + 8 * depth + t;
      const float a[4] = {dz[0], dz[8 * layout.z_stride], dz[4], dz[8 * layout.z_stride + 4]};
      uint32_t a_high[4], a_low[4];
      split_operand<T>(a, a_high, a_low);
      const uint32_t b_high[2] = {__float_as_uint(weight[32 * depth]), __float_as_uint(weight[32 * depth + 16])};
      const uint32_t b_low[2] = {__float_as_uint(weight[32 * depth + 2]), __float_as_uint(weight[32 * depth + 18])};
      multiply_parts<T>(sum, a_high, a_low, b_high, b_low);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = kRankTile * tile + 2 * t + i % 2;
      if (column < slice.args.rank && slice.has(row)) store_feature(slice, dfeatures, row, column, sum[i]);
    }
    if constexpr (kRankTiles == 1) break;
  }
}

// Add the turn's gradients of the step-size weights, dz (positions, channels) transposed times features (positions,
// r + 1), to shared memory (rank_padded, channels); the column that holds 1 gives the gradient of the bias. Positions
// are those of all warps of the block, whose features and dz lie one behind the other.
template <typename T, int V, bool kOneState, int kRankTiles>
__device__ __forceinline__ void weight_gradients(const Slice<T, V, kOneState, kRankTiles>& slice, float* dweights) {
  constexpr int kTiles = kRankTiles == 1 ? 1 : 4;  // of features at a time
  const SharedLayout& layout = slice.layout;
  const int g = slice.place.lane / 4, t = slice.place.lane % 4;
  const float* all_z = slice.z - slice.place.warp * kRows * layout.z_stride;
  const float* all_features = slice.features - slice.place.warp * kRows * layout.feature_stride;
  const int tiles = kRankTiles == 1 ? 1 : layout.rank_padded / kRankTile;
  const int warps = kOneState ? kMaxBackwardWarps : slice.place.warps;
#pragma unroll 1
  for (int block = slice.place.warp; block < 2 * V; block += warps) {  // of 16 channels
#pragma unroll 1
    for (int first = 0; first < tiles; first += kTiles) {
      float sum[kTiles][4] = {};
#pragma unroll(kOneState ? 2 * kMaxBackwardWarps : 1)
      for (int depth = 0; depth < 2 * warps; ++depth) {
        const float* dz = all_z + (8 * depth + t) * layout.z_stride + 16 * block + g;
        const float a[4] = {dz[0], dz[8], dz[4 * layout.z_stride], dz[4 * layout.z_stride + 8]};
        uint32_t a_high[4], a_low[4];
        split_operand<T>(a, a_high, a_low);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (first + tile >= tiles) continue;
          const float* feature =
              all_features + (8 * depth + t) * layout.feature_stride + kRankTile * (first + tile) + g;
          const float b[2] = {feature[0], feature[4 * layout.feature_stride]};
          uint32_t b_high[2], b_low[2];
          split_operand<T>(b, b_high, b_low);
          multiply_parts<T>(sum[tile], a_high, a_low, b_high, b_low);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (first + tile >= tiles) continue;
        float* target = dweights + (kRankTile * (first + tile) + 2 * t) * layout.dweight_stride + 16 * block + g;
        target[0] += sum[tile][0];
        target[layout.dweight_stride] += sum[tile][1];
        target[8] += sum[tile][2];
        target[layout.dweight_stride + 8] += sum[tile][3];
      }
    }
  }
}

// The gradients that `weight_gradients` collected, to memory; by the whole block.
template <typename T, int V, bool kOneState, int kRankTiles>
__device__ __forceinline__ void write_weight_gradients(const Slice<T, V, kOneState, kRankTiles>& slice, int route,
                                                       const float* dweights) {
  const ScanArgs& args = slice.args;
  const int within = args.channel_begin + slice.place.tile * kLanes * V;
  const int64_t first =
      ((static_cast<int64_t>(slice.place.batch) * args.bands + slice.place.band) * args.routes + route) *
          args.channels +
      slice.place.group * args.group_channels + within;
  for (int i = threadIdx.x; i < kLanes * V * (args.rank + 1); i += blockDim.x) {
    const int channel = i / (args.rank + 1), feature = i % (args.rank + 1);
    if (within + channel >= args.group_channels) continue;
    const float value = kLog2E * dweights[feature * slice.layout.dweight_stride + channel];
    if (feature < args.rank)
      args.ddt_weight[(first + channel) * args.rank + feature] = value;
    else if (args.ddt_bias != nullptr)
      args.ddt_bias[first + channel] = value;
  }
}

}  // namespace mmvmamba
