"""The sweep: one rule is one notebook run plus the files it declares.

    snakemake --configfile config/demo.yaml --cores 2

A run whose record exists is not done again, unless its parameters, the code cells of its notebook or the package's
numeric code changed; prose and layout may change freely.
"""

import sys
from pathlib import Path

import papermill
import yaml

from datainf.study.provenance import DRAWING, NUMERIC, code_hash

SCALE = config["scale"]
PYTHON = sys.executable
RESULTS = f"results/{SCALE}"
# Experiment -> its notebook and the section of the configuration that has its parameters and its grid.
EXPERIMENTS = {
    "approximation_error": ("notebooks/10_approximation_error.ipynb", "classification"),
    "mislabeled_detection": ("notebooks/20_mislabeled_detection.ipynb", "classification"),
    "text_identification": ("notebooks/30_text_identification.ipynb", "text"),
    "image_identification": ("notebooks/40_image_identification.ipynb", "images"),
}
# What a section calls its datasets, which records call dataset.
DATASET = {"classification": "dataset", "text": "task", "images": "task"}
# The record of a teaching notebook -> the notebook, and the rooms that its numbers are by besides those of all of them
# (see lesson_code); the section `lessons` has the parameters of each.
LESSONS = {
    "leave_one_out": ("notebooks/00_influence_functions.ipynb", NUMERIC),
    "theorem1": ("notebooks/01_datainf_derivation.ipynb", NUMERIC),
    "table1_complexity": ("notebooks/50_complexity.ipynb", ()),
    "memory_budget": ("notebooks/60_speed_and_scale.ipynb", NUMERIC),
}
TIMED = {"table1_complexity", "memory_budget"}  # nothing else runs beside these
ALL_CORES = workflow.resource_settings.cores or 4  # on a cluster there is no total: what a job of it asks for
FIGURES = "notebooks/90_figures_and_tables.ipynb"


def lesson_code(path, rooms):
    """A hash of all that the numbers of a teaching notebook depend on."""
    return code_hash(path, ("storage", "attribution", "processes", "scaling", *rooms))


def notebook(experiment):
    return EXPERIMENTS[experiment][0]


def section(experiment):
    """parameters, grid and by_dataset (parameters that one dataset has otherwise) of an experiment."""
    return {"by_dataset": {}} | config[EXPERIMENTS[experiment][1]]


def grids(experiment):
    """The grids of an experiment: every combination within each of them is one run."""
    grid = section(experiment)["grid"]
    return grid if isinstance(grid, list) else [grid]


def run_parameters(wildcards):
    """The parameters of one run; a dataset is looked for in the section's folder `data`, where one is given."""
    own, name = section(wildcards.experiment), DATASET[EXPERIMENTS[wildcards.experiment][1]]
    dataset = str(Path(own["data"]) / wildcards.dataset) if own.get("data") else wildcards.dataset
    one = {name: dataset, "rank": int(wildcards.rank), "seed": int(wildcards.seed)}
    if wildcards.experiment == "image_identification" and wildcards.seed == "0":  # one seed's pictures are kept
        one["figures"] = f"{RESULTS}/figures"
    return own["parameters"] | own["by_dataset"].get(wildcards.dataset, {}) | one


def refuse_unknown(path, given):
    """papermill lets unknown parameters through with a warning: compare the names before anything runs."""
    if unknown := set(given) - papermill.inspect_notebook(path).keys():
        raise WorkflowError(f"{path} has no parameter {sorted(unknown)[0]!r}, which config/{SCALE}.yaml sets.")


for experiment in EXPERIMENTS:
    own = section(experiment)
    refuse_unknown(notebook(experiment), set().union(own["parameters"], *grids(experiment), *own["by_dataset"].values()))
lessons = {lesson: given or {} for lesson, given in (config.get("lessons") or {}).items()}
for lesson, given in lessons.items():
    if lesson not in LESSONS:
        raise WorkflowError(f"There is no lesson {lesson!r}, which config/{SCALE}.yaml names: {', '.join(LESSONS)}.")
    refuse_unknown(LESSONS[lesson][0], given)

RECORD = RESULTS + "/runs/{experiment}-{dataset}-r{rank}-s{seed}.csv"
FINAL = RESULTS + "/tables/ours_beside_paper.md"
# What the kernel prints goes to a file; of a failed run its end, which says what went wrong, is shown.
PAPERMILL = """
    mkdir -p $(dirname {log})
    OMP_NUM_THREADS={threads} {PYTHON} -m papermill {params.notebook} {log} -y '{params.yaml}' --cwd . --no-progress-bar \
        > {log}.txt 2>&1 || {{ tail -n 3 {log}.txt >&2; exit 1; }}
"""


def one_line(parameters):
    """Parameters as a line of YAML for papermill's -y."""
    return yaml.safe_dump(parameters, default_flow_style=True, width=10**6).strip()


def records(experiments):
    """The records of all runs of these experiments."""
    return [
        record
        for experiment in experiments
        for grid in grids(experiment)
        for record in expand(
            RECORD,
            experiment=experiment,
            dataset=grid[DATASET[EXPERIMENTS[experiment][1]]],
            rank=grid["rank"],
            seed=grid["seed"],
        )
    ]


def earlier(wildcards):
    """Detection runs after the approximation error of the same run: it finds that run's gradients in the cache."""
    if wildcards.experiment == "mislabeled_detection":
        return RECORD.replace("{experiment}", "approximation_error")
    return []


wildcard_constraints:
    experiment="|".join(EXPERIMENTS),
    rank=r"\d+",
    seed=r"\d+",
    lesson="|".join(LESSONS),


localrules:
    all,
    figures,


# The records too, not only what is drawn of them: figures and tables may be there, tracked, before any run is.
rule all:
    input:
        records(EXPERIMENTS),
        expand(RESULTS + "/runs/{lesson}.csv", lesson=lessons),
        FINAL,


rule run:
    input:
        ancient(lambda wildcards: notebook(wildcards.experiment)),
        ancient(earlier),
    output:
        RECORD,
    log:
        notebook=RESULTS + "/logs/{experiment}-{dataset}-r{rank}-s{seed}.ipynb",
    params:
        notebook=lambda wildcards: notebook(wildcards.experiment),
        code=lambda wildcards: code_hash(notebook(wildcards.experiment)),
        yaml=lambda wildcards, output: one_line(run_parameters(wildcards) | {"output": output[0]}),
    shell:
        PAPERMILL


rule lesson:
    input:
        ancient(lambda wildcards: LESSONS[wildcards.lesson][0]),
    output:
        RESULTS + "/runs/{lesson}.csv",
    log:
        notebook=RESULTS + "/logs/{lesson}.ipynb",
    params:
        notebook=lambda wildcards: LESSONS[wildcards.lesson][0],
        code=lambda wildcards: lesson_code(*LESSONS[wildcards.lesson]),
        yaml=lambda wildcards: one_line(lessons[wildcards.lesson] | {"folder": RESULTS}),
    threads: lambda wildcards: ALL_CORES if wildcards.lesson in TIMED else 1
    shell:
        PAPERMILL


rule figures:
    input:
        records(EXPERIMENTS),
        ancient(FIGURES),
    output:
        FINAL,
    log:
        notebook=RESULTS + "/logs/figures_and_tables.ipynb",
    params:
        notebook=FIGURES,
        code=code_hash(FIGURES, DRAWING),
        yaml=one_line({"scale": SCALE}),
    shell:
        PAPERMILL
