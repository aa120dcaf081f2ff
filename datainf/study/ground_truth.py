"""What notebook 70 and the sweep share: a fine-tuned model of any family, and the plan of its retrainings.

``python -m datainf.study.ground_truth PARAMETERS --part K --of N`` does a part of a plan, so that a bank can be spread
over jobs; `PARAMETERS` is a line of YAML, or a file, with parameters of the notebook that are not as it has them. Where
the notebook is run with the same ones afterwards, it finds the retrainings done.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

import datainf
from datainf.attribution.methods import OF_ALL_LAYERS
from datainf.data import glue, images, text
from datainf.errors import InputError
from datainf.evaluation import baselines, retraining
from datainf.evaluation.parts import some_layers
from datainf.evaluation.retraining import OWN, SAME, Bank, Retraining
from datainf.models import causal_lm, classifier, diffusion, fisher, lora, losses
from datainf.models.in_training import INDEX, RecordGradients
from datainf.models.lora import FineTuned, Recipe
from datainf.study import parameters, results
from datainf.study.provenance import ROOT, provenance, rooted

TRAINING = "training"
"""The damping that a fine-tuning's own recipe asks for: see `Gradients.damping`."""

FACTS = ("commit", "device", "torch", "transformers", "peft", "diffusers")
"""What a row of a bank says of where it was made."""


@dataclass(frozen=True)
class Subject:
    """A task and a model that was fine-tuned on it.

    Attributes:
        task: of `glue`, `text` or `images`, or examples of one's own (see `study.audit`).
        loss_fn, right_fn: of a query: its loss, and whether it is answered rightly (None where there is no answer).
        texts: all that the model reads of every training example, and of every query; None of pictures.
        labelled: whether the training examples have labels some of which may be wrong.
    """

    task: Any
    tuned: FineTuned
    loss_fn: Callable
    right_fn: Callable | None
    texts: tuple[list[str], list[str]] | None = None
    labelled: bool = False

    def about(self, run: Mapping[str, object]) -> dict[str, object]:
        """What a bank of it is about, for `Bank.check`; of the recipe what is not as by default."""
        recipe = self.tuned.training.recipe
        return {
            "task": self.task.name,
            "data": self.task.revision,
            "model": Path(str(run["model"])).name,
            "base": self.tuned.revision,
            "recipe": {name: value for name, value in asdict(recipe).items() if value != getattr(Recipe, name)},
            "draw": {name: run[name] for name in ("seed", "n_train", "n_query", "noise")}
            | {"size": run["size"] if run["family"] == "images" else 0},
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
        "adam_epsilon": run.get("adam_epsilon", Recipe.adam_epsilon),
    }
    dataset, base, n, m = (run[name] for name in ("dataset", "model", "n_train", "n_query"))
    if family == "classification":
        task = glue.load(dataset, n_train=n, n_validation=m, noise=run["noise"], seed=seed)
        tuned = classifier.fine_tune(base, task, Recipe(epochs=run["epochs"], **shared), folder=folder)
        texts = (_texts(task.train, task.columns), _texts(task.validation, task.columns))
        return Subject(task, tuned, losses.classification, losses.right_label, texts, bool(task.flipped.any()))
    if family == "text":
        task = text.load(dataset, n_train=n, n_test=m, seed=seed)
        recipe = Recipe(alpha=32, targets=("q_proj", "v_proj"), epochs=run["epochs"], **shared)
        tuned = causal_lm.fine_tune(base, task, recipe, folder=folder)
        texts = tuple(_texts(split, ("prompt", "response")) for split in (task.train, task.test))
        return Subject(task, tuned, losses.completion, losses.right_response, texts)
    if family == "images":
        task = images.load(dataset, n_train=n, n_test=m, size=run["size"], seed=seed)
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        recipe = Recipe(dropout=0.0, targets=targets, steps=run["steps"], **shared)
        return Subject(task, diffusion.fine_tune(base, task, recipe, folder=folder), losses.denoising, None)
    raise InputError(f"family must be classification, text or images, not {family!r}.")


