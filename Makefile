# Two commands do everything, on a machine with Python >= 3.11, g++, make and perl:
#   make train    sets up, builds the simulated chip, trains on it
#   make test     sets up, passes the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test bench fuzz nightly synth baseline gatesim lint setup docs clean

train: setup
	$(BIN)/systolith train digits --device rtl --config small

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Utilization on the RTL at N = 16, the error of products over K, the speed of the simulation, the
# bandwidth of DMA, the kernel library at N = 8, engines side by side and the ULP of functions; writes
# docs/performance.md, docs/accuracy.md, docs/simulation.md, docs/dma.md, docs/engines.md,
# docs/activation-accuracy.md and the figures of docs/kernel-library.md and docs/tutorial.md.
bench: setup
	$(BIN)/python benchmarks/gemm.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/dma.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python -m systolith.golden.accuracy

# 30 million cases of the floating-point cells against SoftFloat, more vectors in the benches of
# cells, checks of the largest presets, and the fuzzer; writes docs/softfloat.md.
nightly: fuzz
	$(BIN)/python benchmarks/softfloat.py
	SYSTOLITH_VECTORS=1000000 $(BIN)/python -m pytest -n 2 tests/hdl/test_arith.py \
		tests/hdl/test_narrow.py tests/hdl/test_integer.py tests/tb/test_tensor.py
	SYSTOLITH_PRESETS=medium-fp8,large,trn $(BIN)/python -m pytest tests/hdl/test_synthesis.py

# Thousands of random programs, gates against golden model; writes docs/fuzz.md.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py

# FPGA reports into docs/reports, and the sizes in docs/board.md; more than an hour the first time,
# on an idle machine. A design that does not fit ends its command with an error, and its report is
# there all the same.
synth: setup
	-$(BIN)/systolith synth --config nano --pnr --out docs/reports/nano
	-$(BIN)/systolith synth --config small --no-gates --out docs/reports/small
	-$(BIN)/systolith synth --config medium --no-gates --out docs/reports/medium
	-$(BIN)/systolith synth --board ulx3s --config tiny --no-gates --seeds 2 \
		--out docs/reports/tiny-ulx3s
	$(BIN)/python benchmarks/board.py
	$(BIN)/systolith synth --block tensor.mac --target ecp5-85k-speed --pnr --seeds 5 --mhz 150 \
		--out docs/reports/nano-tensor.mac
	$(BIN)/systolith synth --config medium-fp8 --block tensor.mac --target ecp5-85k-speed \
		--pnr --seeds 5 --mhz 150 --out docs/reports/medium-fp8-tensor.mac

# Takes the present cell counts of nano as those that `make test` compares with.
baseline: setup
	$(BIN)/python -m systolith_synth.baseline

# Netlists of nano's MAC, scratchpad and vector engine under the benches of the sources, and that of
# the whole chip, training.
gatesim: setup
	$(BIN)/python -m pytest tests/gatesim

# The pages in docs/ that follow from the sources.
docs: setup
	$(BIN)/python -m systolith.docs
	$(BIN)/python -m systolith.golden.accuracy

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Systolith needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) reports
