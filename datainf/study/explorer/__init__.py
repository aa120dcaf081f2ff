"""The explorer: a page that needs no server and no network, on which queries and what acts on them can be looked at.

Pick a query, and see its most helpful and most harmful training examples side by side, the words that the influence
comes through, each part of the model's share, and whether comparing words would have found the example too.
"""

import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import itables
import itables.javascript
import jinja2
import numpy as np
import pandas as pd
from IPython.display import HTML
from jaxtyping import Float
from scipy import stats
from tokenizers.models import WordPiece
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import datainf
from datainf.attribution.tokens import token_influence
from datainf.evaluation.parts import parts
from datainf.models.losses import IGNORED
from datainf.study.ground_truth import Gradients
from datainf.study.plotting import label

LONG_BEGINNING = 12
"""Tokens with which all examples begin are shown as one from so many on."""

FOUND_BY_WORDS = 10
"""Of an example that a comparison of words puts among its first so many it is said that the words find it too."""


def collect(
    taken: Gradients,
    scores: Float[np.ndarray, "m n"],
    method: str,
    damping: Any,
    by_words: Float[np.ndarray, "m n"],
    losses: Float[np.ndarray, " n"],
    answers: pd.DataFrame,
    *,
    queries: int = 40,
    examples: int = 5,
) -> dict[str, Any]:
    """What the page shows, in values of JSON.

    Args:
        scores, method, damping: the scores, and what they were made by; sums over layers, not over ranks.
        by_words: scores by a comparison of words, such as BM25.
        losses: of the training examples, in nats.
        answers: the queries' columns loss and right.
        queries: how many are shown, the first ones.
        examples: of each how many helpful and how many harmful ones.
    """
    chosen, shown = taken.chosen, min(queries, scores.shape[0])
    some_queries = {name: rows[:shown] for name, rows in taken.query.items()}
    R = datainf.ihvp(taken.train, _with_shapes(some_queries, taken.query), method, damping, **_factors(taken, method))
    order = np.argsort(scores[:shown], axis=1, kind="stable")
    k = min(examples, scores.shape[1] // 2)
    picked = [
        {
            "helpful": [index for index in row[:k].tolist() if scores[query, index] < 0],
            "harmful": [index for index in row[::-1][:k].tolist() if scores[query, index] > 0],
        }
        for query, row in enumerate(order)
    ]
    needed = sorted({index for each in picked for side in each.values() for index in side})
    words_of = dict(
        zip(
            needed,
            token_influence(
                chosen.tuned.model,
                [chosen.tuned.train[index] for index in needed],
                chosen.loss_fn,
                R,
                collate_fn=chosen.tuned.collate,
            ),
            strict=True,
        )
    )
    of_parts = parts(taken.train)
    blocks = [name for name in of_parts if name in ("head", "low", "middle", "top")]
    rank_by_words = stats.rankdata(by_words[:shown], axis=1, method="max")  # of those that are not alike the last
    # A system prompt, say: it would fill every card, and part of it is often among the most colored.
    beginning = len(os.path.commonprefix([chosen.tuned.train[index]["input_ids"] for index in needed]))
    beginning = beginning if beginning >= LONG_BEGINNING else 0
    shares = _shares(taken, R, needed, {part: of_parts[part] for part in blocks})
    rank = scores.shape[1] - stats.rankdata(scores[:shown], axis=1, method="ordinal") + 1

    def card(query: int, index: int) -> dict[str, Any]:
        ids = chosen.tuned.train[index]["input_ids"]
        of_tokens = words_of[index].by_length.get(len(ids), np.zeros((shown, len(ids))))
        of_words = of_tokens[query].tolist()
        words, values = pieces(chosen.tuned.tokenizer, ids[beginning:], of_words[beginning:])
        if beginning:
            words, values = ["[the same beginning in all] ", *words], [sum(of_words[:beginning]), *values]
        return {
            "example": index,
            "score": float(scores[query, index]),
            "rank": int(rank[query, index]),
            "rank_by_words": int(rank_by_words[query, index]),
            "loss": float(losses[index]),
            "beginning": bool(beginning),
            "words": words,
            "values": [float(f"{value:.4g}") for value in values],
            "shares": {part: float(of_part[query, needed.index(index)]) for part, of_part in shares.items()},
        }

    return {
        "method": method,
        "n": scores.shape[1],
        "m": scores.shape[0],
        "found_by_words": FOUND_BY_WORDS,
        "has_head": "head" in blocks,
        "queries": [
            {
                "text": chosen.texts[1][query],
                "loss": float(answers["loss"].iloc[query]),
                "right": bool(answers["right"].iloc[query]),
                **{side: [card(query, index) for index in indices] for side, indices in picked[query].items()},
            }
            for query in range(shown)
        ],
    }


def _with_shapes(gradients: Mapping, like: datainf.GradientStore) -> datainf.GradientStore:
    return datainf.GradientStore(gradients, shapes=like.shapes)


def _factors(taken: Gradients, method: str) -> dict[str, Any]:
    return {"factors": taken.factors} if method == "ekfac" else {}


def _shares(
    taken: Gradients, R: Mapping[str, Tensor], examples: Sequence[int], of_parts: Mapping[str, Sequence[str]]
) -> dict[str, Float[Tensor, "m examples"]]:
    """What of the scores of some examples comes through each part; every layer is read once."""
    return {
        part: -sum(R[name].cpu().float() @ taken.train[name][examples].cpu().float().T for name in names)
        for part, names in of_parts.items()
    }


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], values: Sequence[float]
) -> tuple[list[str], list[float]]:
    """The text of every token, or of the few that make up a letter together, and the sum of their values: read one
    after another they are the example's text."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    if isinstance(tokenizer.backend_tokenizer.model, WordPiece):  # which writes no spaces
        return [name[2:] if name.startswith("##") else f" {name}" for name in names], list(values)
    if any(name.startswith("▁") for name in names):  # SentencePiece's decoding drops a leading one
        return [name.replace("▁", " ") for name in names], list(values)
    texts, sums, open_ids = [], [], []
    for one, value in zip(ids, values, strict=False):
        if open_ids:
            sums[-1] += value
        else:
            texts.append("")
            sums.append(value)
        open_ids.append(one)
        texts[-1] = tokenizer.decode(open_ids)
        if not texts[-1].endswith("\ufffd"):  # bytes that make no letter yet
            open_ids = []
    return texts, sums


def as_seen(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Sequence[int]]) -> str:
    """One encoded example in HTML, as the model sees it, with what the loss is of marked."""
    ids, labels = example["input_ids"], example["labels"]
    kept = labels if isinstance(labels, list) else [IGNORED] * len(ids)  # of a classifier one label, which is no token
    texts, counted = pieces(tokenizer, ids, [float(label != IGNORED) for label in kept])
    marked = [
        f'<mark style="background:#fde3b0">{escape(piece)}</mark>' if count else escape(piece)
        for piece, count in zip(texts, counted, strict=True)
    ]
    after = "" if isinstance(labels, list) else f"<p>label: <b>{labels}</b></p>"
    return (
        f'<div style="white-space:pre-wrap;border-left:4px solid #ccc;padding-left:1em">{"".join(marked)}</div>{after}'
    )


def fragment(data: Mapping[str, Any]) -> HTML:
    """The explorer for a notebook, in a frame of its own so that neither disturbs the other's looks."""
    page = _template("explorer.html").render(data=data, title="", parts=[], head="", whole=False)
    return HTML(f'<iframe srcdoc="{escape(page, quote=True)}" style="width:100%;height:900px;border:0"></iframe>')