def plan(run: Mapping[str, object], n: int) -> list[Retraining]:
    """The retrainings that need no scores: all examples; random halves and removals of 5%, in fresh batches and in the
    same batches, those of one number together; and the first ones in fresh batches once more, in another order."""
    counts = {
        (0.5, OWN): run["halves"],
        (0.05, OWN): run["removals"],
        (0.5, SAME): run["halves_in_same"],
        (0.05, SAME): run["removals_in_same"],
    }
    chosen: list[Retraining] = []
    for (share, batches), count in counts.items():
        if not count:  # a share of few examples may be none
            continue
        subsets = retraining.subsets(n, share, count, batches=batches)
        chosen += subsets + (retraining.repeats(subsets[: run["repeats"]]) if batches == OWN else [])
    chosen.sort(key=lambda one: one.number)
    return [retraining.full(n), retraining.full(n, batches=SAME), *chosen]


def apart(chosen: Subject, n_query: int) -> tuple[Subject, FineTuned]:
    """A subject whose queries are its first `n_query` alone (of each class, where there are classes), and its model
    with all others, which no score has seen.

    Raises:
        InputError: there are no others.
    """
    task, tuned = chosen.task, chosen.tuned
    split = "validation" if isinstance(task, glue.NoisyTask) else "test"
    queries = getattr(task, split)
    place = np.arange(len(queries))
    if isinstance(task, text.TextTask):
        place = queries.to_pandas().groupby("class").cumcount().to_numpy()
    seen, unseen = (np.flatnonzero(each) for each in (place < n_query, place >= n_query))
    if not len(unseen):
        raise InputError(f"{task.name} has {len(place)} examples for queries and for judging: n_query must be lower.")
    few = replace(
        chosen,
        task=replace(task, **{split: queries.select(seen)}),
        tuned=replace(tuned, query=tuned.query.select(seen)),
        texts=(chosen.texts[0], [chosen.texts[1][index] for index in seen]),
    )
    return few, replace(tuned, query=tuned.query.select(unseen))


@dataclass(frozen=True)
class Gradients:
    """The per-sample gradients of a subject's training examples and queries, and what methods ask for beside them.

    Attributes:
        chosen: the subject, with the batch size that its gradients are taken in.
        train, query: the gradients.
    """

    chosen: Subject
    batch_size: int
    train: Mapping[str, Tensor]
    query: Mapping[str, Tensor]

    @cached_property
    def factors(self) -> dict[str, tuple]:
        """What EK-FAC wants of the training examples."""
        tuned = self.chosen.tuned
        return datainf.kronecker_factors(
            tuned.model, tuned.train, self.chosen.loss_fn, collate_fn=tuned.collate, batch_size=self.batch_size
        )

    @cached_property
    def damping(self) -> dict[str, float]:
        """The damping of the subject's own recipe, layer by layer."""
        recipe, n = self.chosen.tuned.training.recipe, len(self.chosen.tuned.train)
        return datainf.damping_of_training(self.train, recipe.total_learning_rate(n), recipe.batch_size)

    def influence(self, method: str, damping: float = 0.1) -> Float[np.ndarray, "m n"]:
        """Scores by a method's name, which may bring its own damping and how layers are added up, as in
        exact@10+ranks."""
        name, own, aggregate = in_parts(method)
        found = datainf.influence(
            self.train,
            self.query,
            name,
            self.damping if own == TRAINING else own or damping,
            factors=self.factors if name == "ekfac" else None,
            aggregate=aggregate,
        )
        return found.double().cpu().numpy()

    def of_layers(self, names: Sequence[str]) -> "Gradients":
        """Those of some layers alone."""
        return replace(self, train=some_layers(self.train, names), query=some_layers(self.query, names))


