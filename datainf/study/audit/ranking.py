"""The training examples in order, the first of them as a report shows them, and the files that are written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float
from scipy import stats

from datainf.errors import InputError
from datainf.storage.files import write_whole

SHOWN = 240
"""Characters of a suspect's text at the top of a report."""

BY_WORDS = ("bm25", "tfidf")
"""Comparisons of words, of which rank 1 is the most alike; of all others it is the most suspicious."""


def ranked(
    scores: Float[np.ndarray, "m n"],
    baselines: Mapping[str, Float[np.ndarray, "m n"]],
    texts: Sequence[str],
    labels: Sequence | None = None,
) -> pd.DataFrame:
    """The training examples, the most harmful for the mean query first.

    Columns rank, example (its place in the file, from 0), text (in one line), label (where `labels` are given), score
    (nats per unit of weight), loss (the example's own, in nats, where "training_loss" is among the baselines),
    change_without (what the mean query's loss is predicted to change by if it is left out, in nats), query (the one it
    harms most, from 0), score_for_query, and of each baseline the example's rank: 1 is the most suspicious, of a
    comparison of words (`BY_WORDS`) the most like the queries.
    """
    n, harm, worst = scores.shape[1], scores.mean(axis=0), scores.argmax(axis=0)
    table = pd.DataFrame(
        {
            "example": range(n),
            "text": [" ".join(text.split()) for text in texts],
            **({} if labels is None else {"label": labels}),
            "score": harm,
            "loss": baselines["training_loss"].mean(axis=0) if "training_loss" in baselines else np.nan,
            "change_without": -harm / n,
            "query": worst,
            "score_for_query": scores[worst, range(n)],
        }
    )
    for name, each in baselines.items():
        table[f"rank_{name}"] = stats.rankdata((1 if name in BY_WORDS else -1) * each.mean(axis=0), method="ordinal")
    table = table.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", range(1, n + 1))
    return table


def first(table: pd.DataFrame, count: int, by: str) -> list[int]:
    """The places of the most suspicious examples of `ranked`, by "influence" or the rank of a baseline.

    Raises:
        InputError: there is no such rank, or it is of no suspicion.
    """
    known = {"influence": "rank"} | {
        name.removeprefix("rank_"): name for name in table if name.startswith("rank_") and not name.endswith(BY_WORDS)
    }
    if by not in known:
        raise InputError(f"suspects_by must be {', '.join(known)}, not {by!r}.")
    return table.sort_values(known[by])["example"].head(count).tolist()


def write(
    folder: Path, table: pd.DataFrame, train: Dataset, suspects: Sequence[int], *, trusted: bool = True
) -> dict[str, Path]:
    """Write ranked.csv, the suspects as suspects.jsonl, and the training file without them as filtered.jsonl, unless
    the scores are not to be `trusted`."""
    told_of = [
        name for name in ("rank", "rank_training_loss", "score", "loss", "change_without", "query") if name in table
    ]
    facts = table.set_index("example")[told_of].astype({"score": float})
    told = {index: {"example": index, **{name: facts[name][index].item() for name in facts}} for index in suspects}
    rows = {"suspects.jsonl": [{**train[index], "influence": told[index]} for index in suspects]}
    if trusted:
        rows["filtered.jsonl"] = [train[index] for index in sorted(set(range(len(train))) - set(suspects))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "filtered.jsonl").unlink(missing_ok=True)  # an earlier audit's
    files = {"ranked.csv": folder / "ranked.csv"}
    write_whole(files["ranked.csv"], table.to_csv(index=False, float_format="%.6g"))
    for name, some in rows.items():
        files[name] = folder / name
        write_whole(files[name], "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in some))
    return files


def suspicious(table: pd.DataFrame, count: int, query_losses: Sequence[float]) -> str:
    """The first examples of `ranked` by training loss and by influence, in HTML, with the losses that follow and the
    query that each harms most, and which are among both."""
    table = table.assign(query_loss=np.asarray(query_losses)[table["query"]])
    lists = {
        "Fitted worst: look here for wrong labels and responses": ("training_loss", {"loss": "loss, nats"}),
        "Most harmful for the mean query": (
            "influence",
            {"score": "score", "query": "query harmed most", "query_loss": "its loss, nats"},
        ),
    }
    places, html = {}, ""
    for heading, (by, value) in lists.items():
        places[by] = first(table, count, by)
        told = [*value, *({"label"} & set(table)), "text"]
        rows = table.set_index("example").loc[places[by], told].rename(columns=value).reset_index()
        rows["text"] = [text if len(text) <= SHOWN else f"{text[:SHOWN]} ..." for text in rows["text"]]
        with pd.option_context("display.max_colwidth", None):
            shown = rows.to_html(classes="said suspects", index=False, border=0, float_format="{:.3g}".format)
        html += f"<div><h3>{heading}</h3>{shown}{_beyond(table, count) if by == 'training_loss' else ''}</div>"
    both = [str(place) for place in places["influence"] if place in places["training_loss"]]
    return (
        f'<div class="sides">{html}</div><p>In both lists: {", ".join(both) or "none"}.</p><p><b>Next:</b> read the '
        "list on the left, correct or drop what is wrong in the training file, and train again. The one on the right "
        "is no list of wrong labels: it says which examples act against these queries, right or wrong.</p>"
    )


def _beyond(table: pd.DataFrame, count: int) -> str:
    """The losses that come after those which are listed: losses rarely have a gap that says where to stop."""
    losses = table["loss"].sort_values(ascending=False)
    following = ", ".join(f"{loss:.3g}" for loss in losses[count : count + 5])
    return (
        f"<p>The next losses: {following}; the median of all: {losses.median():.3g} nats. Go on in ranked.csv, by "
        "rank_training_loss, until what you read is right.</p>"
    )
