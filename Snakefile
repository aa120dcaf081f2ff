"""The sweep: one rule is one notebook run plus the files it declares.

    snakemake --configfile config/demo.yaml --cores 2

A run whose record exists is not done again, unless its parameters, the code cells of its notebook or the package's
numeric code changed; prose and layout may change freely. Records go to results/SCALE, whatever results/published holds.
"""

import sys
from functools import cache
from pathlib import Path

import papermill
import yaml
from snakemake.utils import update_config

from datainf.errors import InputError
from datainf.study import sweep
from datainf.study.provenance import DRAWING, NUMERIC, code_hash

if base := config.get("extends"):  # a configuration that says only what it has otherwise than another one
    whole = yaml.safe_load(Path("config", f"{base}.yaml").read_text(encoding="utf8"))
    update_config(whole, config)
    config = whole
SCALE = config["scale"]
PYTHON = sys.executable
RESULTS = f"results/{SCALE}"
# The rooms that the numbers of a teaching notebook are by, besides those of all of them (see lesson_code).
LESSON_ROOMS = {"table1_complexity": (), "leave_one_out": (*NUMERIC, "study")}  # its model is study/logistic.py
TIMED = {"table1_complexity", "memory_budget"}  # nothing else runs beside these
ALL_CORES = workflow.resource_settings.cores or 4  # on a cluster there is no total: what a job of it asks for
JOB = {"runtime": 60, "mem_mb": 4000, "gpu": 0} | config.get("job", {})
FIGURES = "notebooks/90_figures_and_tables.ipynb"


def notebook(name):
    """The notebook of an experiment or a lesson."""
    return f"notebooks/{sweep.LESSONS[name] if name in sweep.LESSONS else sweep.EXPERIMENTS[name][0]}.ipynb"


def lesson_code(lesson):
    """A hash of all that the numbers of a teaching notebook depend on."""
    rooms = LESSON_ROOMS.get(lesson, NUMERIC)
    return code_hash(notebook(lesson), ("storage", "attribution", "processes", "scaling", *rooms))


def section_of(experiment):
    return sweep.EXPERIMENTS[experiment][1]


def section(experiment):
    """parameters, grid, by_dataset (parameters that one dataset has otherwise) and data (the folder of the datasets) of
    an experiment; no grid where the configuration does not name it."""
    return {"parameters": {}, "grid": [], "by_dataset": {}, "data": None} | config.get(section_of(experiment), {})


def settings(experiment, dataset):
    """The parameters that all runs on a dataset share. It is looked for in the section's folder `data`, where one is
    given; a model or a folder that was given takes the place of the configuration's."""
    own = section(experiment)
    parameters = own["parameters"] | own["by_dataset"].get(dataset, {})
    given = sweep.given(parameters.get("family", section_of(experiment)))
    model = {"model": given["model"]} if "model" in given else {}
    name = sweep.DATASET[section_of(experiment)]
    return parameters | model | {name: sweep.dataset_in(given.get("data", own["data"]), dataset)}


def grids(experiment):
    """The grids of an experiment: every combination within each of them is one run, with the grid's own `parameters`."""
    grid = section(experiment)["grid"]
    return grid if isinstance(grid, list) else [grid]


def asked(resource):
    """What a job asks of a cluster: minutes, megabytes, GPUs; of its section's `job` or the configuration's. One that a
    limit has ended is begun again with twice as much, then with three times; it takes up what it had done."""

    def amount(wildcards, attempt):
        own = section(wildcards.experiment).get("job", {}) if wildcards.get("experiment") else {}
        return (JOB | own)[resource] * (1 if resource == "gpu" else attempt)

    return amount


RESOURCES = {resource: asked(resource) for resource in JOB}


def own_parameters(experiment, dataset, rank, seed):
    """Those of the grid that a run is in."""
    for grid in grids(experiment):
        if dataset in grid[sweep.DATASET[section_of(experiment)]] and rank in grid["rank"] and seed in grid["seed"]:
            return grid.get("parameters", {})
    return {}


def run_parameters(wildcards):
    """The parameters of one run."""
    one = {"rank": int(wildcards.rank), "seed": int(wildcards.seed)}
    if wildcards.experiment == "image_identification" and wildcards.seed == "0":  # one seed's pictures are kept
        one["figures"] = f"{RESULTS}/figures"
    own = own_parameters(wildcards.experiment, wildcards.dataset, one["rank"], one["seed"])
    given = settings(wildcards.experiment, wildcards.dataset) | own | one
    return {name: value for name, value in given.items() if name in parameters_of(notebook(wildcards.experiment))}


@cache
def parameters_of(path):
    """The names of a notebook's parameters."""
    return papermill.inspect_notebook(path).keys()


def refuse_unknown(paths, given):
    """papermill lets unknown parameters through with a warning: compare the names, with those of all notebooks that
    share them, before anything runs."""
    if unknown := set(given).difference(*map(parameters_of, paths)):
        raise WorkflowError(f"{paths[0]} has no parameter {sorted(unknown)[0]!r}, which config/{SCALE}.yaml sets.")


try:
    for experiment in sweep.EXPERIMENTS:
        own, name = section(experiment), sweep.DATASET[section_of(experiment)]
        sharing = [notebook(each) for each in sweep.EXPERIMENTS if section_of(each) == section_of(experiment)]
        refuse_unknown(sharing, set().union(own["parameters"], *own["by_dataset"].values()))
        for grid in grids(experiment):
            refuse_unknown(sharing, (grid.keys() - {"parameters"}) | grid.get("parameters", {}).keys())
            for dataset in grid[name]:
                settings(experiment, dataset)
