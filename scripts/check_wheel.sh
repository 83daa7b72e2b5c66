#!/usr/bin/env bash
# Build the wheel, check what it needs from PyTorch, install it in a fresh environment that has another PyTorch release
# and no mmengine, and run the operator tests there: one binary for every torch >= 2.10 is a promise to be kept.
#
#   scripts/check_wheel.sh [torch requirement] [python]
#   scripts/check_wheel.sh torch==2.13.0 python3.12
#
# The wheel is built by plain `pip wheel .`, in pip's isolated environment, with the PyTorch of BUILD_PYTHON (default:
# .venv/bin/python, as made by `make install`). It has no CUDA kernels unless MMVMAMBA_WITH_CUDA=1 is given: with them
# the PyTorch it runs under must be built for the same major version of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
torch_requirement=${1:-torch==2.13.0}
build_python=${BUILD_PYTHON:-.venv/bin/python}
test_python=${2:-$build_python}
export MMVMAMBA_WITH_CUDA=${MMVMAMBA_WITH_CUDA:-0}
# Tests that need csrc, configs or models, which a wheel alone has not.
needs_source_tree="test_cuda_emulated.py test_cuda_emulator.py test_cuda_plan.py test_dispatch_gpu_checks.py test_triton_compile.py test_triton_interpreter.py"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "[wheel 1/4] building with $build_python"
MMVMAMBA_BUILD=1 PATH="$(dirname "$build_python"):$PATH" \
  "$build_python" -m pip wheel . --quiet --no-deps --wheel-dir "$work"
wheel=$(ls "$work"/*.whl)
basename "$wheel"

echo "[wheel 2/4] checking the symbols"
case "$wheel" in
  *-cp310-abi3-*) ;;
  *) echo "check_wheel: the wheel is not tagged cp310-abi3" >&2; exit 1 ;;
esac
"$build_python" -m zipfile --extract "$wheel" "$work/unpacked"
for file in _C.abi3.so _C.json; do
  [ -f "$work/unpacked/mmvmamba/$file" ] || { echo "check_wheel: the wheel has no mmvmamba/$file" >&2; exit 1; }
done
# Mangled names in the namespaces at, c10 and torch belong to PyTorch's C++ interface, which changes with each release.
if nm -D --undefined-only "$work/unpacked/mmvmamba/_C.abi3.so" | grep -E '_ZN?K?(2at|3c10|5torch)'; then
  echo "check_wheel: the extension needs the unstable C++ symbols of PyTorch above" >&2
  exit 1
fi
nm -D --undefined-only "$work/unpacked/mmvmamba/_C.abi3.so" | grep -oE '\b(aoti_)?torch_\w+' | sort -u

echo "[wheel 3/4] installing it with $torch_requirement and nothing of the mm* packages"
"$test_python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$torch_requirement" numpy pytest "$wheel"
"$work/venv/bin/python" -m pip check

echo "[wheel 4/4] running the operator tests"
# Copied away, so that the installed package is tested and not this folder.
mkdir -p "$work/elsewhere/tests"
cp pyproject.toml "$work/elsewhere/"
cp tests/*.py "$work/elsewhere/tests/"
cp -r tests/test_ops "$work/elsewhere/tests/"
for file in $needs_source_tree; do rm "$work/elsewhere/tests/test_ops/$file"; done
cd "$work/elsewhere"
"$work/venv/bin/python" -c '
import sys, torch, mmvmamba
from mmvmamba.ops import available_backends
print("python", sys.version.split()[0], "torch", torch.__version__, mmvmamba.__file__)
print(available_backends())
assert "mmengine" not in sys.modules
assert available_backends()["compiled"].available'
"$work/venv/bin/python" -m pytest -q -m "not gpu" tests/test_ops
