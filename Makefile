# `make serve` runs the demo on the CPU, `make test` every test that needs Python alone, `make integration` those with
# Prometheus and the JavaScript client. Each sets up all it needs in .venv (and .integration).

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3.11)
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin

# OpenMP threads that wait asleep: with the default they spin, and a busy machine crawls.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: serve test check integration soak bench lock train clean

serve:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu
	@env -u OMP_WAIT_POLICY $(BIN)/python -m server.demo --port $(PORT)

test: check
	@$(BIN)/python -m pytest tests

check:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

integration:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/python integration/fetch.py
	@$(BIN)/python -m pytest integration

soak:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/python benchmarks/soak.py

bench:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/throughput.py

train:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu
	@env -u OMP_WAIT_POLICY $(BIN)/python -m server.demo.train all

lock:
	@$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV) build *.egg-info
