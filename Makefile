# make demo   the whole path: export the demo model, verify it, segment held-out scenes
# make test   every test;  make quick  those that take seconds;  make lint  style, types and imports
# Each target does its own set-up; a second run redoes only what changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Byte code is compiled as modules are imported: for all of PyTorch it would be another 0.15 GB.
LEANPIP = $(PIP) --no-compile
DEMO   := out/demo
SOAK   := out/soak
# Three environments in one: what the demo needs, the compiler of its engine, and on top of it what the tests need.
LEAN   := $(VENV)/.installed-demo
RTX    := $(VENV)/.installed-rtx
STAMP  := $(VENV)/.installed
# Set it to the address of PyTorch's packages for CPUs to download 0.2 GB instead of 2.7 GB: an export uses no GPU.
TORCH_INDEX ?=
CUDA_COMPILER := $(addsuffix ==13.5.37,nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm)
# A test process that dies ends the run: restarted, xdist may wait for its tests for ever.
PYTEST  = $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

.PHONY: ptxas plugin-headers help setup setup-demo test quick soak lint demo demo-engine bench bench-export clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup-demo: $(LEAN) ## environment with what the demo needs, in $(VENV)

setup: $(STAMP) ## environment with every tested package, in $(VENV)

$(LEAN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: the pinned packages need Python 3.11 or newer; set PYTHON, for example PYTHON=python3.11")'
	@echo "== setting up $(VENV) for the demo, once: downloads about 0.33 GB (3 GB where PyTorch comes with CUDA) and takes"
	@echo "   1.1 GB on disk; a minute on a fast network. The demo itself then takes two to three minutes on two cores."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(LEANPIP) --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(LEANPIP) -e '.[export,cpu]'
	# PyTorch's wheel brings its own C++ tests: 0.13 GB that nothing runs.
	rm -rf $(VENV)/lib/python3*/site-packages/torch/test $(VENV)/lib/python3*/site-packages/torch/bin/test_*
	@touch $@

$(RTX): $(LEAN)
	@echo "== adding TensorRT-RTX, once: downloads 97 MB and takes 0.24 GB on disk"
	$(LEANPIP) --quiet -e '.[rtx]'
	@touch $@

$(STAMP): $(LEAN) $(RTX)
	@echo "== adding to $(VENV) what the tests need, once: 3 GB on disk together with the demo's packages"
	$(PIP) --quiet -e '.[export,cpu,openvino,rtx,serve,ray,test]'
	$(PIP) --quiet $(CUDA_COMPILER)
	# NVIDIA's API as type stubs; the package itself would fetch TensorRT.
	$(PIP) --quiet --no-deps tensorrt-stubs
	@touch $@

demo: setup-demo ## export the demo's model, verify it, segment scenes it has not seen, score it
	@mkdir -p $(DEMO)
	@echo "== 1/5 checkpoint to ONNX: one file for every size, and one of a fixed size without the rewrites"
	$(BIN)/export-onnx --ckpt examples/toy_street/toy_street.pth -o $(DEMO)/toy_street.onnx
	$(BIN)/export-onnx --ckpt examples/toy_street/toy_street.pth -o $(DEMO)/toy_street_plain.onnx --size 192x256 --plain
	@echo "== 2/5 verify the file, and compare the two"
	$(BIN)/internimage-deploy verify $(DEMO)/toy_street.onnx
	$(BIN)/internimage-deploy verify $(DEMO)/toy_street.onnx --against $(DEMO)/toy_street_plain.onnx
	@echo "== 3/5 paint 200 street scenes that the model has not seen"
	$(BIN)/python examples/toy_street/scenes.py $(DEMO)/scenes --count 200
	@echo "== 4/5 segment twenty of them"
	$(BIN)/internimage-deploy segment $(DEMO)/toy_street.onnx '$(DEMO)/scenes/images/10000[01]*.png' \
	  -o $(DEMO)/segmented --overlay --json
	@echo "== 5/5 score the model on all of them"
	$(BIN)/internimage-deploy evaluate $(DEMO)/toy_street.onnx --images $(DEMO)/scenes/images \
	  --labels $(DEMO)/scenes/labels --at-least 0.80
	@echo "== done. Look at the images in $(DEMO)/scenes/images and at $(DEMO)/segmented/*.overlay.png;"
	@echo "   *.labels.png hold the class ids, *.json the fraction of each class. make demo-engine compiles the model."

demo-engine: demo $(RTX) ## compile the demo's model with TensorRT-RTX, which needs no GPU and 0.24 GB more on disk
	@echo "== compile a float16 engine for GPUs of compute capability 8.6"
	$(BIN)/build-engine $(DEMO)/toy_street.onnx -o $(DEMO)/toy_street.engine --fp16 --backend tensorrt-rtx \
	  --compute-capability 8.6 --min 1x64x64 --opt 1x192x256 --max 4x384x512

test: setup ## every test
	@echo "== every test, on two processes: about a quarter of an hour on two quiet cores"
	$(PYTEST)

quick: setup ## the tests without those marked slow
	@echo "== the tests without the slow ones: under two minutes on two quiet cores"
	$(PYTEST) -m 'not slow'

soak: $(SOAK)/toy_street.onnx $(SOAK)/scenes ## load, faults and fuzzing of the service; writes benchmarks/results/serving.json
	@echo "== soak (on a quiet machine)"
	$(BIN)/python tools/soak.py --model $(SOAK)/toy_street.onnx --images $(SOAK)/scenes/images \
	  -o benchmarks/results/serving.json
	$(BIN)/python benchmarks/readme.py

$(SOAK)/toy_street.onnx: examples/toy_street/toy_street.pth $(wildcard exporter/*.py exporter/*/*.py) | $(STAMP)
	@mkdir -p $(SOAK)
	$(BIN)/export-onnx --ckpt $< -o $@

$(SOAK)/scenes: $(wildcard examples/toy_street/*.py) | $(STAMP)
	$(BIN)/python examples/toy_street/scenes.py $@ --count 32
	@touch $@

lint: setup ## ruff, mypy, the room rule, clang-format
	$(PIP) --quiet ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy -p internimage_deploy
	$(BIN)/python tools/check_imports.py
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

ptxas: setup ## registers and spills of every kernel on every GPU architecture; compare with the kept table
	$(BIN)/python benchmarks/ptxas.py --check

plugin-headers: setup ## the plugin's C++ against TensorRT's headers: TENSORRT_HEADERS="DIR...", one folder a release
	@test -n "$(TENSORRT_HEADERS)" || { echo 'error: set TENSORRT_HEADERS; docs/plugin.md says where headers come from'; exit 2; }
	$(BIN)/python tools/plugin_headers.py $(TENSORRT_HEADERS)

bench: setup ## speed of whole networks and operators; writes benchmarks/results and the README's tables
	@echo "== benchmarks (run them on a quiet machine)"
	$(PIP) --quiet matplotlib
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/profile_operators.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/readme.py

bench-export: setup ## time and memory of exporting the smallest and the largest models; needs 20 GB of memory
	@echo "== exports (run them on a quiet machine)"
	$(BIN)/python benchmarks/export.py

clean: ## remove the environment and everything built
	rm -rf $(VENV) out build
