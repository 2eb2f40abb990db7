# Everything runs from .venv, which is made on the spot; a second call does nothing that was done.
#   PYTHON       the Python to make .venv with (3.11 or newer)
#   TORCH_INDEX  a package index to take torch from, e.g. PyTorch's own for CPU builds (smaller on Linux)

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' requirements/lock.txt)
FOLDERS := checkpoints engine kernels server training

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-gpu test-slow check format bench bench-gpu bench-gpu-http experiments load clean

help:
	@echo "make demo      read 600 KB, answer from memory, survive kill -9: the whole in four minutes"
	@echo "make serve     start the server on 127.0.0.1 with the shipped checkpoint"
	@echo "make test      the default test suite (installs redis-server where it is missing)"
	@echo "make check     format, lint, types"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-slow the tests that take minutes"
	@echo "make bench     measure ingest, beside titans-pytorch, and constancy on this machine"
	@echo "make bench-gpu a CUDA device beside what it could do: ingest, decode, switching, peers"
	@echo "make bench-gpu-http what the server adds to an engine on a CUDA device"
	@echo "make experiments  measure what the papers claim, with tables and figures (ten minutes)"
	@echo "make load      a minute of locust against a server that runs (URL=http://127.0.0.1:8000)"
	@echo "make format    rewrite the files as make check wants them"

demo: $(VENV)/.installed
	@$(BIN)/python loadtests/demo.py $(ARGS)

serve: $(VENV)/.installed
	@$(BIN)/mnemosyne serve $(ARGS)

test: $(VENV)/.dev
	@sh requirements/redis-server.sh
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd loadtests && ../$(BIN)/mypy --config-file ../pyproject.toml *.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench
	@$(BIN)/python loadtests/bench.py $(ARGS)

bench-gpu: $(VENV)/.bench
	@$(BIN)/python loadtests/bench_gpu.py $(ARGS)

bench-gpu-http: $(VENV)/.bench
	@$(BIN)/python loadtests/bench_gpu_http.py $(ARGS)

experiments: $(VENV)/.experiments
	@$(BIN)/python -m mnemosyne.training.experiments $(ARGS)

load: $(VENV)/.load
	@$(BIN)/locust -f loadtests/locustfile.py --headless --only-summary \
	  --host $(or $(URL),http://127.0.0.1:8000) --users 4 --spawn-rate 2 --run-time 60s $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Mnemosyne needs Python 3.11 or newer; name one with make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python3 -m venv failed; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install --upgrade pip
	@touch $@

# torch first and pinned: an unpinned one brings gigabytes for another device.
# Editable for the metadata and the command; the links beside it are what lets type checkers, which don't run import
# hooks, see the folders as mnemosyne.*, and new files appear at once.
$(VENV)/.installed: $(VENV)/.python pyproject.toml requirements/lock.txt
	@echo "installing $(TORCH) and the rest (a few minutes the first time)"
	@$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c requirements/lock.txt
	@$(PIP) install -e . -c requirements/lock.txt
	@packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  mkdir -p "$$packages/mnemosyne" && \
	  for folder in $(FOLDERS); do ln -sfn "$(CURDIR)/$$folder" "$$packages/mnemosyne/$$folder"; done
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing what the tests and checks need"
	@$(PIP) install -e '.[dev]' -c requirements/lock.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	@echo "installing what the bench needs, and titans-pytorch to compare with"
	@$(PIP) install -e '.[bench]' -c requirements/lock.txt
	@$(PIP) install -e '.[peer]' -c requirements/lock.txt || \
	  echo "titans-pytorch can't be installed: the bench leaves it out (rm $@ to try again)" >&2
	@touch $@

$(VENV)/.experiments: $(VENV)/.installed
	@$(PIP) install -e '.[experiments]' -c requirements/lock.txt
	@touch $@

$(VENV)/.load: $(VENV)/.installed
	@$(PIP) install -e '.[load]' -c requirements/lock.txt
	@touch $@
