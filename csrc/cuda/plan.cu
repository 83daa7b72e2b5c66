#include "plan.h"

#include <algorithm>

namespace mmvmamba {
namespace {

constexpr int kReservedShared = 1024;  // bytes of every block

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

bool has_small_rank(const Problem& problem) {
  return problem.even_features && problem.rank % 2 == 0 && problem.rank <= 6;
}

Variant with_rank(const Problem& problem, Variant small, Variant any) { return has_small_rank(problem) ? small : any; }

// The kernels for one state want every lane to have a channel.
bool is_for_one_state(const Problem& problem) {
  return problem.projected && problem.states == 1 && problem.softplus && !problem.by_visit && problem.small &&
         problem.group_channels % kLanes == 0;
}

void add_part(Plan& plan, Variant variant, int channel_begin, int channels) {
  Part& part = plan.parts[plan.part_count++];
  part.variant = variant;
  part.channel_begin = channel_begin;
  part.tile_begin = plan.tiles;
  part.tiles = ceil_div(channels, kLanes * channels_per_lane(variant));
  plan.tiles += part.tiles;
}

// Who does which channels. Pairs share what a position costs besides its channels: about 30 % fewer instructions each.
Plan choose_parts(const Problem& problem, bool with_pairs) {
  Plan plan{};
  const int d = problem.group_channels;
  if (!is_for_one_state(problem)) {
    add_part(plan, problem.projected ? kAnyStates : kGivenSteps, 0, d);
    return plan;
  }
  const int paired = with_pairs && problem.pairs ? d / (2 * kLanes) * (2 * kLanes) : 0;
  if (paired > 0) add_part(plan, with_rank(problem, kPairsSmallRank, kPairs), 0, paired);
  if (paired < d) add_part(plan, with_rank(problem, kSinglesSmallRank, kSingles), paired, d - paired);
  return plan;
}

SharedSizes sizes_of(const Problem& problem, Variant variant, int warps) {
  return {kLanes * channels_per_lane(variant),
          warps,
          problem.rank,
          problem.states,
          has_one_state(variant),
          problem.projected};
}

int64_t shared_bytes(const Problem& problem, Variant variant, int warps, int rows, bool backward) {
  SharedSizes of = sizes_of(problem, variant, warps);
  of.backward = backward;
  of.carried = problem.states;
  of.exchanged = backward ? 4 : 2;
  of.map_rows = problem.by_visit ? 0 : static_cast<int64_t>(rows) + warps;
  return SharedLayout(of).size * static_cast<int64_t>(sizeof(float));
}

int64_t aggregate_bytes(const Problem& problem, Variant variant, int warps) {
  SharedSizes of = sizes_of(problem, variant, warps);
  of.exchanged = problem.states;
  return SharedLayout(of).size * static_cast<int64_t>(sizeof(float));
}

// Shared memory that leaves room for a second block; the device keeps some of each.
int64_t half_of(const Limits& limits) { return (limits.shared_bytes + kReservedShared) / 2 - kReservedShared; }

// Warps of a block: no more than there are slices, a power of two, so that a turn starts with a chunk. The backward for
// one state is written for one number of them.
int warps_for(const Problem& problem, Variant variant, bool backward) {
  if (backward && has_one_state(variant)) return kMaxBackwardWarps;
  const int most = backward ? kMaxBackwardWarps : max_forward_warps(channels_per_lane(variant), problem.element_size);
  int warps = 2;
  while (warps < most && warps * kRows < problem.length) warps *= 2;
  return warps;
}

int fewest_warps(const Plan& plan, bool backward) {
  return backward && has_one_state(plan.parts[0].variant) ? kMaxBackwardWarps : 2;
}

int64_t count_blocks(const Problem& problem, const Plan& plan) {
  return static_cast<int64_t>(problem.batch) * problem.groups * plan.tiles;
}

// Lay out a scan with `warps` and, unless results go by visit, `rows` positions of the map in shared memory. The first
// part needs the most.
bool lay_out(const Problem& problem, const Limits& limits, bool backward, int warps, int rows, int64_t allowed,
             Plan& plan) {
  for (int i = 0; i < plan.part_count; ++i) {
    const int64_t bytes = shared_bytes(problem, plan.parts[i].variant, warps, rows, backward);
    if (bytes > allowed || bytes > limits.shared_bytes) return false;
    plan.parts[i].shared_bytes = static_cast<int>(bytes);
  }
  plan.warps = warps;
  plan.band_length = rows;
  plan.bands = ceil_div(problem.length, rows);
  return true;
}

// One block has the whole map, read once and written once: as long as that keeps the device busy.
// `most_bytes`: what the block may take.
bool take_whole_map(const Problem& problem, const Limits& limits, bool backward, int64_t most_bytes, bool must,
                    Plan& plan) {
  const int64_t blocks = count_blocks(problem, plan),
                enough = problem.by_visit ? 2 * limits.sm_count : limits.sm_count / 4;
  if (problem.length > 1024 && blocks < enough && !must) return false;
  const int most = warps_for(problem, plan.parts[0].variant, backward);
  const int few = std::min(backward ? kMaxBackwardWarps : 8, most);
  for (int warps = most; warps >= fewest_warps(plan, backward); warps /= 2) {
    // A large map with few warps beside it leaves a multiprocessor idle.
    const int64_t allowed = warps < few && !must ? std::min<int64_t>(most_bytes, limits.shared_bytes / 4) : most_bytes;
    if (lay_out(problem, limits, backward, warps, problem.length, allowed, plan)) return true;
  }
  return false;
}

// Bands of positions, enough of them for the device.
bool take_bands(const Problem& problem, const Limits& limits, bool backward, Plan& plan) {
  const int64_t blocks = std::min<int64_t>(count_blocks(problem, plan), 1 << 20);
  const int wanted = std::max(1, ceil_div(4 * limits.sm_count, blocks));
  for (int warps = backward ? kMaxBackwardWarps : 8; warps >= fewest_warps(plan, backward); warps /= 2) {
    const int turn = kRows * warps;
    // No more than could ever fit, which is few enough to try them one after the other.
    const int most_rows = limits.shared_bytes / static_cast<int>(kLanes * sizeof(float)) / turn * turn;
    const int wanted_rows = ceil_div(ceil_div(problem.length, wanted), turn) * turn;
    int rows = problem.by_visit ? wanted_rows : std::max(turn, std::min(wanted_rows, most_rows));
    // Two blocks a multiprocessor hide each other's waiting; more rows than that are not worth a block's loneliness.
    while (rows > kChunk && !lay_out(problem, limits, backward, warps, rows, half_of(limits), plan))
      rows -= rows > turn ? turn : kChunk;
    if (lay_out(problem, limits, backward, warps, std::min(rows, problem.length), limits.shared_bytes, plan))
      return true;
  }
  return false;
}

bool set_aggregate(const Problem& problem, const Limits& limits, Plan& plan) {
  for (int warps = kMaxAggregateWarps; warps >= 1; warps /= 2) {
    bool fits = true;
    for (int i = 0; i < plan.part_count; ++i) {
      const int64_t bytes = aggregate_bytes(problem, plan.parts[i].variant, warps);
      fits = fits && bytes <= limits.shared_bytes;
      if (fits) plan.parts[i].aggregate_shared_bytes = static_cast<int>(bytes);
    }
    plan.aggregate_warps = warps;
    if (fits) return true;
  }
  return plan.bands == 1;
}

}  // namespace

Plan plan_scan(const Problem& problem, const Limits& limits, bool backward) {
  // The map as a whole, with room for a second block beside the few warps of a backward; a map too large for pairs may
  // fit with single channels, half the memory a position. Only then bands, which compute every step size twice. Last a
  // whole scan by few blocks: with very many states what bands do may not fit.
  enum Way { kRoomy, kWhole, kBands, kFewBlocks };
  for (const Way way : {kRoomy, kWhole, kBands, kFewBlocks}) {
    for (const bool with_pairs : {true, false}) {
      if (way == kRoomy && !backward) continue;
      Plan plan = choose_parts(problem, with_pairs);
      const int64_t most_bytes = way == kRoomy ? half_of(limits) : limits.shared_bytes;
      plan.fits = way == kBands ? take_bands(problem, limits, backward, plan)
                                : take_whole_map(problem, limits, backward, most_bytes, way == kFewBlocks, plan);
      plan.fits = plan.fits && set_aggregate(problem, limits, plan);
      if (plan.fits) return plan;
    }
  }
  return Plan{};
}

}  // namespace mmvmamba
