// Runs the compiled kernels alone, without PyTorch, on random inputs, and compares them with a plain scalar scan.
// Meant to be built with sanitizers: scripts/sanitize.sh. The suffix .cc keeps these files out of the extension, which
// is built from every .cpp and .h below csrc/.
//
//   check_kernels [first [count [stride]]]     inputs number first, first + stride, ...
//
// An input is wholly made from its number, so a failure is repeated by `check_kernels <number> 1`.

#include <cstdio>
#include <cstdlib>

#include "causal_conv.hh"
#include "depthwise_conv.hh"
#include "run_kernels.hh"
#include "ssd.hh"

namespace check {

struct Target {
  const char* name;
  const mmvmamba::KernelTable* table;
};

// Every instruction set that was linked and that this processor has.
std::vector<Target> targets() {
  std::vector<Target> found = {{"baseline", &mmvmamba::baseline_kernels()}};
#if defined(__x86_64__) && !defined(MMVMAMBA_CHECK_BASELINE_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) found.push_back({"avx2", &mmvmamba::avx2_kernels()});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", &mmvmamba::avx512_kernels()});
#endif
  return found;
}

template <typename T>
const Kernels<T>& kernels_of(const Target& target);
template <>
const Kernels<float>& kernels_of<float>(const Target& target) {
  return target.table->f32;
}
template <>
const Kernels<double>& kernels_of<double>(const Target& target) {
  return target.table->f64;
}

template <typename T>
std::vector<Expected> scalar(const ScanProblem<T>& problem) {
  return scalar_selective_scan(problem);
}
template <typename T>
std::vector<Expected> scalar(const MapProblem<T>& problem) {
  return scalar_scan2d(problem);
}

template <typename T>
std::vector<Expected> scalar(const ConvProblem<T>& problem) {
  return scalar_depthwise_conv(problem);
}

template <typename T>
std::vector<Expected> scalar(const CausalProblem<T>& problem) {
  return scalar_causal_conv(problem);
}

template <typename T>
std::vector<Expected> scalar(const SsdProblem<T>& problem) {
  return scalar_ssd(problem);
}

// Largest error relative to the largest value (the sum of its terms without their signs): the figures of
// mmvmamba/testing.py.
double allowed(Bound bound, bool single) {
  if (bound == Bound::kBFloat16) return 4e-3;  // half of 2^-7 and a little; float16: of 2^-10
  if (bound == Bound::kFloat16) return 5e-4;
  if (bound == Bound::kForward) return single ? 2e-6 : 1e-12;
  return !single ? 1e-11 : bound == Bound::kStream ? 1e-5 : 2e-5;
}

struct Totals {
  int64_t inputs = 0, compared = 0, failures = 0;
  double worst = 0;  // error over bound
  std::string worst_where;
};

// Checks one input; everything it has to say goes to `totals` and stderr.
class Checker {
 public:
  Checker(int64_t number, Totals& totals) : number_(number), totals_(totals) {}

  template <typename T, typename Problem>
  void check(const Problem& problem, Random& random) {
    const std::string what = std::string(sizeof(T) == 4 ? "float " : "double ") + problem.describe();
    const std::vector<Expected> expected = scalar(problem);
    for (const Target& target : targets()) {
      what_ = what + ", " + target.name;
      const Kernels<T>& kernels = kernels_of<T>(target);
      const int64_t tasks = task_count(kernels, problem);
      Execution split = {{}, 255};
      for (int64_t task = 1; task < tasks; ++task)
        if (random.chance(0.5)) split.cuts.push_back(task);
      const Results<T> whole = run(kernels, problem, Execution{{}, 0}), ranges = run(kernels, problem, split);
      for (size_t i = 0; i < whole.size(); ++i)
        if (!same_bits(whole[i].values, ranges[i].values))
          fail(whole[i].name, "depends on how the tasks are dealt out, or on memory that nobody wrote");
      if (!same_bits(whole.front().values, whole.back().values))
        fail("out", "depends on the call, or on whether states are saved");
      for (size_t i = 0; i < expected.size(); ++i) compare(whole[i], expected[i], problem.values, problem.slack);
    }
  }

