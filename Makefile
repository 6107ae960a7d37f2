# Everything from a fresh clone, in .venv: `make demo` to see it work, `make test` before every commit.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS ?=

# torch goes in first and by itself, so that a site can choose its build. A wheel that pip finds locally
# (PIP_FIND_LINKS) is taken; else what CPU_INDEX has, where it is set; else what pip's own index has, which on x86-64
# brings CUDA packages of some 3 GB. PyTorch's page "Get Started" names its CPU index:  make demo CPU_INDEX=URL
CPU_INDEX ?=
ifeq ($(shell uname -m),aarch64)
TORCH ?= 'torch>=2.8,<2.11'
else
TORCH ?= torch==2.13.0
endif

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test lint arm64 sbom clean mosquitto
.NOTPARALLEL:

help: ## print this
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-6s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## run a whole federation on this machine: tundish demo $(ARGS)
	@$(BIN)/tundish demo $(ARGS)

test: $(VENV)/.test mosquitto lint ## lint, then every test
	@$(BIN)/python -m pytest -n 3 --dist loadfile

lint: $(VENV)/.test ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

arm64: $(VENV)/.demo ## build the arm64 image, score a window and start a gateway inside (root; EXTRAS='[train]' trains)
	@PYTHON='$(BIN)/python' EXTRAS='$(EXTRAS)' tests/arm64.sh

# Of an environment of its own: what a gateway installs, and nothing of the tests'.
sbom: $(VENV)/.test ## write build/sbom.cdx.json: every package that a gateway installs, and its version (CycloneDX)
	@rm -rf build/sbom && $(PYTHON) -m venv build/sbom
	@build/sbom/bin/python -m pip --disable-pip-version-check --quiet install '.$(EXTRAS)'
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.cdx.json build/sbom/bin/python
	@echo "build/sbom.cdx.json"

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made anew when pyproject.toml changes; else the stamps make a second run immediate.
$(VENV)/.demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is not Python 3.11 or newer; say PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) has no venv module: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "make: installing into $(VENV); torch first, which takes some minutes" >&2
	@$(PIP) install --no-index --no-deps $(TORCH) 2>/dev/null \
	  || $(PIP) install $(if $(CPU_INDEX),--index-url $(CPU_INDEX)) $(TORCH)
	@$(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "make: installing the tests' tools into $(VENV)" >&2
	@$(PIP) install -e '.[test]'
	@touch $@

mosquitto:
	@if command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then root=none; \
	elif test "$$(id -u)" = 0; then root=; \
	elif sudo -n true 2>/dev/null; then root="sudo -n"; \
	else root=none; fi; \
	if test "$$root" = none; then \
	  echo "make: Mosquitto is missing and can't be installed without root: its tests will be skipped" >&2; \
	else \
	  $$root apt-get update -q >&2 && $$root env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -q --no-install-recommends mosquitto >&2 \
	  || echo "make: Mosquitto could not be installed: its tests will be skipped" >&2; \
	fi
