"""What notebook 70 and the sweep share: a fine-tuned model of any family, and the plan of its retrainings.

``python -m datainf.study.ground_truth PARAMETERS --part K --of N`` does a part of a plan, so that a bank can be spread
over jobs; `PARAMETERS` is a line of YAML, or a file, with the notebook's parameters.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import yaml

from datainf.data import glue, images, text
from datainf.errors import InputError
from datainf.evaluation import retraining
from datainf.evaluation.retraining import SAME, Bank, Retraining
from datainf.models import causal_lm, classifier, diffusion, lora, losses
from datainf.models.lora import FineTuned, Recipe
from datainf.study.provenance import provenance, rooted

FACTS = ("commit", "device", "torch", "transformers", "peft", "diffusers")
"""What a row of a bank says of where it was made."""


@dataclass(frozen=True)
class Subject:
    """A task and a model that was fine-tuned on it.

    Attributes:
        task: of `glue`, `text` or `images`.
        loss_fn, right_fn: of a query: its loss, and whether it is answered rightly (None where there is no answer).
    """

    task: glue.NoisyTask | text.TextTask | images.ImageTask
    tuned: FineTuned
    loss_fn: Callable
    right_fn: Callable | None

    def about(self, run: Mapping[str, object]) -> dict[str, object]:
        """What a bank of it is about, for `Bank.check`; of the recipe what is not as by default."""
        recipe = self.tuned.training.recipe
        return {
            "task": self.task.name,
            "data": self.task.revision,
            "model": Path(str(run["model"])).name,
            "base": self.tuned.revision,
            "recipe": {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe, name)},
            "draw": {name: run[name] for name in ("seed", "n_train", "n_query", "noise", "size")},
        }


def subject(run: Mapping[str, object], folder: str | Path, *, model_seed: int | None = None) -> Subject:
    """Load the task and fine-tune the model that the parameters of notebook 70 name.

    Args:
        folder: keeps the adapter.
        model_seed: of the first weights and the order of batches; by default that of the data.

    Raises:
        InputError: no such family, and what the loaders refuse.
    """
    family, seed = run["family"], run["seed"]
    shared = {
        "rank": run["rank"],
        "learning_rate": run["learning_rate"],
        "batch_size": run["batch_size"],
        "seed": seed if model_seed is None else model_seed,
        "bf16": run["bf16"],
    }
    dataset, base, n, m = (run[name] for name in ("dataset", "model", "n_train", "n_query"))
    if family == "classification":
        task = glue.load(dataset, n_train=n, n_validation=m, noise=run["noise"], seed=seed)
        tuned = classifier.fine_tune(base, task, Recipe(epochs=run["epochs"], **shared), folder=folder)
        return Subject(task, tuned, losses.classification, losses.right_label)
    if family == "text":
        task = text.load(dataset, n_train=n, n_test=m, seed=seed)
        recipe = Recipe(alpha=32, targets=("q_proj", "v_proj"), epochs=run["epochs"], **shared)
        return Subject(
            task, causal_lm.fine_tune(base, task, recipe, folder=folder), losses.completion, losses.right_response
        )
    if family == "images":
        task = images.load(dataset, n_train=n, n_test=m, size=run["size"], seed=seed)
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        recipe = Recipe(dropout=0.0, targets=targets, steps=run["steps"], **shared)
        return Subject(task, diffusion.fine_tune(base, task, recipe, folder=folder), losses.denoising, None)
    raise InputError(f"family must be classification, text or images, not {family!r}.")


def plan(run: Mapping[str, object], n: int) -> list[Retraining]:
    """The retrainings that need no scores: all examples in several orders, then random halves and removals of 5%, with
    batches of their own and in the same batches, those of one number together."""
    orders = [-1, *range(1000, 1000 + run["orders"])]
    chosen = [
        (share, count, batches)
        for batches, halves, removals in (
            (retraining.OWN, run["halves"], run["removals"]),
            (SAME, run["halves_in_same"], run["removals_in_same"]),
        )
        for share, count in ((0.5, halves), (0.05, removals))
    ]
    random = [one for share, count, batches in chosen for one in retraining.subsets(n, share, count, batches=batches)]
    random.sort(key=lambda one: (one.batches == SAME, one.number))
    return [
        *retraining.full(n, orders=orders),
        *(retraining.full(n, batches=SAME) if run["halves_in_same"] else []),
        *random,
    ]


def bank(
    run: Mapping[str, object],
    chosen: Subject,
    retrainings: list[Retraining],
    folder: str | Path,
    *,
    known: str = "",
    part: tuple[int, int] = (0, 1),
) -> Bank:
    """`retraining.bank` of a subject; `known` is the file of a bank that has some of the retrainings."""
    outcome_of = retraining.outcomes(chosen.tuned, chosen.loss_fn, chosen.right_fn, batch_size=run["batch_size"])
    made = provenance()
    return retraining.bank(
        retrainings,
        outcome_of,
        chosen.about(run),
        Path(folder) / "retrainings",
        known=Bank.load(rooted(known)) if known else None,
        part=part,
        facts={name: made[name] for name in FACTS},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Do a part of a plan of retrainings.")
    parser.add_argument("parameters", help="of notebook 70: a line of YAML, or a file of it")
    parser.add_argument("--folder", required=True, help="keeps the model and the retrainings")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--known", default="", help="a bank that has some of the retrainings")
    parser.add_argument("--output", default="", help="the file for the bank of all that is done")
    options = parser.parse_args()
    given = Path(options.parameters)
    run = yaml.safe_load(given.read_text(encoding="utf8") if given.is_file() else options.parameters)
    lora.quiet()
    try:
        chosen = subject(run, options.folder)
        found = bank(
            run,
            chosen,
            plan(run, len(chosen.tuned.train)),
            options.folder,
            known=options.known,
            part=(options.part, options.of),
        )
        if options.output:
            found.save(rooted(options.output))
    except InputError as error:
        sys.exit(str(error))
    print(pd.DataFrame(found.rows.groupby(["design", "removed", "batches"]).size(), columns=["done"]).to_string())


if __name__ == "__main__":
    main()
