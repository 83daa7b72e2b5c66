// Print the plans of scans, one a line of standard input: how tests see what the host code of csrc/cuda decides.
//
// Input: batch groups group_channels length states rank projected by_visit backward sm_count shared_bytes. Output:
// variant:channel_begin:tiles of every part, then warps, bands, positions of a band and shared memory of the first
// part.
#include <cstdio>

#include "../cuda/plan.h"

int main() {
  int batch, groups, channels, length, states, rank, projected, by_visit, backward, sm_count, shared_bytes;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %d", &batch, &groups, &channels, &length, &states, &rank, &projected,
                    &by_visit, &backward, &sm_count, &shared_bytes) == 11) {
    mmvmamba::Problem problem{};
    problem.batch = batch;
    problem.groups = groups;
    problem.group_channels = channels;
    problem.length = length;
    problem.states = states;
    problem.rank = rank;
    problem.features = rank + 2 * states;
    problem.element_size = 2;
    problem.projected = projected;
    problem.by_visit = by_visit;
    problem.softplus = problem.pairs = problem.small = problem.both_axes = true;
    problem.even_features = problem.features % 2 == 0;
    const mmvmamba::Plan plan = mmvmamba::plan_scan(problem, {sm_count, shared_bytes}, backward != 0);
    for (int i = 0; i < plan.part_count; ++i)
      std::printf("%d:%d:%d ", static_cast<int>(plan.parts[i].variant), plan.parts[i].channel_begin,
                  plan.parts[i].tiles);
    std::printf("warps %d bands %d rows %d shared %d fits %d\n", plan.warps, plan.bands, plan.band_length,
                plan.parts[0].shared_bytes, plan.fits ? 1 : 0);
  }
}
