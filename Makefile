# pyhyve: `make run` boots Debian in a shell, `make test` shows that it works. `make help` lists the rest.
#
# Everything is kept in .venv and built in place. Stamp files there remember what is done, so that a second run is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 60
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

VENV_STAMP := $(VENV)/.stamp-venv
DEPS_STAMP := $(VENV)/.stamp-dependencies
TEST_STAMP := $(VENV)/.stamp-test-dependencies
BUILD_STAMP := $(VENV)/.stamp-build
INSTALL_STAMP := $(VENV)/.stamp-install

NATIVE := $(shell find src -name '*.pyx' -o -name '*.pxd' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help run test lint format build fuzz-cpu fuzz-decode bench soak drift dist clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(INSTALL_STAMP) ## get a guest (Debian's kernel, busybox) and boot it: a shell, or a tour without a terminal
	@$(BIN)/pyhyve demo

test: lint ## lint, types, import rules and all tests
	@echo "make: running the tests"
	@$(BIN)/python -m pytest $(TESTS)

lint: $(INSTALL_STAMP) $(TEST_STAMP) ## ruff, mypy, import-linter
	@echo "make: checking style, types and imports"
	@$(BIN)/ruff check --quiet src tests bench tools setup.py
	@$(BIN)/ruff format --quiet --check src tests bench tools setup.py || \
		{ echo "make: some files are not formatted; 'make format' does it" >&2; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(TEST_STAMP) ## let ruff format the sources
	@$(BIN)/ruff format src tests bench tools setup.py

build: $(INSTALL_STAMP) ## build the processor and install the package into .venv

bench: $(INSTALL_STAMP) ## measure, beside QEMU where it is installed; writes bench/out/latest.json
	@$(BIN)/python bench/run.py $(BENCH)

fuzz-cpu: $(INSTALL_STAMP) ## compare random instructions with the host's processor, for MINUTES (5)
	@$(BIN)/python tests/fuzz --minutes $(if $(filter command line environment,$(origin MINUTES)),$(MINUTES),5) $(FUZZ)

fuzz-decode: $(INSTALL_STAMP) $(TEST_STAMP) ## compare the decoder with iced-x86, on BYTES (10 million) random instructions
	@$(BIN)/python tests/fuzz/decode.py $(if $(BYTES),--count $(BYTES)) $(FUZZ)

soak: $(INSTALL_STAMP) ## run a guest that checks itself, for MINUTES (60)
	@$(BIN)/python bench/soak.py --minutes $(MINUTES) $(SOAK)

drift: $(INSTALL_STAMP) ## hold guests' clocks against the host's under load, for MINUTES (10)
	@$(BIN)/python bench/drift.py --minutes $(if $(filter command line environment,$(origin MINUTES)),$(MINUTES),10) $(DRIFT)

dist: $(INSTALL_STAMP) ## sdist and wheel, in dist/
	@$(PIP) install build
	@$(BIN)/python -m build --no-isolation

clean: ## remove what was built
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	@find src -name '*.so' -delete -o -path '*/cpu/*' -name '*.c' -delete
	@find src tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f $(BUILD_STAMP) $(INSTALL_STAMP)

distclean: clean ## remove .venv too
	@rm -rf $(VENV)

$(VENV_STAMP):
	@tools/preflight.sh $(PYTHON)
	@echo "make: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEPS_STAMP): $(VENV_STAMP) pyproject.toml
	@echo "make: installing what pyhyve needs"
	@$(BIN)/python tools/requirements.py build run bench > $(VENV)/requirements.txt
	@$(PIP) install --requirement $(VENV)/requirements.txt
	@touch $@

$(TEST_STAMP): $(DEPS_STAMP)
	@echo "make: installing what the tests need"
	@$(BIN)/python tools/requirements.py test > $(VENV)/requirements-test.txt
	@$(PIP) install --requirement $(VENV)/requirements-test.txt
	@touch $@

$(BUILD_STAMP): $(DEPS_STAMP) setup.py $(NATIVE)
	@tools/preflight.sh $(BIN)/python
	@echo "make: building the processor (Cython and gcc, $(JOBS) at a time; a few minutes the first time)"
	@$(BIN)/python setup.py --quiet build_ext --inplace --parallel $(JOBS) > $(VENV)/build.log 2>&1 || \
		{ cat $(VENV)/build.log; echo "make: the build failed; its output is above" >&2; exit 1; }
	@touch $@

$(INSTALL_STAMP): $(BUILD_STAMP)
	@echo "make: installing pyhyve into $(VENV)"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q src/pyhyve
	@touch $@
