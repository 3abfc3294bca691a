# `make serve` runs the demo on the CPU, `make test` every test that needs nothing but Python, `make integration` those
# with Prometheus and the JavaScript client. Each sets up all it needs in .venv (and .integration).

# 3.11 is the tested one. A name that does not answer (a pyenv shim without its version) is passed over.
PYTHON ?= $(or $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
  $(shell $(name) -c pass 2>/dev/null && echo $(name)))),python3.11)
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin

# OpenMP threads that wait asleep: with the default they spin, and a busy machine crawls.
export OMP_WAIT_POLICY := PASSIVE
# No test needs a C++ compiler: what vLLM would compile runs eagerly, as it does in `perft serve`.
test integration soak bench: export TORCHDYNAMO_DISABLE ?= 1

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
	@env -u OMP_WAIT_POLICY $(BIN)/python -m server.demo.training all

lock:
	@$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV) build *.egg-info
