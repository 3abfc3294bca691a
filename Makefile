# `make serve` runs the demo on the CPU, `make test` every test that needs nothing but Python, `make integration` those
# with Prometheus, a browser and JavaScript packages. Each sets up all it needs in .venv (.triton, .integration).

# 3.11 is the tested one. A name that does not answer (a pyenv shim without its version) is passed over.
PYTHON ?= $(or $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
  $(shell $(name) -c pass 2>/dev/null && echo $(name)))),python3.11)
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
TRITON := .triton

# OpenMP threads that wait asleep: with the default they spin, and a busy machine crawls.
export OMP_WAIT_POLICY := PASSIVE
# No test needs a C++ compiler: what vLLM would compile runs eagerly, as it does in `perft serve`.
test integration soak bench quality-check: export TORCHDYNAMO_DISABLE ?= 1

.PHONY: serve test check integration soak bench quality-check lock train clean

serve:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu
	@env -u OMP_WAIT_POLICY $(BIN)/python -m server.demo --port $(PORT)

# The kernels' tests, in Triton's interpreter, need one core for minutes: they run beside the others and are shown last.
test: check $(TRITON)/ready
	@mkdir -p build
	@PYTHONPATH=$(CURDIR)/$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton > build/triton.log 2>&1 & \
	  kernels=$$!; trap 'kill $$kernels 2> /dev/null' EXIT; trap 'exit 130' INT TERM; \
	  $(BIN)/python -m pytest tests; others=$$?; \
	  echo "perft: waiting for the kernels' tests (build/triton.log)"; wait $$kernels; kernels_are=$$?; \
	  cat build/triton.log; exit $$((others | kernels_are))

$(TRITON)/ready: requirements/triton.txt | check
	@echo "perft: installing requirements/triton.txt into $(TRITON) (0.2 GB to download)"
	@rm -rf $(TRITON)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --target $(TRITON) -r $< \
	  || { echo "perft: requirements/triton.txt could not be installed" >&2; exit 1; }
	@touch $@

check:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

integration:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test ray eval integration
	@$(BIN)/python integration/fetch.py
	@$(BIN)/python -m pytest integration

soak:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/python benchmarks/soak.py

# About 50 minutes on 2 cores. Each writes its numbers to benchmarks/results, from where benchmarks.page takes them.
BENCHMARKS := one_process.adapters over_http.streams one_process.neighbour one_process.plugin one_process.peers \
  one_process.growth one_process.swap over_http.registered over_http.shared_store over_http.viewers one_process.profile_step one_process.memory_floor \
  over_http.vllm_bench one_process.training routing

bench:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@for name in $(BENCHMARKS); do env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.$$name || exit 1; done
	@$(BIN)/python -m benchmarks.targets

# One tiny cell of docs/quality.md, end to end, in less than a minute; nothing is left behind but build/quality/check.
quality-check:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu test
	@$(BIN)/python -m benchmarks.quality check

train:
	@$(PYTHON) requirements/bootstrap.py $(VENV) cpu
	@$(BIN)/python -m server.demo.base
	@mkdir -p build
	@ln -sfn "$$($(BIN)/python -c 'from server.demo.base.build import default_folder as f; print(f())')" build/demo-base
	@for name in arithmetic pirate json; do \
	  $(BIN)/python -m server.demo.data $$name --output build/demo-data && \
	  $(BIN)/perft train --config server/demo/recipes/$$name.yaml --overwrite \
	    --base build/demo-base --base-name 'the demo base (server.demo.base)' \
	    --data build/demo-data/$$name.jsonl --validation build/demo-data/$$name-held-out.jsonl \
	    --output server/demo/adapters/$$name || exit 1; done

lock:
	@$(BIN)/python requirements/lock.py

clean:
	rm -rf $(VENV) $(TRITON) build *.egg-info