except InputError as error:
    sys.exit(str(error))
lessons = {lesson: given or {} for lesson, given in (config.get("lessons") or {}).items()}
for lesson, given in lessons.items():
    if lesson not in sweep.LESSONS:
        raise WorkflowError(f"There is no lesson {lesson!r}, which config/{SCALE}.yaml names: {', '.join(sweep.LESSONS)}.")
    refuse_unknown([notebook(lesson)], given)

JOBS = section("ground_truth").get("jobs", 0)
PART = RESULTS + "/logs/{experiment}-{dataset}-r{rank}-s{seed}-part{part}.done"
RECORD = RESULTS + "/runs/{experiment}-{dataset}-r{rank}-s{seed}.csv"
FINAL = RESULTS + "/tables/ours_beside_paper.md"
# What the kernel prints goes to a file; of a failed run its end, which says what went wrong, is shown.
PAPERMILL = """
    mkdir -p "$(dirname {log:q})"
    OMP_NUM_THREADS={threads} {PYTHON:q} -m papermill {params.notebook:q} {log:q} -y {params.yaml:q} --cwd . \
        --no-progress-bar > {log:q}.txt 2>&1 || {{ tail -n 3 {log:q}.txt >&2; exit 1; }}
"""


def records(experiments):
    """The records of all runs of these experiments."""
    return [
        record
        for experiment in experiments
        for grid in grids(experiment)
        for record in expand(
            RECORD,
            experiment=experiment,
            dataset=grid[sweep.DATASET[section_of(experiment)]],
            rank=grid["rank"],
            seed=grid["seed"],
        )
    ]


def earlier(wildcards):
    """Detection runs after the approximation error of the same run: it finds that run's gradients in the cache. So does
    the notebook of Hessians after the ground truth, whose retrainings it takes; and that, where its section has `jobs`,
    after the parts of its retrainings, which as many jobs do."""
    if wildcards.experiment in sweep.AFTER:
        return RECORD.replace("{experiment}", sweep.AFTER[wildcards.experiment])
    if wildcards.experiment == "ground_truth":
        return [PART.replace("{part}", str(part)) for part in range(JOBS)]
    return []


wildcard_constraints:
    experiment="|".join(sweep.EXPERIMENTS),
    rank=r"\d+",
    seed=r"\d+",
    part=r"\d+",
    lesson="|".join(sweep.LESSONS),


localrules:
    all,
    figures,


# The records too, not only what is drawn of them: a record may be out of date while figures and tables are there.
rule all:
    input:
        records(sweep.EXPERIMENTS),
        expand(RESULTS + "/runs/{lesson}.csv", lesson=lessons),
        FINAL,


rule run:
    input:
        ancient(lambda wildcards: notebook(wildcards.experiment)),
        # Not ancient: of a run whose earlier one is to be done again Snakemake would not see that its own code changed.
        earlier,
    output:
        RECORD,
    log:
        notebook=RESULTS + "/logs/{experiment}-{dataset}-r{rank}-s{seed}.ipynb",
    params:
        notebook=lambda wildcards: notebook(wildcards.experiment),
        code=lambda wildcards: code_hash(notebook(wildcards.experiment)),
        # Of the wildcards alone: Snakemake compares no parameter with the one of before that is derived from the output.
        yaml=lambda wildcards: sweep.one_line(run_parameters(wildcards) | {"output": RECORD.format(**wildcards)}),
    resources:
        **RESOURCES,
    shell:
        PAPERMILL


rule retrain:
    input:
        ancient(lambda wildcards: notebook(wildcards.experiment)),
    output:
        touch(PART),
    log:
        PART.removesuffix("done") + "txt",
    params:
        code=lambda wildcards: code_hash(notebook(wildcards.experiment)),
        yaml=lambda wildcards: sweep.one_line(run_parameters(wildcards)),
    resources:
        **RESOURCES,
    shell:
        """
        OMP_NUM_THREADS={threads} {PYTHON:q} -m datainf.study.ground_truth {params.yaml:q} --part {wildcards.part} \
            --of {JOBS} > {log:q} 2>&1 || {{ tail -n 3 {log:q} >&2; exit 1; }}
        """


rule lesson:
    input:
        ancient(lambda wildcards: notebook(wildcards.lesson)),
    output:
        RESULTS + "/runs/{lesson}.csv",
    log:
        notebook=RESULTS + "/logs/{lesson}.ipynb",
    params:
        notebook=lambda wildcards: notebook(wildcards.lesson),
        code=lambda wildcards: lesson_code(wildcards.lesson),
        yaml=lambda wildcards: sweep.one_line(lessons[wildcards.lesson] | {"folder": RESULTS}),
    threads: lambda wildcards: ALL_CORES if wildcards.lesson in TIMED else 1
    resources:
        **RESOURCES,
    shell:
        PAPERMILL


rule figures:
    input:
        records(sweep.EXPERIMENTS),
        ancient(FIGURES),
    output:
        FINAL,
    log:
        notebook=RESULTS + "/logs/figures_and_tables.ipynb",
    params:
        notebook=FIGURES,
        code=code_hash(FIGURES, DRAWING),
        yaml=sweep.one_line({"folder": RESULTS, "save": True}),
    shell:
        PAPERMILL
