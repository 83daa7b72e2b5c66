// The table of compiled scan kernels: one entry a type, a variant and a pass.
#pragma once

#include "scan.cuh"

namespace mmvmamba {

enum class Element { kFloat32, kFloat16, kBFloat16 };

// What a kernel is made for. Pairs: two adjacent channels a lane. The first four are for one state with softplus along
// rows and columns and full tiles of channels, as in models; any states does everything else that scan2d allows; given
// steps is selective_scan.
enum Variant { kPairsSmallRank, kPairs, kSinglesSmallRank, kSingles, kAnyStates, kGivenSteps, kVariants };

constexpr int channels_per_lane(Variant variant) { return variant == kPairsSmallRank || variant == kPairs ? 2 : 1; }
constexpr bool has_one_state(Variant variant) { return variant <= kSingles; }

using ScanKernel = void (*)(ScanArgs);

struct ScanKernels {
  ScanKernel scan[kVariants];       // forward or backward
  ScanKernel aggregate[kVariants];  // what bands do to the state, or to the adjoint
};

const ScanKernels& forward_kernels_float32();
const ScanKernels& forward_kernels_float16();
const ScanKernels& forward_kernels_bfloat16();
const ScanKernels& backward_kernels_float32();
const ScanKernels& backward_kernels_float16();
const ScanKernels& backward_kernels_bfloat16();

}  // namespace mmvmamba
