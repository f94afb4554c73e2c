# `make demo` and `make test` need nothing but Python >= 3.10: they make the virtual environment first.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test check lint bench bench-gpu bench-faults audit

demo: .venv/installed
	$(BIN)/python -m demo.run

test: .venv/installed-dev lint ## lint and every test, file by file on two cores
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile

check: .venv/installed-dev lint ## lint and the fast tests, file by file on two cores
	OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n 2 --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed-dev
	$(BIN)/python -m benchmarks.run

bench-gpu: .venv/installed-dev ## on one GPU, ten minutes
	$(BIN)/python -m benchmarks.bench_gpu

audit: .venv/installed-dev ## what an H100 would launch, counted without one: three minutes, 3 GB
	$(BIN)/python -m benchmarks.cuda_audit

bench-faults: .venv/installed-dev ## kills and other disturbances, flipped bits, cut files, a long run: an hour
	$(BIN)/python -m benchmarks.bench_faults

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: expected Python 3.10 or newer, found %d.%d; set PYTHON=" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@
