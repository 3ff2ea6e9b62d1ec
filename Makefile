# vggedge. `make` alone lists what there is; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
CLAIMS := parameters_and_time local_response_normalization one_by_one depth multi_scale vanishing_gradients

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format claims clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## train, export, prove, answer and benchmark a compact VGG-16 (about a minute); results in demo/
	$(BIN)/python examples/demo.py

test: $(READY) ## the whole CPU test suite
	$(BIN)/python -m pytest -m "not gpu"

test-fast: $(READY) ## the tests without those that take longer than half a minute
	$(BIN)/python -m pytest

check: $(READY) ## style, types and import rules: ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY) ## let ruff put imports and layout right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

claims: $(READY) ## study what the VGG papers claim, anew (half an hour to an hour on two cores); results in benchmarks/claims/
	@for study in $(CLAIMS); do echo "$$study ..."; $(BIN)/python benchmarks/claims/$$study.py || exit 1; done
	$(BIN)/python benchmarks/claims/summary.py

clean: ## remove .venv, demo/ and caches
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "training and export need Python 3.11 to 3.13, $(PYTHON) is %d.%d; use: make PYTHON=python3.12" % v)'
	@echo "Installing into $(VENV) (TensorFlow, ONNX, TensorRT-RTX: 3.2 GB on disk, one to four minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,export,ort,rtx,dev]'
	@touch $@
