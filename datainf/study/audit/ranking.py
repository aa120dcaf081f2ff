"""The training examples in order, the first of them as a report shows them, and the files that are written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from jaxtyping import Float
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from datainf.errors import InputError
from datainf.storage.files import write_whole

ALIKE = 10
"""An example's loss is compared with those of so many that are the most alike by their words."""

MOST_HARMFUL = 5
"""Of each query so many examples are counted among the most harmful."""

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
    loss_of_alike (the median of the `ALIKE` examples with the most similar words), change_without (what the mean
    query's loss is predicted to change by if it is left out, in nats), harms (of how many queries it is among the
    `MOST_HARMFUL` examples), query (the one it harms most, from 0), score_for_query, and of each baseline the example's
    rank: 1 is the most suspicious, of a comparison of words (`BY_WORDS`) the most like the queries.
    """
    n, harm, worst = scores.shape[1], scores.mean(axis=0), scores.argmax(axis=0)
    losses = baselines["training_loss"].mean(axis=0) if "training_loss" in baselines else np.full(n, np.nan)
    most_harmful = np.argsort(-scores, axis=1, kind="stable")[:, :MOST_HARMFUL]
    table = pd.DataFrame(
        {
            "example": range(n),
            "text": [" ".join(text.split()) for text in texts],
            **({} if labels is None else {"label": labels}),
            "score": harm,
            "loss": losses,
            "loss_of_alike": _of_alike(losses, texts),
            "change_without": -harm / n,
            "harms": np.bincount(most_harmful[np.take_along_axis(scores, most_harmful, axis=1) > 0], minlength=n),
            "query": worst,
            "score_for_query": scores[worst, range(n)],
        }
    )
    for name, each in baselines.items():
        table[f"rank_{name}"] = stats.rankdata((1 if name in BY_WORDS else -1) * each.mean(axis=0), method="ordinal")
    table = table.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", range(1, n + 1))
    return table


def _of_alike(losses: Float[np.ndarray, " n"], texts: Sequence[str]) -> Float[np.ndarray, " n"]:
    """The median loss of the examples that are most alike, by the cosine of TF-IDF word counts."""
    words = TfidfVectorizer(token_pattern=r"\S+").fit_transform(texts)
    k = min(ALIKE, len(texts) - 1)
    return np.median(losses[NearestNeighbors(n_neighbors=k, metric="cosine").fit(words).kneighbors()[1]], axis=1)


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


def chosen_by_hand(drop: Sequence[int], n: int) -> list[int]:
    """The places of the examples that a user wants to leave out.

    Raises:
        InputError: one is named twice or is no place of the n examples, or all are named.
    """
    if wrong := [place for place in drop if type(place) is not int or not 0 <= place < n]:
        raise InputError(f"drop must be places of training examples, 0 to {n - 1}, not {wrong[0]!r}.")
    if len(set(drop)) != len(drop) or len(drop) == n:
        raise InputError("drop must name each example once, and not all of them.")
    return list(drop)


def write(
    folder: Path,
    table: pd.DataFrame,
    train: Dataset,
    suspects: Sequence[int],
    scores: Float[np.ndarray, "m n"],
    *,
    trusted: bool = True,
) -> dict[str, Path]:
    """Write ranked.csv, all scores as scores.npy (in float32, a row per query), the suspects as suspects.jsonl, and the
    training file without them as filtered.jsonl, unless the scores are not to be `trusted`."""
    told_of = [
        name
        for name in ("rank", "rank_training_loss", "score", "loss", "loss_of_alike", "harms", "query")
        if name in table
    ]
    facts = table.set_index("example")[told_of]
    told = {index: {"example": index, **{name: facts[name][index].item() for name in facts}} for index in suspects}
    rows = {"suspects.jsonl": [{**train[index], "influence": told[index]} for index in suspects]}
    if trusted:
        rows["filtered.jsonl"] = [train[index] for index in sorted(set(range(len(train))) - set(suspects))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "filtered.jsonl").unlink(missing_ok=True)  # an earlier audit's
    files = {name: folder / name for name in ("ranked.csv", "scores.npy")}
    write_whole(files["ranked.csv"], table.to_csv(index=False, float_format="%.6g"))
    np.save(files["scores.npy"], scores.astype(np.float32))
    for name, some in rows.items():
        files[name] = folder / name
        write_whole(files[name], "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in some))
    return files


def suspicious(table: pd.DataFrame, count: int, query_losses: Sequence[float]) -> str:
    """The first examples of `ranked` by training loss and by influence, in HTML, each beside what tells whether it is
    wrong: the losses of those alike, or the queries that it harms."""
    m = len(query_losses)
    table = table.assign(query_loss=np.asarray(query_losses)[table["query"]])
    lists = {
        "Fitted worst: look here for wrong labels and responses": (
            "training_loss",
            {"loss": "loss, nats", "loss_of_alike": "of those alike"},
        ),
        "Most harmful for the mean query": (
            "influence",
            {
                "score": "score",
                "harms": f"queries harmed, of {m}",
                "query": "the one harmed most",
                "query_loss": "its loss, nats",
            },
        ),
    }
    html = ""
    for heading, (by, value) in lists.items():
        told = [*value, *({"label"} & set(table)), "text"]
        rows = table.set_index("example").loc[first(table, count, by), told].rename(columns=value).reset_index()
        rows["text"] = [text if len(text) <= SHOWN else f"{text[:SHOWN]} ..." for text in rows["text"]]
        with pd.option_context("display.max_colwidth", None):
            shown = rows.to_html(classes="said suspects", index=False, border=0, float_format="{:.3g}".format)
        html += f"<div><h3>{heading}</h3>{shown}</div>"
    return (
        f'<p>{READ_THEM}</p><div class="sides lists">{html}</div>'
        f"<p><i>Of those alike</i>: the median loss of the {ALIKE} examples with the most similar words. <i>Queries "
        f"harmed</i>: of how many it is among the {MOST_HARMFUL} most harmful. <b>Next:</b> read on in the table "
        "below: single mistakes may come far behind the others. Correct them in the training file, or audit again with "
        "drop=[...], the examples to leave out.</p>"
    )


READ_THEM = (
    "<b>These lists say where to look, not what to delete.</b> In six audits for which we knew what was wrong, the "
    "tenth of the examples with the largest losses held almost two thirds of it, among right examples that are hard to "
    "learn; the losses of similar examples may tell which those are. The list on the right is no list of mistakes: it "
    "says which examples act against these queries, right or wrong."
)
"""What stands above the suspects."""
