# Thin on purpose: the set-up is scripts/bootstrap.py, everything else one command.
PYTHON ?= python3
# Processes that share the tests of `make test`, a file of tests each at a time.
TEST_JOBS ?= 2
# Files that take minutes go first, so that no process waits at the end for another one.
LONG_TESTS := tests/test_tools tests/test_configs tests/test_docs tests/test_deployment
PY := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo app docs test test-slow test-gpu check-gpu-code lint format bench bench-gpu bench-gate sanitize clean

help:
	@echo "make install   create .venv with the pinned stack and the compiled extension (the other targets do this first);"
	@echo "               needs, on Debian: apt-get install python3 python3-venv python3-dev g++ make"
	@echo "make demo      train, test and draw a VMamba classifier, detector and segmentor (QUICK=1: a short run)"
	@echo "make test      all tests that need no GPU, in two processes (TEST_JOBS=4: in four)"
	@echo "make test-slow the tests that take too long for every change, such as 50 trainings that are killed and resumed"
	@echo "make test-gpu  the tests that need a CUDA GPU"
	@echo "make check-gpu-code   compile the CUDA and Triton kernels without a GPU and judge their machine code; needs nvcc"
	@echo "make lint      ruff, mypy, shellcheck and clang-format, changing nothing"
	@echo "make format    let ruff and clang-format rewrite the files"
	@echo "make app       the demo as a page in the browser, on http://127.0.0.1:7860"
	@echo "make docs      the documentation as web pages, in build/docs/index.html; warnings are errors"
	@echo "make bench     time the operators at 224x224 against the reference and upstream's path (the rest: benchmarks/README.md)"
	@echo "make bench-gpu the same on a CUDA GPU, bfloat16 (all of it in one go: scripts/gpu_session.py)"
	@echo "make bench-gate   fail if an operator lost speed against a GEMM and the reference (about half a minute)"
	@echo "make sanitize  run the kernels on 100,000 random inputs under ASan and UBSan (COUNT=1000: fewer); needs only g++"
	@echo "make clean     remove what builds and tools leave behind (keeps .venv, data and work_dirs)"

install:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "mmvmamba setup: there is no $(PYTHON): install Python 3.10 or newer (Debian: apt-get install python3 python3-venv python3-dev)"; \
	  exit 1; }
	@$(PYTHON) scripts/bootstrap.py

demo: install
	$(PY) tools/demo.py $(if $(filter 1,$(QUICK)),--quick)

app: install
	$(PY) demo/app.py

test: install
	$(PY) -m pytest -q -m "not gpu and not soak" --durations=15 -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(LONG_TESTS) $(filter-out $(LONG_TESTS),$(wildcard tests/test_*))

test-slow: install
	$(PY) -m pytest -q -m soak --durations=15 tests

test-gpu: install
	$(PY) -m pytest -q -m gpu --durations=15 tests

docs: install
	$(PY) scripts/make_docs.py --check
	$(PY) -m sphinx -q -W --keep-going -n -b html docs build/docs
	@echo "build/docs/index.html"

check-gpu-code: install
	$(PY) scripts/check_cuda.py --require-nvcc
	$(PY) scripts/check_triton.py --hot

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/shellcheck -x -P . tools/*.sh scripts/*.sh
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cc' -o -name '*.hh' | xargs .venv/bin/clang-format --dry-run -Werror

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cc' -o -name '*.hh' | xargs .venv/bin/clang-format -i

bench: install
	$(PY) -m benchmarks.ops --shapes 224

bench-gpu: install
	$(PY) -m benchmarks.ops --device cuda --dtype bfloat16 --shapes 224 512 800x1216

bench-gate: install
	$(PY) -m benchmarks.gate

sanitize:
	scripts/sanitize.sh $(COUNT)

clean:
	rm -rf build dist *.egg-info mmvmamba/_C.*.so mmvmamba/_C.json .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
