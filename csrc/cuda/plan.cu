#include "plan.h"

#include <algorithm>

namespace mmvmamba {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

bool has_small_rank(const Problem& problem) {
  return problem.even_features && problem.rank % 2 == 0 && problem.rank <= 6;
}

Variant choose_variant(const Problem& problem) {
  if (!problem.projected) return kGivenSteps;
  const int d = problem.group_channels;
  if (problem.states != 1 || !problem.softplus || problem.by_visit || !problem.small || d % kLanes != 0)
    return kAnyStates;
  if (problem.pairs && d % (2 * kLanes) == 0) return has_small_rank(problem) ? kPairsSmallRank : kPairs;
  return has_small_rank(problem) ? kSinglesSmallRank : kSingles;
}

int shared_bytes(const Problem& problem, Variant variant, int warps, int map_rows, bool backward) {
  const int width = kLanes * channels_per_lane(variant);
  const SharedLayout layout(width, warps, problem.rank, problem.states, problem.projected, map_rows, backward ? 4 : 2,
                            backward);
  return layout.size * static_cast<int>(sizeof(float));
}

int aggregate_bytes(const Problem& problem, Variant variant, int warps) {
  const int width = kLanes * channels_per_lane(variant);
  const SharedLayout layout(width, warps, problem.rank, problem.states, problem.projected, 0, 2 * problem.states,
                            false);
  return layout.size * static_cast<int>(sizeof(float));
}

// Warps of a block: no more than there are slices, a power of two, so that a turn starts with a chunk. The backward for
// one state is written for one number of them.
int warps_for(const Problem& problem, Variant variant, bool backward) {
  if (backward && has_one_state(variant)) return kMaxBackwardWarps;
  const int most = backward ? kMaxBackwardWarps : max_forward_warps(channels_per_lane(variant), problem.element_size);
  int warps = 2;
  while (warps < most && warps * kRows < problem.length) warps *= 2;
  return warps;
}

bool set_bands(const Problem& problem, const Limits& limits, bool backward, int64_t blocks, Plan& plan) {
  const int enough = backward ? kMaxBackwardWarps : 8;
  const int fewest = backward && has_one_state(plan.variant) ? kMaxBackwardWarps : 2;
  // One block has the whole map, read once and written once: as long as that keeps the device busy.
  if (blocks >= limits.sm_count / 4 || problem.length <= 1024 || problem.by_visit) {
    const bool alone = !problem.by_visit || blocks >= 2 * limits.sm_count || problem.length <= 1024;
    for (int warps = warps_for(problem, plan.variant, backward); alone && warps >= fewest; warps /= 2) {
      const int bytes = shared_bytes(problem, plan.variant, warps, problem.by_visit ? 0 : problem.length + 1, backward);
      if (bytes > limits.shared_bytes) continue;
      // A large map with few warps beside it leaves a multiprocessor idle.
      if (warps < std::min(backward ? 4 : 8, warps_for(problem, plan.variant, backward)) &&
          bytes > limits.shared_bytes / 4)
        break;
      plan.warps = warps;
      plan.bands = 1;
      plan.band_length = problem.length;
      plan.shared_bytes = bytes;
      return true;
    }
  }
  const int wanted = static_cast<int>(
      std::max<int64_t>(1, ceil_div(4 * limits.sm_count, static_cast<int>(std::min<int64_t>(blocks, 1 << 20)))));
  for (int warps = enough; warps >= fewest; warps /= 2) {
    const int turn = kRows * warps;
    int rows = std::max(1, ceil_div(ceil_div(problem.length, wanted), turn)) * turn;
    // Two blocks a multiprocessor hide each other's waiting; more rows than that are not worth a block's loneliness.
    while (rows > kChunk && !problem.by_visit &&
           shared_bytes(problem, plan.variant, warps, rows + 1, backward) > limits.shared_bytes / 2)
      rows -= kChunk;
    const int bytes = shared_bytes(problem, plan.variant, warps, problem.by_visit ? 0 : rows + 1, backward);
    if (bytes > limits.shared_bytes) continue;
    plan.warps = warps;
    plan.band_length = std::min(rows, problem.length);
    plan.bands = ceil_div(problem.length, plan.band_length);
    plan.shared_bytes =
        shared_bytes(problem, plan.variant, warps, problem.by_visit ? 0 : plan.band_length + 1, backward);
    return true;
  }
  return false;
}

}  // namespace

Plan plan_scan(const Problem& problem, const Limits& limits, bool backward) {
  Plan plan{};
  plan.variant = choose_variant(problem);
  // Maps too large for pairs may fit with single channels: half the memory a position.
  for (;;) {
    plan.tiles = ceil_div(problem.group_channels, kLanes * channels_per_lane(plan.variant));
    const int64_t blocks = static_cast<int64_t>(problem.batch) * problem.groups * plan.tiles;
    plan.fits = set_bands(problem, limits, backward, blocks, plan);
    if (plan.fits || channels_per_lane(plan.variant) == 1) break;
    plan.variant = has_small_rank(problem) ? kSinglesSmallRank : kSingles;
  }
  plan.aggregate_warps = kMaxAggregateWarps;
  while (plan.aggregate_warps > 1 && aggregate_bytes(problem, plan.variant, plan.aggregate_warps) > limits.shared_bytes)
    plan.aggregate_warps /= 2;
  plan.aggregate_shared_bytes = aggregate_bytes(problem, plan.variant, plan.aggregate_warps);
  if (plan.bands > 1 && plan.aggregate_shared_bytes > limits.shared_bytes) plan.fits = false;
  return plan;
}

}  // namespace mmvmamba
