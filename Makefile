# make demo    fine-tune a real chat model beside Transformers + PEFT + bitsandbytes (10 minutes on two cores)
# make test    the whole test suite
# make kernels compiles every Triton kernel for GPUs that need not be there, with two releases of Triton (3 minutes);
#              UPDATE=1 writes the new costs to gate/budget.json
# make zoo     trains 280 tiny models of many architectures under the library against eager code and writes docs/architectures.md (an hour
#              on two cores; ONLY=pattern: some)
# make kill-test  kills training runs at 200 random moments in each of four scenarios, resumes them, compares every byte (20 minutes;
#              POINTS=20: fewer; UPDATE=1 writes bench/results/kills.jsonl)
# make mutants plants wrong rewrites, counts which certificates catch and bisecting names, writes docs/mutants.md (10 minutes on a core)
# make fuzz    random programs through every pass and random orders (N=1000, FIRST=0); failures are made smaller and kept in tests/regressions/
# make fuzz-ops  every fp32 operator of torch's database through the pipeline; writes docs/operators.md
# make bench   the four headline rows of docs/benchmarks.md (about 45 minutes and 20 GiB on two cores; QUICK=1: a third of the time)
# make bench-all  also the demo's workload and every fused op
#
# Needs python3 (3.11 or newer), make and, once, a Python package index. Everything is installed into .venv with the
# versions of constraints.txt. On a machine without an NVIDIA GPU the CPU build of torch is much smaller; name an
# index that has it:
#
#     make demo TORCH_INDEX=<index with CPU builds of torch>
#
# Models and texts are fetched once, as data, into $FXOPT_CACHE_DIR (default ~/.cache/fxopt).

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch. Another release may need another triton in constraints.txt.
TORCH ?= torch==2.13.0
# One more package index to find it on.
TORCH_INDEX ?=
# Processes of the test suite.
JOBS ?= 2
# More arguments, such as TESTS="tests/runtime -k loop".
TESTS ?=
# Set to rewrite gate/budget.json.
UPDATE ?=
# A regular expression for the names of what `make zoo` trains.
ONLY ?=
# Set for few steps in `make bench`.
QUICK ?=
# The other release of Triton that the kernels must compile with.
OTHER_TRITON ?= 3.6.0

run := $(VENV)/bin/python
pip := $(run) -m pip --disable-pip-version-check
wanted := $(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d ' ' -f 1)
stamp := $(VENV)/.installed-$(wanted)

.PHONY: kill-test demo test kernels zoo mutants fuzz fuzz-ops bench bench-all install clean
.DELETE_ON_ERROR:

demo: $(stamp)
	@$(run) -m demo

test: $(stamp)
	@$(run) -m demo.fetch
	@$(run) -m pytest -n $(JOBS) $(TESTS)

other := build/triton-$(OTHER_TRITON)
gate := TRITON_CACHE_DIR=build/triton-cache $(run) -m gate --jobs $(JOBS) $(if $(UPDATE),--update)

kill-test: $(stamp)
	@$(run) -m tests.train.kills $(if $(POINTS),--points $(POINTS)) $(if $(UPDATE),--out bench/results/kills.jsonl)

kernels: $(stamp) $(other)/.installed
	@$(gate)
	@PYTHONPATH=$(other) $(gate) --other

$(other)/.installed:
	rm -rf $(other)
	$(pip) install --quiet --no-deps --target $(other) triton==$(OTHER_TRITON)
	@touch $@

zoo: $(stamp)
	@$(run) -m tests.zoo --jobs $(JOBS) --only '$(ONLY)'

mutants: $(stamp)
	@PYTHONPATH=tests:. $(run) -m mutants

fuzz: $(stamp)
	@PYTHONPATH=tests:. $(run) -m fuzz $(or $(N),1000) $(or $(FIRST),0)

fuzz-ops: $(stamp)
	@PYTHONPATH=tests:. $(run) -m fuzz ops

bench: $(stamp)
	@$(run) -m bench.headlines $(if $(QUICK),--quick)
	@$(run) -m bench.report

bench-all: $(stamp)
	@$(run) -m bench.run
	@$(run) -m bench.headlines
	@$(run) -m bench.report

install: $(stamp)

$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@test -x $(run) || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	$(pip) install --quiet '$(TORCH)' $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')
	$(pip) install --quiet --constraint constraints.txt setuptools
	$(pip) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build
