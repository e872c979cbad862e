# make demo    trains a small teacher, distils it three ways, prints a table (about three minutes on two cores)
# make test    the whole test suite
# make bench   objective and training step beside the published code and plain PyTorch (about five minutes)
# make fuzz    ten minutes of calls drawn at random; counts them in benchmarks/results and docs/reliability.md
# make tables  the tables in README and docs anew, from the files under benchmarks/results and by counting
# make docs    the API's pages, from docstrings, in site/
# make lint    ruff
# Each target first makes .venv, once. PYTHON=... picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test bench fuzz tables docs lint

demo: $(INSTALLED)
	$(BIN)/lad-fast demo

# The pytest command, never the module run by python: that would put this folder on sys.path,
# where kernels/ hides Hugging Face's kernels.
test: $(INSTALLED)
	$(BIN)/pytest --numprocesses=auto $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks $(PYTEST_ARGS)

fuzz: $(INSTALLED)
	LAD_FAST_FUZZ_SECONDS=600 $(BIN)/pytest tests/test_fuzz.py $(PYTEST_ARGS)
	$(BIN)/python benchmarks/reliability.py

tables: $(INSTALLED)
	$(BIN)/python benchmarks/bench_record.py readme
	$(BIN)/python benchmarks/newcomer.py readme
	$(BIN)/python benchmarks/int8.py readme
	$(BIN)/python benchmarks/real_data.py readme
	$(BIN)/python benchmarks/study.py readme
	$(BIN)/python benchmarks/kernel_counts.py --write docs/kernels.md
	$(BIN)/python benchmarks/reliability.py

docs: $(INSTALLED)
	$(BIN)/pdoc --docformat google --output-directory site lad_fast lad_fast.objective lad_fast.training lad_fast.step lad_fast.strategies lad_fast.integrations lad_fast.models lad_fast.published lad_fast.glue lad_fast.data

lint: $(INSTALLED)
	$(BIN)/ruff check .

# torch goes first and alone: pip then takes a local CPU build where one is offered, and not CUDA's 3 GB beside it.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[glue,report,bench,test,dev]'
	touch $@