 private:
  template <typename T>
  static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
  }

  template <typename T>
  void compare(const Result<T>& found, const Expected& expected, Values values, double slack) {
    if (found.name != expected.name || found.values.size() != expected.values.size()) {
      fail(found.name, "has another name or size than " + expected.name + " of the scalar scan");
      return;
    }
    if (values == Values::kExtreme) return;  // intermediate results overflow in float where they do not in double
    // Kernels may keep a tiny number where the exact one is 0: softplus of minus infinity, for one.
    double scale = std::sqrt(static_cast<double>(std::numeric_limits<T>::min())), error = 0;
    for (size_t i = 0; i < expected.values.size(); ++i) {
      const double want = expected.values[i].value, have = found.values[i];
      if (std::isfinite(want)) {
        scale = std::fmax(scale, expected.values[i].magnitude);
        // A NaN must not vanish in fmax, which returns the other number.
        error = std::isfinite(have) ? std::fmax(error, std::fabs(have - want)) : INFINITY;
      } else if (values == Values::kNan && std::isfinite(have)) {
        fail(found.name, "lost a NaN at element " + std::to_string(i));
        return;
      }
    }
    const double bound = slack * allowed(found.bound, sizeof(T) == 4);
    const double ratio = error == 0 ? 0 : error / (scale * bound);
    ++totals_.compared;
    if (!(ratio <= 1)) fail(found.name, "has a relative error of " + std::to_string(ratio) + " times the bound");
    if (ratio > totals_.worst) {
      totals_.worst = ratio;
      totals_.worst_where = found.name + " of input " + std::to_string(number_) + ", " + what_;
    }
  }

  void fail(const std::string& result, const std::string& problem) {
    ++totals_.failures;
    std::fprintf(stderr, "check_kernels: input %lld (%s): %s %s\n", static_cast<long long>(number_), what_.c_str(),
                 result.c_str(), problem.c_str());
  }

  int64_t number_;
  Totals& totals_;
  std::string what_;
};

template <typename T>
void check_kind(double kind, Checker& checker, Random& random) {
  if (kind < 0.35) {
    checker.check<T>(MapProblem<T>(random), random);
  } else if (kind < 0.6) {
    checker.check<T>(ScanProblem<T>(random), random);
  } else if (kind < 0.8) {
    checker.check<T>(SsdProblem<T>(random), random);
  } else if (kind < 0.9) {
    checker.check<T>(ConvProblem<T>(random), random);
  } else {
    checker.check<T>(CausalProblem<T>(random), random);
  }
}

void check_input(int64_t number, Totals& totals) {
  Random random(static_cast<uint64_t>(number));
  Checker checker(number, totals);
  const double kind = random.uniform();
  if (random.chance(0.6)) {
    check_kind<float>(kind, checker, random);
  } else {
    check_kind<double>(kind, checker, random);
  }
  ++totals.inputs;
}

}  // namespace check

int main(int argc, char** argv) {
  const int64_t first = argc > 1 ? std::atoll(argv[1]) : 0, count = argc > 2 ? std::atoll(argv[2]) : 1000;
  const int64_t stride = argc > 3 ? std::atoll(argv[3]) : 1;
  check::Totals totals;
  std::string names;
  for (const check::Target& target : check::targets()) names += std::string(names.empty() ? "" : ", ") + target.name;
  for (int64_t i = 0; i < count && totals.failures < 20; ++i) check::check_input(first + i * stride, totals);
  std::printf("%lld inputs on %s: %lld results compared, %lld failures; largest error %.2f of its bound (%s)\n",
              static_cast<long long>(totals.inputs), names.c_str(), static_cast<long long>(totals.compared),
              static_cast<long long>(totals.failures), totals.worst, totals.worst_where.c_str());
  return totals.failures == 0 ? 0 : 1;
}
