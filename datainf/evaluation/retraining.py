"""Ground truth: a model fine-tuned again and again without some of its training examples, and its queries' losses then.

A plan says who is left out each time; `bank` does what of it is yet to be done, and gives all. A score is judged by a
bank without any retraining: see `counterfactual`.
"""

import gc
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float
from torch import nn

from datainf import processes
from datainf.errors import InputError
from datainf.models.forward import of_each
from datainf.models.lora import FineTuned, retrain
from datainf.progress import bar
from datainf.storage.files import fill_whole, place, remove_stale

OWN, SAME = "own", "same"
"""A retraining's batches: of the kept examples alone, drawn anew; those of all, in which the others weigh nothing."""

REPEATED = 1_000_000
"""Seeds of orders begin here where a subset is retrained once more."""

KEY = ["design", "method", "removed", "number", "batches", "order"]
"""The columns by which a retraining is known."""

LossFn = Callable[[nn.Module, Mapping], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Retraining:
    """Who is left out, and how it is trained without them.

    Attributes:
        kept: of n training examples, those that are trained on.
        design: full, subset, repeat, without_top, leave_one_out, or one of `evaluation.selection`.
        number: which of several of a design; of leave_one_out the example; where a method chose a checksum of `kept`.
        method: whose scores chose; of groups the one left out.
        batches: `OWN` or `SAME`.
        order: the seed of the batches and of dropout, where it is not the recipe's own.
    """

    kept: Bool[np.ndarray, " n"]
    design: str
    number: int = 0
    method: str = ""
    batches: str = OWN
    order: int = -1

    @property
    def key(self) -> tuple:
        """The values of `KEY`."""
        return (self.design, self.method, int((~self.kept).sum()), self.number, self.batches, self.order)

    @property
    def name(self) -> str:
        """The key as the name of a file."""
        return re.sub(r"[^\w.@+()-]", "_", "-".join(str(value) for value in self.key if value != ""))


def full(n: int, *, batches: str = OWN) -> Retraining:
    """Nobody left out: the fine-tuning itself, once more."""
    return Retraining(np.ones(n, dtype=bool), "full", batches=batches)


def subsets(n: int, share: float, count: int, *, batches: str = OWN, seed: int = 0) -> list[Retraining]:
    """A share of all examples left out at random, `count` times; the first ones are the same for every count and every
    kind of batches.

    Batches of their own are drawn by a seed of their own, the subset's number: by one seed for all, two sets that
    differ in few examples would share most of their batches, and how much of a loss is chance could not be said.

    Raises:
        InputError: the share leaves no example out, or all.
    """
    removed = round(share * n)
    if not 0 < removed < n:
        raise InputError(f"A share of {share:g} of {n} examples leaves out {removed}: it must leave out some, not all.")
    plan = []
    for number in range(count):
        kept = np.ones(n, dtype=bool)
        kept[np.random.default_rng([seed, removed, number]).choice(n, removed, replace=False)] = False
        plan.append(Retraining(kept, "subset", number, batches=batches, order=number if batches == OWN else -1))
    return plan


def repeats(plan: Iterable[Retraining]) -> list[Retraining]:
    """The same subsets in another order, by which is known how much of a loss is chance."""
    return [replace(one, design="repeat", order=REPEATED + one.number) for one in plan]


def without_top(scores: Float[np.ndarray, " n"], share: float, method: str, *, batches: str = OWN) -> Retraining:
    """The most helpful share of the examples left out, by a method's scores for the mean query (helpful is < 0)."""
    removed = max(1, round(share * len(scores)))
    kept = np.ones(len(scores), dtype=bool)
    kept[np.argsort(scores, kind="stable")[:removed]] = False
    return Retraining(kept, "without_top", checksum(kept), method, batches)


def checksum(kept: Bool[np.ndarray, " n"]) -> int:
    """A number for a set that a method chose, since other scores of the same method choose others."""
    return zlib.crc32(np.packbits(kept).tobytes())


def leave_one_out(n: int, examples: Iterable[int] | None = None, *, batches: str = SAME) -> list[Retraining]:
    """Each of some examples, or of all, left out alone."""
    return [
        Retraining(np.arange(n) != index, "leave_one_out", index, batches=batches)
        for index in (range(n) if examples is None else examples)
    ]


@dataclass(frozen=True, eq=False)
class Bank:
    """Retrainings and what became of the queries' losses.

    Attributes:
        about: what was trained: the model, the data, the recipe; see `check`.
        rows: one row per retraining, with the columns of `KEY` and where it was made.
        kept: (retrainings, n), who was trained on.
        losses: (retrainings, m), each query's loss afterwards, in nats.
        right: (retrainings, m), whether the model answers the query rightly; None where there is no answer.
    """

    about: Mapping[str, object]
    rows: pd.DataFrame = field(repr=False)
    kept: Bool[np.ndarray, "s n"] = field(repr=False)
    losses: Float[np.ndarray, "s m"] = field(repr=False)
    right: Bool[np.ndarray, "s m"] | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, **values) -> "Bank":
        """The retrainings whose columns have these values, as in ``bank.select(design="subset", batches="own")``."""
        chosen = np.ones(len(self), dtype=bool)
        for column, value in values.items():
            chosen &= (self.rows[column] == value).to_numpy()
        return self._at(np.flatnonzero(chosen))

    def halves(self) -> tuple["Bank", "Bank"]:
        """Every other retraining, and the rest."""
        places = np.arange(len(self))
        return self._at(places[::2]), self._at(places[1::2])

    def _at(self, places: Sequence[int]) -> "Bank":
        return replace(
            self,
            rows=self.rows.iloc[places].reset_index(drop=True),
            kept=self.kept[places],
            losses=self.losses[places],
            right=None if self.right is None else self.right[places],
        )

    def check(self, about: Mapping[str, object]) -> None:
        """Refuse scores of another model, data or recipe than the bank is of.

        Raises:
            InputError: names what differs.
        """
        if differing := self.differing(about):
            name, ours, theirs = differing[0]
            raise InputError(f"The bank is of another {name}: {ours!r}, not {theirs!r}. Make one of its own.")

    def differing(self, about: Mapping[str, object]) -> list[tuple[str, object, object]]:
        """What is another here than there, as (name, here, there)."""
        here, there = (json.loads(json.dumps(dict(each))) for each in (self.about, about))
        return [(name, here.get(name), there.get(name)) for name in here | there if here.get(name) != there.get(name)]

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all: a row per retraining, ``kept`` and ``right`` as packed bits, ``losses`` as
        float32."""
        m = self.losses.shape[1]
        columns = {name: self.rows[name].to_numpy() for name in self.rows}
        columns["kept"] = pa.array([np.packbits(row).tobytes() for row in self.kept], pa.binary())
        columns["losses"] = pa.FixedSizeListArray.from_arrays(pa.array(self.losses.astype("float32").ravel()), m)
        if self.right is not None:
            columns["right"] = pa.array([np.packbits(row).tobytes() for row in self.right], pa.binary())
        table = pa.table(columns)
        about = json.dumps({"n": self.kept.shape[1], "m": m, "about": dict(self.about)}, sort_keys=True)
        table = table.replace_schema_metadata({"bank": about})
        path = place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fill_whole(path, lambda aside: pq.write_table(table, aside, compression="zstd"))

    @classmethod
    def load(cls, path: str | Path) -> "Bank":
        """Read what `save` has written.

        Raises:
            InputError: there is no such file, or it is no bank.
        """
        path = place(path)
        if not path.is_file():
            raise InputError(f"There is no bank {path}.")
        try:
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[b"bank"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no bank of retrainings: {error}") from error
        n, m = facts["n"], facts["m"]

        def bits(name: str, width: int) -> Bool[np.ndarray, "s width"]:
            rows = [np.frombuffer(row, dtype=np.uint8) for row in table[name].to_pylist()]
            return np.unpackbits(np.array(rows, dtype=np.uint8).reshape(len(rows), -1), axis=1, count=width).astype(
                bool
            )

        return cls(
            facts["about"],
            table.drop_columns(
                [name for name in ("kept", "losses", "right") if name in table.column_names]
            ).to_pandas(),
            bits("kept", n),
            table["losses"].combine_chunks().flatten().to_numpy().reshape(-1, m),
            bits("right", m) if "right" in table.column_names else None,
        )


def joined(parts: Sequence[Bank]) -> Bank:
    """The retrainings of several banks of one kind, one after another."""
    first = parts[0]
    return Bank(
        first.about,
        pd.concat([part.rows for part in parts], ignore_index=True),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("kept", "losses")),
        None if first.right is None else np.concatenate([part.right for part in parts]),
    )


Outcome = tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"] | None]


def bank(
    plan: Sequence[Retraining],
    outcome_of: Callable[[Retraining], Outcome],
    about: Mapping[str, object],
    folder: str | Path,
    *,
    known: Bank | None = None,
    part: tuple[int, int] = (0, 1),
    facts: Mapping[str, object] | None = None,
) -> Bank:
    """Do what of a plan is not done yet, and give the bank of all that is.

    Every retraining is written by itself as soon as it is done, so that a call that was killed goes on where it was.
    Several processes, each with another `part`, share the work; the last gives the bank of all.

    Args:
        outcome_of: retrains, and gives the queries' losses and whether they are answered rightly, as `outcomes` makes.
        about: what is trained, in values of JSON; see `Bank.check`.
        folder: keeps the retrainings that are done.
        known: a bank that has some of them.
        part: (k, of): do the k-th of so many parts of the plan alone, counted from 0.
        facts: what else each row says, such as the commit.

    Raises:
        InputError: the folder, or `known`, has retrainings of another model, data or recipe.
    """
    folder = place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    rows = (
        {} if known is None else {key: at for at, key in enumerate(known.rows[KEY].itertuples(index=False, name=None))}
    )
    if known is not None:
        known.check(about)
    k, of = part
    mine = [one for one in plan if one.key not in rows][k::of]
    with _only_new_garbage():
        for retraining in bar(mine, desc="retraining", unit="model"):
            path = folder / f"{retraining.name}.parquet"
            if path.is_file():
                Bank.load(path).check(about)
                continue
            losses, right = outcome_of(retraining)
            row = pd.DataFrame([retraining.key], columns=KEY).assign(**(facts or {}))
            Bank(about, row, retraining.kept[None], losses[None], None if right is None else right[None]).save(path)
    found = []
    for retraining in plan:
        path = folder / f"{retraining.name}.parquet"
        if retraining.key in rows:
            found.append(known._at([rows[retraining.key]]))
        elif path.is_file():
            found.append(Bank.load(path))
            found[-1].check(about)
        else:
            continue
        if not np.array_equal(found[-1].kept[0], retraining.kept):
            raise InputError(f"The retraining {retraining.name} in {folder} left out others than the plan does.")
    if not found:
        raise InputError("The plan has no retraining, or none of it is done.")
    return joined(found)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Leaves what there is by now out of garbage collections: the Trainer makes one as each training begins, and a walk
    through all that was imported takes a fifth of a small training's time. What was left out before stays so."""
    left_out_before = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not left_out_before:
            gc.unfreeze()


