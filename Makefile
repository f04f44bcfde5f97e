# `make demo` and `make test` set up all that they need, in .venv of this checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
FPGA := $(VENV)/.fpga
MODEL ?= tests/data/basic_pitch.onnx
SHAPE ?= serving_default_input_2:0=1,43844,1
SOURCES := hetsched partitioners cost_models targets tests bench examples setup.py

.PHONY: demo test test-gpu fpga-test fpga-pnr check format opencl bench bench-peers clean

demo: $(INSTALLED) opencl
	$(BIN)/python -m examples.demo $(MODEL) --shape $(SHAPE) --folder demo

test: check opencl $(FPGA)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What needs a GPU, and what every target has to do on the GPUs that are here.
test-gpu: $(INSTALLED)
	$(BIN)/hetsched devices
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m pytest -k "opencl or cuda" tests/test_targets.py tests/test_partitions.py

# The FPGA's overlay on the simulators of its RTL; they are compiled once, in a minute or two.
fpga-test: $(FPGA)
	$(BIN)/python -m pytest $(wildcard tests/test_fpga*.py)

# Takes more than an hour of one core; what was interrupted goes on where it was.
fpga-pnr: $(FPGA)
	$(BIN)/python -m bench.fpga_place

check: $(INSTALLED)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# A device for OpenCL: PoCL, on the processor. Where it cannot be installed, its tests are skipped.
opencl:
	@./.ci/pocl

# Takes about five hours.
bench: $(INSTALLED) $(FPGA) bench-peers
	$(BIN)/python -m bench.coverage --json bench/results/coverage.json
	$(BIN)/python -m bench.coverage --json bench/results/coverage_opencl.json --devices opencl:0
	$(BIN)/python -m bench.coverage --json bench/results/coverage_cpu_opencl.json \
	    --devices cpu:0,opencl:0
	$(BIN)/python -m bench.overlap --json bench/results/overlap.json
	$(BIN)/python -m bench.overlap --json bench/results/overlap_opencl.json --devices cpu:0,opencl:0
	$(BIN)/python -m bench.pipelines --json bench/results/pipelines.json
	$(BIN)/python -m bench.compile --json bench/results/compile.json
	$(BIN)/python -m bench.reference --json bench/results/reference.json
	$(BIN)/python -m bench.schedulers --json bench/results/schedulers.json
	$(BIN)/python -m bench.splits --json bench/results/splits.json
	$(BIN)/python -m bench.costs --json bench/results/costs.json
	$(BIN)/python -m bench.cuda --json bench/results/cuda.json
	$(BIN)/python -m bench.opencl --json bench/results/opencl.json
	$(BIN)/python -m bench.fpga --json bench/results/fpga.json
	$(BIN)/python -m bench.figures

# About half an hour for each number of threads; the machine should do nothing else.
bench-peers: $(PEERS)
	$(BIN)/python -m bench.peers --json bench/results/peers.json --threads 1
	$(BIN)/python -m bench.peers --json bench/results/peers2.json --threads 2
	$(BIN)/python -m bench.layers --json bench/results/layers.json

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[bench]'
	touch $@

$(FPGA): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[fpga]' && touch $@ || \
	    echo "without the tools of the FPGA, whose tests are skipped: pip could not install them" >&2

$(INSTALLED): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "hetsched needs Python 3.11 or newer; give one with PYTHON=..." >&2; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || \
	    { echo "hetsched needs a C compiler to link what it compiles; install gcc" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[opencl,test]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
