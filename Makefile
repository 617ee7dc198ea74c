# make demo: train softmax and MoS side by side, about three minutes.   make test: the test suite.
# make test-quick: what to run after each edit, under a minute.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
LINT := $(VENV)-lint
DOCS := $(VENV)-docs
NATIVE_SOURCES := $(shell find csrc -type f)

# On a machine without a GPU the CPU build of torch is 200 MB; PyPI's is gigabytes of CUDA. The index that has it
# is only asked for torch itself; where it cannot be reached, pip takes the torch that it finds elsewhere.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
TORCH_OPTIONS = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 0)

# neighbours share set-ups: each process takes a run of neighbours, and steals from another when it is done
XDIST = -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-quick lint format types benchmark bench-check sanitize clean

demo: $(VENV)/installed
	$(PY) -m fused_mos.demo

test: $(VENV)/installed
	$(PY) -m pytest tests $(XDIST) -p no:benchmark

# the native kernels and the portable loop, without what takes long for another reason than they
test-quick: $(VENV)/installed
	$(PY) -m pytest tests $(XDIST) -p no:benchmark \
		-m "not slow and not interpreted and not processes and not compiles and not trains"

# seconds: its small environment holds the linters alone
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

# the documents as a site, in build/site: index.html opens without a server. Strict: a link that leads nowhere is an error.
# Docstrings are read, not imported, so its environment needs no torch.
.PHONY: docs
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# about fifteen minutes: times beside peers, into benchmarks/results/, and from there into the documents
benchmark: $(VENV)/peers-installed
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmark.json
	$(PY) -m benchmarks.report --record build/benchmark.json

# as long: a fresh run's ratios against the recorded ones; measures what fell by more than 10 % again, and names what did each time
bench-check: $(VENV)/peers-installed
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-json=build/bench-check.json
	$(PY) -m benchmarks.report --compare build/bench-check.json

# the native kernels under AddressSanitizer and UBSan: a copy of the package of its own, compiled so
sanitize: $(VENV)/installed
	FUSED_MOS_NATIVE=1 FUSED_MOS_SANITIZE=ON $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/sanitize .
	PYTHONPATH=build/sanitize ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(VENV)/bin/pytest -s -p no:cacheprovider tests/test_cpu.py tests/test_cpu_one_sweep.py tests/test_functional.py \
		tests/test_extreme_values.py tests/test_op_arguments.py tests/lm/test_cpu_recurrent.py

# the CPU kernels against loops in float64, without Python: a program of all instruction sets that this processor has
TOOLS := $(VENV)-tools
CONFIGURE = $(TOOLS)/bin/cmake --fresh -G Ninja -S . -DCMAKE_MAKE_PROGRAM=$(abspath $(TOOLS))/bin/ninja -DFUSED_MOS_SELF_TEST=ON
.PHONY: self-test
self-test: $(TOOLS)/installed
	$(CONFIGURE) -B build/self-test
	$(TOOLS)/bin/cmake --build build/self-test
	build/self-test/self_test $$(nproc)

# the same compiled by Clang, which here is Zig's: for another processor, which QEMU emulates, and for this one, where Zig's
# runtime does not know the processor and GCC's does
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

# a minute, once its environment is there: torch's CUDA wheel, without a GPU, is 5 GB. Fake CUDA tensors through all functions,
# which are also compiled and exported. torch is the version that the kernels were last run with on a GPU.
CUDA_VENV := $(VENV)-cuda
TORCH_CUDA ?= torch==2.11.0
.PHONY: check-cuda
check-cuda: $(CUDA_VENV)/installed
	$(CUDA_VENV)/bin/python -m pytest --confcutdir=tests/cuda_wheel tests/cuda_wheel

# what a user gets: a wheel in a fresh environment, imported from another folder. The environment takes the dependencies
# from $(VENV), where nvcc, if there is one, has compiled the CUDA kernels already.
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

# setuptools is left to torch, which may want an older one
$(CUDA_VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES) constraints.txt Makefile
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check "$(TORCH_CUDA)"
	grep -v ^setuptools constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CUDA_VENV)/constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(LINT) $(DOCS) $(TOOLS) $(CUDA_VENV) build *.egg-info