def gradients(
    chosen: Subject, run: Mapping[str, object], folder: str | Path, *, query_folder: str | Path | None = None
) -> Gradients:
    """Take the gradients of a subject, or find them in the folder that keeps them.

    Args:
        query_folder: keeps those of the queries, where other queries may be asked of the same training examples.
    """
    take = {"loss_fn": chosen.loss_fn, "collate_fn": chosen.tuned.collate, "batch_size": run["batch_size"]}
    take["rows_per_example"] = getattr(chosen.tuned.train, "versions", 1)
    train, query = (
        datainf.per_sample_gradients(chosen.tuned.model, examples, store=place, **take)
        for place, examples in (
            (Path(folder) / "train", chosen.tuned.train),
            (Path(query_folder or folder) / "query", chosen.tuned.query),
        )
    )
    return Gradients(chosen, run["batch_size"], train, query)


def recorded(chosen: Subject) -> datainf.GradientStore | None:
    """The training examples' gradients as the fine-tuning itself had them, in its last epoch: it is done again. None of
    pictures, whose loss is not the model's own, and where a layer has no gradient yet, as lora_A at the first step."""
    training, n = chosen.tuned.training, len(chosen.tuned.train)
    if training.loss is not None:
        return None
    recording = RecordGradients(n)
    numbered = replace(training, examples=lora.with_column(training.examples, INDEX, list(range(n))))
    lora.retrain(numbered, np.ones(n, dtype=bool), callbacks=[recording])
    store = recording.store
    return store if all(store.rows(name).square_norms.any() for name in store) else None


def in_parts(method: str) -> tuple[str, float | str | None, str]:
    """The method, its damping where it brings one, and how layers are added up.

    Raises:
        InputError: there is no such method, or what follows its name is neither @ and a damping nor +ranks.
    """
    found = re.fullmatch(r"([^@+]*)(?:@([^+]*))?(\+ranks)?", method)
    try:
        name, own = found[1], found[2] if found[2] in (None, TRAINING) else float(found[2])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"A method is a name such as exact, exact@10, exact@training or exact@10+ranks, not {method!r}."
        ) from error
    if name not in OF_ALL_LAYERS:
        datainf.resolve_method(name)
    return name, own, "ranks" if found[3] else "sum"


def true_fisher(chosen: Subject, run: Mapping[str, object], folder: str | Path) -> datainf.GradientStore | None:
    """The rows of the true Fisher information, kept in a folder: of a classifier by all labels, of a language model by
    a sampled response; None of a family whose loss is no likelihood."""
    tuned = chosen.tuned
    if chosen.loss_fn is losses.classification:
        examples, loss_fn = fisher.with_every_label(tuned.train), fisher.of_every_label
    elif chosen.loss_fn is losses.completion:
        examples, loss_fn = tuned.train, fisher.sampled_completion
    else:
        return None
    take = {"collate_fn": tuned.collate, "batch_size": run["batch_size"], "store": Path(folder) / "fisher"}
    return datainf.per_sample_gradients(tuned.model, examples, loss_fn, **take)


def baselines_of(taken: Gradients, *, folds: int = 0) -> dict[str, Callable[[], Float[np.ndarray, "m n"]]]:
    """The baselines that apply to a subject, by name, each to be called: see `evaluation.baselines`.

    Args:
        folds: of cleanlab's cross-validation, each of which fine-tunes once; 0 leaves it out.
    """
    chosen, tuned = taken.chosen, taken.chosen.tuned
    m, n = len(tuned.query), len(tuned.train)
    options = {"labelled": chosen.labelled, "folds": folds, "batch_size": taken.batch_size}
    suspicions = baselines.suspicions(tuned, taken.train, chosen.loss_fn, **options)
    found = {
        "gradient_cosine": lambda: baselines.gradient_cosine(taken.train, taken.query),
        "random": lambda: baselines.random(m, n),
    } | {name: partial(_of_examples, suspicion, m) for name, suspicion in suspicions.items()}
    if chosen.texts is None:
        pictures = [np.asarray(examples.latents) for examples in (tuned.train, tuned.query)]
        return found | {"latents": lambda: baselines.latents(*pictures)}
    return found | {
        "hidden_states": lambda: baselines.hidden_state_similarity(
            tuned.model, tuned.train, tuned.query, tuned.collate
        ),
        "bm25": lambda: baselines.bm25(*chosen.texts),
        "tfidf": lambda: baselines.tfidf(*chosen.texts),
    }


