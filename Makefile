# Each target is enough on a fresh clone of a Linux machine with Python 3.11 and make.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: install quickstart test lint paper-table figures clean

install: $(VENV)/.installed

# constraints.txt holds the tested versions; a plain torch would bring gigabytes of CUDA packages.
$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: install
	$(BIN)/python -m lightning_rlvr fit --config configs/quickstart.yaml --run_dir $(RUN)

# Tables and figures of every study that is kept with its curves.
figures: install
	set -e; for study in $(dir $(wildcard experiments/results/*/training.parquet)); do \
		$(BIN)/python -m lightning_rlvr report $$study; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each: two of two threads slow each other down on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadscope --durations 30

# The paper's table in small, on two puzzles: over an hour on two cores. Started again, it goes on where it stopped.
paper-table: install
	set -e; for name in paper_table paper_table_make_number; do \
		$(BIN)/python -m lightning_rlvr sweep experiments/$$name.yaml; \
		$(BIN)/python -m lightning_rlvr report runs/$$name; done

clean:
	rm -rf $(VENV) build *.egg-info