def outcomes(
    tuned: FineTuned, loss_fn: LossFn, right_fn: LossFn | None = None, *, batch_size: int = 32
) -> Callable[[Retraining], Outcome]:
    """What `bank` needs of a fine-tuned model of any family: fine-tunes it again, and measures its queries.

    Args:
        loss_fn, right_fn: ``(model, batch) -> (batch,)``: a query's loss, and whether the model answers it rightly.

    Raises:
        InputError: the model's adapter came from elsewhere, so that nobody knows how it was made; or this is one of
            several processes that torchrun or accelerate launch started, which would train every model together.
    """
    if processes.rank_and_count()[1] > 1:
        raise InputError("Retrainings are shared out by part=, over processes that are started by themselves.")
    if tuned.training is None:
        raise InputError("The adapter came from elsewhere, without its recipe: fine-tune it here to retrain it.")

    def outcome_of(retraining: Retraining) -> Outcome:
        model = retrain(
            tuned.training,
            retraining.kept,
            same_batches=retraining.batches == SAME,
            order=None if retraining.order < 0 else retraining.order,
        )
        losses, right = (
            None if of is None else of_each(model, tuned.query, of, tuned.collate, batch_size=batch_size)
            for of in (loss_fn, right_fn)
        )
        return losses, right

    return outcome_of
