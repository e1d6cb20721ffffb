# make demo   the whole path: export the demo model, verify it, segment held-out scenes
# make test   every test;  make lint  style and types
# Each target does its own set-up; a second run redoes only what changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := out/demo
SOAK   := out/soak

.PHONY: ptxas help setup test soak lint demo bench bench-export clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## environment with every tested package, in $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (packages pinned by constraints.txt)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,cpu,openvino,plugin,rtx,serve,ray,test]'
	# NVIDIA's API as type stubs; the package itself would fetch TensorRT.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt tensorrt-stubs
	@touch $@

demo: setup ## export the demo's model, verify it, segment scenes it has not seen, score it
	@mkdir -p $(DEMO)
	@echo "== 1/6 checkpoint to ONNX: one file for every size, and one of a fixed size without the rewrites"
	$(BIN)/export-onnx --ckpt examples/toy_street/toy_street.pth -o $(DEMO)/toy_street.onnx
	$(BIN)/export-onnx --ckpt examples/toy_street/toy_street.pth -o $(DEMO)/toy_street_plain.onnx --size 192x256 --plain
	@echo "== 2/6 verify the file, and compare the two"
	$(BIN)/internimage-deploy verify $(DEMO)/toy_street.onnx
	$(BIN)/internimage-deploy verify $(DEMO)/toy_street.onnx --against $(DEMO)/toy_street_plain.onnx --size 192x256
	@echo "== 3/6 paint street scenes that the model has not seen"
	$(BIN)/python examples/toy_street/scenes.py $(DEMO)/scenes --count 16
	@echo "== 4/6 segment them"
	$(BIN)/internimage-deploy segment $(DEMO)/toy_street.onnx $(DEMO)/scenes/pictures -o $(DEMO)/segmented --overlay --json
	@echo "== 5/6 score the model on 200 scenes that it has not seen"
	$(BIN)/python examples/toy_street/evaluate.py $(DEMO)/toy_street.onnx --count 200 --at-least 0.80
	@echo "== 6/6 compile a float16 engine for GPUs of compute capability 8.6 (TensorRT-RTX; no GPU is needed for that)"
	$(BIN)/build-engine $(DEMO)/toy_street.onnx -o $(DEMO)/toy_street.engine --fp16 --backend tensorrt-rtx \
	  --compute-capability 8.6 --min 1x64x64 --opt 1x192x256 --max 4x384x512
	@echo "== done. Look at the pictures in $(DEMO)/scenes/pictures and at $(DEMO)/segmented/*.overlay.png;"
	@echo "   *.labels.png hold the class numbers, *.json the share of each class."

test: setup ## every test
	@echo "== tests"
	$(BIN)/python -m pytest

soak: $(SOAK)/toy_street.onnx $(SOAK)/scenes ## load, faults and fuzzing of the service; writes benchmarks/results/serving.json
	@echo "== soak (on a quiet machine)"
	$(BIN)/python tools/soak.py --model $(SOAK)/toy_street.onnx --pictures $(SOAK)/scenes/pictures \
	  -o benchmarks/results/serving.json
	$(BIN)/python benchmarks/readme.py

$(SOAK)/toy_street.onnx: examples/toy_street/toy_street.pth $(wildcard exporter/*.py exporter/*/*.py) | $(STAMP)
	@mkdir -p $(SOAK)
	$(BIN)/export-onnx --ckpt $< -o $@

$(SOAK)/scenes: $(wildcard examples/toy_street/*.py) | $(STAMP)
	$(BIN)/python examples/toy_street/scenes.py $@ --count 32
	@touch $@

lint: setup ## ruff, mypy, clang-format
	$(BIN)/python -m pip install --quiet -c constraints.txt ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy -p internimage_deploy
	$(BIN)/python tools/check_imports.py
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

ptxas: setup ## registers and spills of every kernel on every GPU architecture; compare with the kept table
	$(BIN)/python benchmarks/ptxas.py --check

bench: setup ## speed of whole networks and operators; writes benchmarks/results and the README's tables
	@echo "== benchmarks (run them on a quiet machine)"
	$(BIN)/python -m pip install --quiet -c constraints.txt matplotlib
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/profile_operators.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/readme.py

bench-export: setup ## time and memory of exporting the smallest and the largest model; needs 12 GB of memory
	@echo "== exports (run them on a quiet machine)"
	$(BIN)/python benchmarks/export.py

clean: ## remove the environment and everything built
	rm -rf $(VENV) out build
