# The DataInf study: each target makes the environment it needs (.venv, from requirements.lock) and says what it does.
#   make reproduce                 every figure and table at demo scale, into results/demo/
#   make reproduce SCALE=laptop    real small models and data (offline, give folders: MODEL=, DATA=, TEXT_MODEL=,
#                                  IMAGE_MODEL=, IMAGES=)
#   make reproduce SCALE=paper     the paper's scale, on a GPU; on a Slurm cluster with PROFILE=config/slurm

SCALE   ?= demo
CORES   ?= $(shell getconf _NPROCESSORS_ONLN)
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
SWEEP   := $(BIN)/snakemake --configfile config/$(SCALE).yaml $(if $(PROFILE),--profile $(PROFILE),--cores $(CORES)) \
           --rerun-incomplete --keep-going --nolock --quiet rules host reason
# Folders that stand in for hub ids. The Snakefile finds them in the environment, where they are as they were written.
export MODEL DATA TEXT_MODEL IMAGE_MODEL IMAGES
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled modules are kept whatever the shell says: the many short runs of a sweep all import the same libraries, which
# takes three times as long when they are compiled anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help reproduce test lab notebooks clean

help:
	@sed -n 's/^#   //p' Makefile; echo "also: make test, make lab, make notebooks, make clean"

# One job on each core: two jobs with two threads each on two cores run many times slower than in turn.
reproduce: $(VENV)/installed
	@echo "Running the $(SCALE) sweep on $(CORES) cores; what is complete is not run again."
	@$(SWEEP)
	@echo "Done. Figures: results/$(SCALE)/figures/  tables: results/$(SCALE)/tables/  runs: results/$(SCALE)/runs/"

test: $(VENV)/installed
	@echo "Running the tests."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile

lab: $(VENV)/installed
	@echo "Opening JupyterLab on notebooks/; start with 00_influence_functions.ipynb."
	@$(BIN)/jupyter lab --notebook-dir notebooks

# Runs in place, top to bottom, with the default parameters: how the committed notebooks are made.
notebooks: $(VENV)/installed
	@echo "Executing every notebook in place with its default parameters."
	@TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN \
	    --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

clean:
	@echo "Removing the environment, caches and the demo's runs; tracked results stay."
	@rm -rf $(VENV) cache .snakemake .pytest_cache .ruff_cache results/*/logs results/demo/runs

# --no-compile: what is imported is compiled then, the rest never; it halves the time of the installation.
$(VENV)/installed: requirements.lock pyproject.toml
	@echo "Installing the pinned versions into $(VENV) (a few minutes, once)."
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	    { echo "Python 3.11, 3.12 or 3.13 is needed: name one, as in make PYTHON=python3.11 reproduce" >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	@touch $@