def report(path: str | Path, title: str, data: Mapping[str, Any], said: Sequence[tuple[str, str]], table: pd.DataFrame):
    """Write the page that stands by itself: what was found, the explorer, and the whole table, to sort and to search.

    Args:
        said: headings and paragraphs in HTML that stand before the explorer, and after it those of `HOW_TO_READ`.
        table: of all training examples, as `audit.ranked` gives it.
    """
    bundle = resources.files("itables") / "html" / "dt_bundle.js"
    head = itables.javascript.generate_init_offline_itables_html(Path(str(bundle)))
    shown = table.drop(columns=["score_for_query", "change_without"])  # whose size is not calibrated
    heads = {"loss_of_alike": "loss of those alike", "harms": "queries harmed", "query": "harms most"}
    shown = shown.rename(columns=heads | _heads(shown))
    options = {"classes": "display compact", "pageLength": 25, "autoWidth": False, "showIndex": False}
    options |= {"maxBytes": 0, "connected": False, "display_logo_when_loading": False}
    largest_first = [list(shown).index(name) for name in ("score", "loss", *heads.values()) if name in shown]
    if "loss" in shown:
        options["order"] = [[list(shown).index("loss"), "desc"]]
    options["columnDefs"] = [{"targets": largest_first, "orderSequence": ["desc", "asc"]}]
    options["text_in_header_can_be_selected"] = False  # a click on it sorts
    with pd.option_context("display.float_format", "{:.3g}".format):
        rows = itables.to_html_datatable(shown, **options)
    page = _template("explorer.html").render(
        data=data, title=title, parts=said, head=head, table=rows, how_to_read=HOW_TO_READ, whole=True
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf8")


def _heads(table: pd.DataFrame) -> dict[str, str]:
    """The baselines' ranks by the baselines' names."""
    return {name: f"rank by {label(name.removeprefix('rank_'))}" for name in table if name.startswith("rank_")}


def _template(name: str) -> jinja2.Template:
    loader = jinja2.PackageLoader("datainf.study.explorer", ".")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


HOW_TO_READ = [
    (
        "The sign",
        "A score above zero is harmful: giving the training example more weight raises the query's loss. Below zero it "
        "is helpful. The absolute score says that an example matters, not which way.",
    ),
    (
        "The size",
        "Nats of the query's loss per unit of the example's weight, where each of the n examples has a weight of 1 and "
        "the loss is their mean: leaving the example out would change the query's loss by minus the score over n, if "
        "the fine-tuning were as smooth as the formula supposes. It is not: sizes are not calibrated, and may be many "
        "times too large. Compare scores with each other, and a change with the mean loss of the queries.",
    ),
    (
        "Why most are near zero",
        "Each example is one of n, and most have little to do with a given query. A few large scores are what to look "
        "at; there is no threshold, and the rank of an example in the middle means nothing. That the first ones are "
        "fine does not mean that all are: influence need not find what is wrong.",
    ),
    (
        "Which method",
        "Held against retraining on four tasks, both Exact at the damping that follows from the length of the "
        "fine-tuning, which asks for the recipe, and Generalized Fisher at damping 1, which asks for nothing, predict "
        "single queries better than DataInf on each. Exact at the paper's damping of 0.1 does not on every one. Of the "
        "mean of many queries all of them predict less, and on the one text task the opposite of what happens: where "
        "queries are of several kinds, look at them one by one, and at how many of them an example harms.",
    ),
    (
        "Wrong labels and responses",
        "Look at the training loss first: it needs no queries, and has found more of them than influence has. "
        "Influence answers another question, which examples act on these answers.",
    ),
    (
        "When to trust the words instead",
        "Where a comparison of words (BM25, rank 1 the most alike) finds the same helpful examples, influence has told "
        "you nothing new. What influence alone finds is worth a look, and is also where it may be wrong.",
    ),
]
"""How to read a score: headings and what is said."""
