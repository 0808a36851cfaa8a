# make run     a small BERT, pre-trained on this machine's own documentation (installs what it needs into .venv first)
# make test    the test suite; PYTEST_ARGS='-x -k bert' are passed on ('-m long' are the tests that it leaves out)
# make check   format, lint, types and tests
# make format  let ruff rewrite what it can
# make venv    .venv with everything for development
#
# PYTHON names the interpreter that .venv is made with.
PYTHON ?= python3
PYTEST_ARGS ?=

BIN := .venv/bin
# pip's own progress bars where somebody watches, else its errors only
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input $(shell test -t 2 || echo --quiet)
PINS := pyproject.toml constraints.txt

.PHONY: run test check format venv
.DELETE_ON_ERROR:

run: .venv/.run
	@$(BIN)/python recipes/bert_pretrain.py

test: .venv/.dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

format: .venv/.dev
	@$(BIN)/ruff check --fix-only --exit-zero .
	@$(BIN)/ruff format .

venv: .venv/.dev

# Each step leaves a stamp only when it ended well, so that an interrupted one is done again and a finished one is not.
.venv/.made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d: dltrain needs 3.11 or newer (make PYTHON=/path/to/python3.x)" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: apt-get install python3-venv (Debian, Ubuntu), then again" >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# torch first and alone: it is the largest download, and the build that is chosen here (CPU or CUDA) is the one that every
# later step finds and keeps.
.venv/.torch: .venv/.made constraints.txt
	@echo "installing torch (the largest part, minutes on a slow line) ..."
	@$(PIP) install torch -c constraints.txt
	@touch $@

.venv/.run: .venv/.torch $(PINS)
	@echo "installing dltrain and what it runs on ..."
	@$(PIP) install -e . -c constraints.txt
	@touch $@

.venv/.dev: .venv/.torch $(PINS)
	@echo "installing dltrain, what it runs on and what it is tested with ..."
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@ .venv/.run
