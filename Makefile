# make demo: make an environment, then train a softmax and a MoS: about three minutes on two cores.
# make test: run the test suite.   make test-quick: run the fast tests, in under a minute.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
LINT := $(VENV)-lint
DOCS := $(VENV)-docs
NATIVE_SOURCES := $(shell find csrc -type f)

# Without a GPU, take the CPU build of torch (200 MB) from PyTorch's index instead of gigabytes of CUDA from PyPI.
# Only torch itself is installed from there. If the index cannot be reached, pip falls back to PyPI.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
TORCH_OPTIONS = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 0)

# neighbouring tests share fixtures: each process runs a range of neighbours, then steals from others
XDIST = -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-quick lint format types benchmark bench-check sanitize clean

demo: $(VENV)/installed
	$(PY) -m fused_mos.demo

test: $(VENV)/installed
	$(PY) -m pytest tests $(XDIST) -p no:benchmark

# the native and tiled backends, without tests that are slow for other reasons
test-quick: $(VENV)/installed
	$(PY) -m pytest tests $(XDIST) -p no:benchmark \
		-m "not slow and not interpreted and not processes and not compiles and not trains"

# takes seconds: its environment has only the linters
lint: $(LINT)/installed
	$(LINT)/bin/ruff check --quiet .
	$(LINT)/bin/ruff format --quiet --check .
	$(LINT)/bin/clang-format --dry-run --Werror $(NATIVE_SOURCES)

format: $(LINT)/installed
	$(LINT)/bin/ruff check --quiet --fix .
	$(LINT)/bin/ruff format --quiet .
	$(LINT)/bin/clang-format -i $(NATIVE_SOURCES)

types: $(VENV)/installed
	$(VENV)/bin/mypy

# builds the documents as a site, in build/site: index.html opens without a server. A broken link is an error. Docstrings are
# read, not imported, so this environment needs no torch.
.PHONY: docs
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# measures this package and its peers in about fifteen minutes; records the times, and updates the documents' tables
benchmark: $(VENV)/peers-installed
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmark.json
	$(PY) -m benchmarks.report --record build/benchmark.json

# compares a fresh run's ratios with the recorded ones, in as long; measures any drop above 10 % again, and reports it
# if it persists
bench-check: $(VENV)/peers-installed
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=build/bench-check.json
	$(PY) -m benchmarks.report --compare build/bench-check.json

# tests the native kernels under AddressSanitizer and UBSan, in a separate copy of the package
sanitize: $(VENV)/installed
	FUSED_MOS_NATIVE=1 FUSED_MOS_SANITIZE=ON $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/sanitize .
	PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(VENV)/bin/pytest -s -p no:cacheprovider tests/test_cpu.py tests/test_cpu_one_sweep.py tests/test_functional.py \
		tests/test_extreme_values.py tests/test_op_arguments.py tests/lm/test_cpu_recurrent.py

# checks the CPU kernels against float64 loops without Python, for all instruction sets of this processor
TOOLS := $(VENV)-tools
CONFIGURE = $(TOOLS)/bin/cmake --fresh -G Ninja -S . -DCMAKE_MAKE_PROGRAM=$(abspath $(TOOLS))/bin/ninja -DFUSED_MOS_SELF_TEST=ON
.PHONY: self-test
self-test: $(TOOLS)/installed
	$(CONFIGURE) -B build/self-test
	$(TOOLS)/bin/cmake --build build/self-test
	build/self-test/self_test $$(nproc)

# the same compiled by Clang (from Zig): for aarch64, run under QEMU, and for this processor, with GCC's runtime library,
# since Zig's cannot detect the processor
ZIG_CXX = $(abspath $(TOOLS))/bin/python -m ziglang c++
AARCH64_CXX ?= $(ZIG_CXX) -target aarch64-linux-musl
QEMU_AARCH64 ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)
.PHONY: self-test-aarch64 self-test-clang
self-test-aarch64: $(TOOLS)/installed
	@test -n "$(QEMU_AARCH64)" || { echo "There is no qemu-aarch64 on the PATH: install it (Debian: apt install qemu-user) or set QEMU_AARCH64" >&2; exit 1; }
	CXX="$(AARCH64_CXX)" $(CONFIGURE) -B build/self-test-aarch64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
	$(TOOLS)/bin/cmake --build build/self-test-aarch64
	$(QEMU_AARCH64) build/self-test-aarch64/self_test

self-test-clang: $(TOOLS)/installed
	CXX="$(ZIG_CXX) -mcpu=baseline" $(CONFIGURE) -B build/self-test-clang -DCMAKE_EXE_LINKER_FLAGS="$$(gcc -print-libgcc-file-name)"
	$(TOOLS)/bin/cmake --build build/self-test-clang
	build/self-test-clang/self_test

# runs, compiles and exports all functions on fake CUDA tensors, without a GPU. It takes a minute, after installing
# torch's CUDA wheel (5 GB). TORCH_CUDA is the version with which the kernels last ran on a GPU.
CUDA_VENV := $(VENV)-cuda
TORCH_CUDA ?= torch==2.11.0
.PHONY: check-cuda
check-cuda: $(CUDA_VENV)/installed
	$(CUDA_VENV)/bin/python -m pytest --confcutdir=tests/cuda_wheel tests/cuda_wheel

# builds a wheel, installs it in a fresh environment, and imports it from another folder, as a user would. Dependencies
# come from $(VENV). It skips the CUDA kernels, which nvcc, if there is one, has already compiled for $(VENV).
.PHONY: wheel-check
wheel-check: $(VENV)/installed
	rm -rf build/wheel-check build/lib*
	FUSED_MOS_NATIVE=1 CUDACXX=none $(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel-check .
	$(PY) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/pip install --quiet --disable-pip-version-check --no-deps build/wheel-check/*.whl
	cd build/wheel-check/venv && $(abspath $(PY)) -c "import sysconfig; print(sysconfig.get_path('platlib'))" > $$(bin/python -c "import sysconfig; print(sysconfig.get_path('platlib'))")/dependencies.pth
	cd build/wheel-check/venv && bin/python ../../../tests/installed.py && bin/python -m fused_mos.train --help > /dev/null

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES) constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH_OPTIONS) "$(TORCH)"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,types]"
	touch $@

$(LINT)/installed: constraints.txt
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt ruff clang-format
	touch $@

$(DOCS)/installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	touch $@

$(TOOLS)/installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt cmake ninja ziglang
	touch $@

$(VENV)/peers-installed: $(VENV)/installed
	mkdir -p build
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps cut-cross-entropy liger-kernel
	touch $@

# without our version of setuptools: this torch may need an older one
$(CUDA_VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES) constraints.txt Makefile
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH_CUDA)"
	grep -v ^setuptools constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CUDA_VENV)/constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(LINT) $(DOCS) $(TOOLS) $(CUDA_VENV) build *.egg-info
