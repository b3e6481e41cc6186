# make demo and make test do all set-up themselves; nothing else is needed first but Python 3.11+ and its venv module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
export PYTHONSAFEPATH := 1

.PHONY: demo test bench soak lint format clean setup
.DEFAULT_GOAL := test

setup: $(VENV)/.ready

# torch comes first and at the tested pin: anything that depends on it would otherwise choose its own build
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[examples]' \
		|| echo "no LangChain or LlamaIndex here: the tests of their examples are skipped"
	touch $@

demo: setup
	$(BIN)/kvtier demo

# two tests at a time, each with one thread for its tiny models
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# rows that compare with others need them: LMCACHE=an interpreter that has LMCache, BEFORE=a checkout of an older version
bench: setup
	for name in attention accuracy metadata policy inspect decode recovery ring host codecs tenants daemon prefix endless \
			sessions serve; do \
		$(BIN)/kvtier bench $$name --out benchmarks/results/$$name-cpu.json || exit 1; done
	$(BIN)/kvtier bench demo $(if $(BEFORE),--before $(BEFORE)) --out benchmarks/results/demo-cpu.json
	$(BIN)/kvtier bench nvme $(if $(LMCACHE),--lmcache $(LMCACHE)) --out benchmarks/results/nvme-cpu.json
	$(BIN)/kvtier bench metadata --scale --out benchmarks/results/metadata-scale-cpu.json
	$(BIN)/kvtier bench kernels --aot --out benchmarks/results/kernels-aot.json

soak: setup
	$(BIN)/python -m pytest -q -m soak

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
