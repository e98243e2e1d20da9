# `make demo`: the main job on real input. `make test`: all that CI runs. `make check`: its fast part, within a minute.
# Each sets up its own environment first.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Where this is set, every process compiles all that it imports: forty seconds for each of the three of an engine.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check lint lock clean

# The CPU target, complete and hashed, without dependencies of its own choosing: see requirements/without-vision.txt.
.venv/.installed: requirements/cpu.txt pyproject.toml
	@echo "Setting up .venv (about two minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "The hashed requirements are for Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --no-deps --require-hashes --no-compile -r requirements/cpu.txt \
	  || { echo "pip could not install requirements/cpu.txt. Where it did not find torch 2.13.0+cpu, add PyTorch's index of CPU" \
	       "wheels (named on pytorch.org under 'Get started') with PIP_EXTRA_INDEX_URL and run make again."; exit 1; }
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation ./requirements/vllm-name --editable .
	@touch $@

lint: .venv/.installed
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache

# Trains on the standard library's source, fits, serves, asks; a second run reuses what is there. Figures: build/demo/figures.json
demo: .venv/.installed
	@mkdir -p build/demo
	@$(BIN)/python bench/demo.py build/demo

# What tests run for real and pip does not have. Debian's packages, installed where that is allowed.
.PHONY: tools
tools:
	@missing=; for tool in redis-server openssl chromium prometheus node npm; do \
	  command -v $$tool >/dev/null || missing="$$missing $${tool/%node/nodejs}"; done; \
	  [ -z "$$missing" ] && exit 0; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null 2>&1 \
	    || { echo "Tests need$$missing: install the packages of that name and run make again."; exit 1; }

# What looks at the chart and the Dockerfile from outside: two Helms, schemas, models. In an environment of its own, pinned and hashed.
build/charts/.installed: requirements/charts/requirements.txt requirements/charts/package-lock.json | tools
	@echo "Setting up build/charts (half a minute, once)"
	@rm -rf build/charts && mkdir -p build/charts
	@$(PYTHON) -m venv build/charts/venv
	@build/charts/venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/charts/requirements.txt
	@cp requirements/charts/package.json requirements/charts/package-lock.json build/charts/
	@cd build/charts && npm ci --silent --no-fund --no-audit
	@touch $@

# The chart's README from its values, then lint, render and check it in every way that needs no engine.
.PHONY: charts
charts: .venv/.installed build/charts/.installed
	@$(BIN)/python charts/readme.py
	@$(BIN)/pytest tests/charts --ignore tests/charts/test_live.py

# The tests that start no engine and no server, for each change.
check: .venv/.installed
	@$(BIN)/pytest @tests/check.txt

# All that CI runs.
test: lint tools build/charts/.installed
	@$(BIN)/pytest

# Resolve the requirements again; needs uv on the path, and pip's own settings for where torch's CPU wheels are.
lock:
	@uv pip compile requirements/cpu.in --override requirements/without-vision.txt --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header -o requirements/cpu.txt
	@for each in gateway engine-cpu engine-cuda image-build; do \
	  uv pip compile requirements/$$each.in $$([ $$each = engine-cuda ] || echo --constraint requirements/cpu.txt) \
	    $$([ $$each != engine-cpu ] || echo --override requirements/without-vision.txt) --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header -o requirements/$$each.txt; done
	@uv pip compile requirements/charts/requirements.in --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --generate-hashes --no-annotate --no-header -o requirements/charts/requirements.txt
	@cd requirements/charts && npm install --package-lock-only --silent

clean:
	@rm -rf .venv build
