# Needs Python 3.11 or newer with its venv module, and nothing else.

PYTHON ?= python3
WORKERS ?= 2
# full: the examples as they are; smoke: at tiny sizes; off: not at all
GALLERY ?= full
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

# The environment's own packages and pip's own targets must not leak in.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo test shape docs browser accuracy accuracy-quick accuracy-vae conjugate diagnose-rates refinement bench bench-vae lint \
	types format clean

help: ## Print the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.venv: $(STAMP) ## Make the virtual environment, with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("implicitvi needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "Installing into $(VENV), once"
	@$(PYTHON) -m venv $(VENV)
	@# torch alone first: left to the dependencies of others it would come as the newest CUDA build
	@$(PIP) install torch -c constraints.txt
	@$(PIP) install -e '.[test]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## Fit Eight Schools and draw the picture
	$(BIN)/python examples/01_eight_schools.py

test: lint types ## Check style and types, then run the tests, doctests and examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

shape: $(STAMP) ## Print the shape of the package beside its bounds, and draw its architecture into docs/images
	$(BIN)/python tests/shape.py --picture docs/images/architecture.svg

$(DOCS_STAMP): $(STAMP)
	@echo "Installing what builds the documentation, once"
	@$(PIP) install -e '.[docs]' -c constraints.txt
	@touch $@

docs: $(DOCS_STAMP) ## Run the gallery and build the documentation into docs/_build/html; warnings fail (GALLERY=off: fast)
	OMP_NUM_THREADS=1 DOCS_GALLERY=$(GALLERY) DOCS_JOBS=$(WORKERS) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

browser: $(STAMP) ## Look at the built documentation in Chromium, wide and narrow: overflow, pictures, search
	$(BIN)/python tests/browser.py docs/_build/html docs/_build/screenshots

accuracy: $(STAMP) ## Measure the defaults beside peers on every posterior of the suite; writes docs/results (many hours)
	OMP_NUM_THREADS=1 $(BIN)/python tests/accuracy.py

accuracy-quick: $(STAMP) ## Run every method of the suite for a few steps, to see that it does (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/accuracy.py --quick --seeds 1 --output build/quick.json --picture build/quick.png

accuracy-vae: $(STAMP) ## Measure latent variable models on four points and MNIST; writes docs/results (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/vae_accuracy.py

conjugate: $(STAMP) ## Measure the defaults where the posterior is known exactly; writes docs/results (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/conjugate.py

diagnose-rates: $(STAMP) ## Measure how often a diagnosis flags bad and good draws; writes docs/results (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/diagnose_rates.py --again

refinement: $(STAMP) ## Measure what refinement does to draws that need it; writes docs/results (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/refinement.py

bench: $(STAMP) ## Measure the time and memory of a step; writes docs/results and a picture (ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench.py

bench-vae: $(STAMP) ## Measure the training of latent variable models beside a loop by hand; writes docs/results
	OMP_NUM_THREADS=1 $(BIN)/python tests/vae_bench.py

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types
	$(BIN)/mypy

format: $(STAMP) ## Format the code, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove the virtual environment, what was built and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -rf docs/_build docs/gallery docs/reference/api docs/sg_execution_times.rst
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