def _of_examples(suspicion: Callable[[], baselines.Suspicion], m: int) -> Float[np.ndarray, "m n"]:
    return baselines.of_examples(suspicion(), m)


def _texts(split: Dataset, columns: Sequence[str]) -> list[str]:
    return [" ".join(row[column] for column in columns) for row in split]


def bank(
    run: Mapping[str, object],
    chosen: Subject,
    retrainings: list[Retraining],
    folder: str | Path,
    *,
    known: Bank | None = None,
    part: tuple[int, int] = (0, 1),
) -> Bank:
    """`retraining.bank` of a subject."""
    outcome_of = retraining.outcomes(chosen.tuned, chosen.loss_fn, chosen.right_fn, batch_size=run["batch_size"])
    made = provenance()
    return retraining.bank(
        retrainings,
        outcome_of,
        chosen.about(run),
        Path(folder) / "retrainings",
        known=known,
        part=part,
        facts={name: made[name] for name in FACTS},
    )


def known_bank(path: str, about: Mapping[str, object], *, needed: bool = True) -> Bank | None:
    """The bank in a file, or that of a folder which is about this; None for no path, and where none is `needed` also if
    there is no such bank.

    Raises:
        InputError: it is about something else, or the folder has none that is about this; says what differs.
    """
    if not path:
        return None
    if not needed:
        files = sorted(rooted(path).glob("*.parquet")) if rooted(path).is_dir() else [rooted(path)]
        return next((bank for bank in map(Bank.load, files) if not bank.differing(about)), None)
    if not rooted(path).is_dir():
        found = Bank.load(rooted(path))
        found.check(about)
        return found
    banks = {file.name: Bank.load(file) for file in sorted(rooted(path).glob("*.parquet"))}
    if not banks:
        raise InputError(f"There is no bank in the folder {path}: leave bank empty, and the models are trained again.")
    nearest = min(banks, key=lambda name: len(banks[name].differing(about)))
    if banks[nearest].differing(about):
        name, theirs, ours = banks[nearest].differing(about)[0]
        raise InputError(
            f"No bank in {path} is of this: the nearest, {nearest}, is of another {name}, {theirs!r}, not {ours!r}. "
            "Leave bank empty, and the models are trained again."
        )
    return banks[nearest]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a line of YAML may be longer than a name can be
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Do a part of a plan of retrainings.")
    parser.add_argument("parameters", help="of notebook 70: a line of YAML, or a file of it")
    parser.add_argument("--folder", help="keeps the model and the retrainings; by default where the notebook does")
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--known", default="", help="a bank that has some of the retrainings, or a folder of banks")
    parser.add_argument("--output", default="", help="the file for the bank of all that is done")
    options = parser.parse_args()
    given = Path(options.parameters)
    said = yaml.safe_load(given.read_text(encoding="utf8") if _is_file(given) else options.parameters)
    run = parameters.defaults(ROOT / "notebooks" / "70_ground_truth.ipynb") | said
    folder = options.folder or results.run_folder(run["cache"], **results.fine_tuning_key(run))
    lora.quiet()
    try:
        chosen = subject(run, folder)
        found = bank(
            run,
            chosen,
            plan(run, len(chosen.tuned.train)),
            folder,
            known=known_bank(options.known, chosen.about(run)),
            part=(options.part, options.of),
        )
        if options.output:
            found.save(rooted(options.output))
    except InputError as error:
        sys.exit(str(error))
    print(pd.DataFrame(found.rows.groupby(["design", "removed", "batches"]).size(), columns=["done"]).to_string())


if __name__ == "__main__":
    main()
