// How a scan is laid out on a device: which kernel, how many warps a block, how many bands. Decided by shapes and the
// device's limits alone, never by a measurement, so that results repeat.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mmvmamba {

struct Limits {
  int sm_count;
  int shared_bytes;  // of a block
};

// What decides about the layout.
struct Problem {
  int batch, groups, group_channels, length;
  int states, rank, features;
  int element_size;  // bytes
  bool projected;    // else step sizes are given
  bool by_visit;     // permuted routes, or given step sizes: no map in shared memory
  bool softplus;
  bool pairs, even_features;  // whether memory allows to read channels, and features, two at a time
  bool small;                 // fewer than 2^32 elements in an image
  bool both_axes;             // routes along rows and along columns
};

// A range of the channels of a group, and the kernel that does it.
struct Part {
  Variant variant;
  int channel_begin, tile_begin, tiles;
  int shared_bytes, aggregate_shared_bytes;
};

struct Plan {
  Part parts[2];  // pairs of channels, and 32 single ones where the channels are an odd multiple of 32
  int part_count;
  int tiles;  // of all parts
  int warps, aggregate_warps, bands, band_length;
  bool fits;  // else the device has too little shared memory for this many states or features
};

Plan plan_scan(const Problem& problem, const Limits& limits, bool backward);

}  // namespace mmvmamba
