# The DataInf study: each target makes the environment it needs (.venv, from requirements.lock) and says what it does.
#   make reproduce                 every figure and table at demo scale, into results/demo/, and a verdict on them
#   make reproduce SCALE=laptop    real small models and data (offline, give folders: MODEL=, DATA=, TEXT_MODEL=,
#                                  IMAGE_MODEL=, IMAGES=)
#   make reproduce SCALE=paper     the paper's scale, on a GPU; on a Slurm cluster with PROFILE=config/slurm
#   make plan SCALE=laptop         what would be run, and why; nothing is
#   make verify SCALE=demo         the verdict again: are results/demo/ what results/published/demo/ are?
#   make replay RECORD=path        one published run again, compared with its record
#   make audit ADAPTER=folder TRAIN=train.jsonl QUERIES=queries.jsonl OUT=audit
#                                  your own adapter: its training examples ranked by what they do to the queries
#   make publish SCALE=demo        results/demo/ become the published ones (for those who maintain the study)

SCALE   ?= demo
CORES   ?= $(shell getconf _NPROCESSORS_ONLN)
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
# On a cluster what SLURM says, such as slurm_account=mine slurm_partition=gpu; else one job for each GPU.
GPUS    ?= 1
PLACE   := $(if $(PROFILE),--profile $(PROFILE) $(if $(SLURM),--default-resources $(SLURM)),--cores $(CORES) --resources gpu=$(GPUS))
SWEEP   := $(BIN)/snakemake --configfile config/$(SCALE).yaml $(PLACE) \
           --rerun-incomplete --keep-going --nolock --quiet rules host reason
# Folders that stand in for hub ids. The Snakefile finds them in the environment, where they are as they were written.
export MODEL DATA TEXT_MODEL IMAGE_MODEL IMAGES RECORD ADAPTER TRAIN QUERIES OUT AUDIT
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled modules are kept whatever the shell says: the many short runs of a sweep all import the same libraries, which
# takes three times as long when they are compiled anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help plan reproduce verify replay audit publish test students site lab notebooks clean

help:
	@sed -n 's/^#   //p' Makefile; echo "also: make test, make students, make site, make lab, make notebooks, make clean"

plan: $(VENV)/installed
	@$(SWEEP) --dry-run

# One job on each core: two jobs with two threads each on two cores run many times slower than in turn.
reproduce: $(VENV)/installed
	@test -z "$(PROFILE)" || case "$$PWD" in *[\ \$$]*) echo "Snakemake starts no job on a cluster where the folder's name" \
	    "has a space or a dollar sign: move the study to another folder." >&2; exit 1;; esac
	@echo "Running the $(SCALE) sweep on $(CORES) cores; what is complete is not run again."
	@$(SWEEP)
	@echo "Done. Figures: results/$(SCALE)/figures/  tables: results/$(SCALE)/tables/  runs: results/$(SCALE)/runs/"
	@$(BIN)/python -m datainf.study.verdict $(SCALE) || true

verify: $(VENV)/installed
	@echo "Comparing results/$(SCALE)/ with results/published/$(SCALE)/."
	@$(BIN)/python -m datainf.study.verdict $(SCALE)

replay: $(VENV)/installed
	@test -n "$$RECORD" || { echo "Name a record: make replay RECORD=results/published/demo/runs/..." >&2; exit 1; }
	@echo "Repeating the run of $$RECORD into results/replayed/."
	@$(BIN)/python -m datainf.study.replay "$$RECORD"

# AUDIT has more of notebook 80's parameters, as a line of YAML: AUDIT='{epochs: 3, learning_rate: 2e-4, seeds: 3}'
audit: $(VENV)/installed
	@$(BIN)/python -m datainf.study.audit

publish: $(VENV)/installed
	@echo "Copying results/$(SCALE)/ to results/published/$(SCALE)/."
	@$(BIN)/python -m datainf.study.publish $(SCALE)

# Offline: where a test names what is not there, the hub would be waited for. Two processes more than cores: many wait.
test: $(VENV)/installed
	@echo "Running the tests."
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $$(($(CORES) + 2)) --dist loadscope --no-loadscope-reorder

students: $(VENV)/installed
	@echo "Writing the lessons without outputs and solutions into students/."
	@$(BIN)/python -m datainf.study.students

site: $(VENV)/site
	@echo "Building the site into build/site/: open build/site/index.html, which needs no network."
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --conf-dir docs/site . build/site

lab: $(VENV)/installed
	@echo "Opening JupyterLab on notebooks/; start with 00_influence_functions.ipynb."
	@$(BIN)/jupyter lab --notebook-dir notebooks

# Top to bottom, with the default parameters: how the committed notebooks are made. Written aside until all are done, so
# that each finds the code as it was committed, which is what it says of itself.
notebooks: $(VENV)/installed
	@echo "Executing every notebook with its default parameters."
	@TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --output-dir cache/notebooks --log-level WARN \
	    --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	@mv cache/notebooks/*.ipynb notebooks/

clean:
	@echo "Removing the environment, caches and results/$(SCALE)/; what is published stays."
	@rm -rf $(VENV) cache build docs/site/api .pytest_cache .ruff_cache .import_linter_cache \
	    $(if $(filter published benchmarks,$(SCALE)),,results/$(SCALE)/*)

# --no-compile: what is imported is compiled then, the rest never; it halves the time of the installation.
$(VENV)/installed: requirements.lock pyproject.toml
	@echo "Installing the pinned versions into $(VENV) (a few minutes, once)."
	@test -x $(BIN)/python || { $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	    { echo "Python 3.11, 3.12 or 3.13 is needed: name one, as in make PYTHON=python3.11 reproduce" >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	@touch $@

$(VENV)/site: $(VENV)/installed
	@echo "Installing what builds the site."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c requirements.lock -e .[site]
	@touch $@
