#!/usr/bin/env bash
# Run the kernels under AddressSanitizer and UndefinedBehaviorSanitizer; the exit status is not 0 at the first report.
#
#   scripts/sanitize.sh [count]            count (default 100000) random inputs on every instruction set this CPU has
#   scripts/sanitize.sh --baseline count   the same with the baseline kernels alone: compiles in a third of the time
#   scripts/sanitize.sh --python           an instrumented copy of the extension under the random tests of tests/test_ops,
#                                          for what lies between PyTorch and the kernels; PYTHON chooses the interpreter
#
# The first two need a C++ compiler only (CXX, default g++): csrc/check/ calls the kernels without PyTorch. What they
# compile is kept in build/sanitize until csrc/, the compiler or the flags change. JOBS (default 2) processes.
set -euo pipefail
cd "$(dirname "$0")/.."
cxx=${CXX:-g++}
jobs=${JOBS:-2}
sanitizers=("-fsanitize=address,undefined" -fsanitize=float-cast-overflow -fno-sanitize-recover=all)
# A small quarantine of freed memory: the inputs are many and short-lived.
export ASAN_OPTIONS=quarantine_size_mb=16
export UBSAN_OPTIONS=print_stacktrace=1

run_python() {
  local python=${PYTHON:-python} runtime work
  runtime=$("$cxx" -print-file-name=libasan.so)
  [ -e "$runtime" ] || { echo "sanitize: $cxx has no libasan.so: use g++ (CXX=g++)" >&2; exit 1; }
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  cp -r setup.py pyproject.toml README.md LICENSE NOTICE csrc "$work/"
  mkdir -p "$work/mmvmamba" "$work/tests"
  tar -C mmvmamba --exclude='_C.*' --exclude=__pycache__ -cf - . | tar -C "$work/mmvmamba" -xf -
  cp tests/conftest.py "$work/tests/"
  cp -r tests/test_ops "$work/tests/"
  cd "$work"
  echo "[sanitize] building the extension with ${sanitizers[*]}"
  CFLAGS="${sanitizers[*]}" CXXFLAGS="${sanitizers[*]}" LDFLAGS="${sanitizers[*]}" DEBUG=1 MAX_JOBS="$jobs" \
    "$python" setup.py --quiet build_ext --inplace > build.log 2>&1 || { tail -30 build.log >&2; exit 1; }
  echo "[sanitize] random configurations through Python"
  # PyTorch and Python leave memory to the end of the process, so leaks are not looked for here.
  PYTHONPATH="$work" LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
    "$python" -m pytest -q -p no:cacheprovider -m ext tests/test_ops/test_random_configurations.py
}

if [ "${1:-}" = --python ]; then
  run_python
  exit
fi

kernels=(csrc/cpu/kernels_baseline.cpp)
flags=(-std=c++20 -g1 -Wall -Wno-psabi -fno-trapping-math -fno-math-errno -Icsrc)
if [ "${1:-}" = --baseline ]; then
  shift
  flags+=(-DMMVMAMBA_CHECK_BASELINE_ONLY)
elif [ "$(uname -m)" = x86_64 ]; then
  kernels+=(csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
fi
count=${1:-100000}
case $count in
  '' | *[!0-9]*) echo "sanitize: the count must be a whole number, not '$count'; see the head of scripts/sanitize.sh" >&2; exit 2 ;;
esac

key=$({ cat csrc/check/* csrc/cpu/*.h csrc/cpu/kernels_*.cpp; echo "${flags[@]}" "${sanitizers[@]}"; "$cxx" --version; } | sha256sum | cut -c1-16)
program=build/sanitize/check_kernels-$key
if [ ! -x "$program" ]; then
  mkdir -p build/sanitize
  objects=$(mktemp -d build/sanitize/objects.XXXXXX)
  # shellcheck disable=SC2064
  trap "rm -rf '$objects'" EXIT
  # The driver itself is not instrumented, which makes it several times faster; its buffers still are guarded.
  "$cxx" "${flags[@]}" -O2 -c csrc/check/check_kernels.cc -o "$objects/check_kernels.o" &
  driver=$!
  # shellcheck disable=SC2016 # the inner shell expands them
  printf '%s\n' "${kernels[@]}" | xargs -P "$jobs" -I{} sh -c '"$@" -c "$0" -o "'"$objects"'/$(basename "$0").o"' {} \
    "$cxx" "${flags[@]}" -O1 "${sanitizers[@]}"
  wait "$driver"
  "$cxx" "${sanitizers[@]}" "$objects"/*.o -o "$objects/program"
  mv "$objects/program" "$program"  # at once: another run may be waiting for it
fi

# Every process takes each `jobs`-th input.
pids=()
for ((job = 0; job < jobs; ++job)); do
  "$program" "$job" $(((count - job + jobs - 1) / jobs)) "$jobs" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
[ "$status" = 0 ] && echo "sanitize: $count inputs, no report" || echo "sanitize: FAILED, see the reports above" >&2
exit "$status"
