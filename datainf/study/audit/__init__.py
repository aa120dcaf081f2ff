"""An adapter of your own, audited: what notebook 80 does, step by step.

Rank the training examples by what they do to some answers, look, leave the suspects out, and see whether it helped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from datasets import Dataset
from jaxtyping import Float
from scipy import stats

from datainf.attribution.estimating import Estimate
from datainf.data import own
from datainf.errors import InputError
from datainf.evaluation import retraining, selection
from datainf.evaluation.paired import confidence_interval
from datainf.evaluation.retraining import Bank
from datainf.models import own as own_models
from datainf.models.forward import of_each
from datainf.models.reading import TEMPLATES, Reading, encode, label_of
from datainf.storage.files import write_whole
from datainf.storage.memory import in_words
from datainf.study.ground_truth import Subject
from datainf.study.plotting import label

SAMPLE = 64
"""Training examples on which it is seen whether the adapter has learned them."""


SHOWN = 240
"""Characters of a suspect's text at the top of a report."""

MUCH_LOWER = 0.8
"""Of two templates the one whose loss, over the base's, is below this part of the other's is the one trained on."""

IN_USE = "in use"
"""Of the templates that could write the examples the one that does."""

TEMPLATE_NAMES = {
    **dict.fromkeys(("auto", "chat"), "the tokenizer's chat template"),
    "plain": "writing prompt and response one after the other",
    "space": "writing prompt and response with a space between",
}

BY_WORDS = ("bm25", "tfidf")
"""Comparisons of words, of which rank 1 is the most alike; of all others it is the most suspicious."""


@dataclass(frozen=True)
class OwnTask:
    """What a record says of examples of one's own."""

    name: str
    revision: str


def subject(adapter: own_models.Adapter, train: Dataset, query: Dataset, name: str) -> Subject:
    """An adapter and its examples, as the gradients, methods and baselines of the study take them."""
    columns = adapter.reading.text_columns
    texts = tuple([own.as_text(row, columns) for row in each] for each in (train, query))
    task = OwnTask(name, own.revision_of(train, query))
    return Subject(task, adapter.tuned, adapter.loss_fn, adapter.right_fn, texts, adapter.is_classifier)


def halved(chosen: Subject) -> tuple[Subject, Dataset]:
    """The subject with the first half of its queries, and the other half, which no score has seen."""
    half = len(chosen.tuned.query) // 2
    first, rest = (chosen.tuned.query.select(each) for each in (range(half), range(half, len(chosen.tuned.query))))
    return replace(
        chosen, tuned=replace(chosen.tuned, query=first), texts=(chosen.texts[0], chosen.texts[1][:half])
    ), rest


def title_of(adapter: str) -> str:
    """The last two parts of the folder, since the last is often but "adapter"."""
    return "/".join(Path(adapter).absolute().parts[-2:])


def fitted(chosen: Subject, examples: Dataset) -> pd.DataFrame:
    """Each example's loss, in nats, and whether the model answers it rightly: a language model with every token."""
    take = {"collate": chosen.tuned.collate, "batch_size": 8}
    measured = {"loss": chosen.loss_fn, "right": chosen.right_fn}
    return pd.DataFrame({name: of_each(chosen.tuned.model, examples, each, **take) for name, each in measured.items()})


def fitted_by_label(sets: Mapping[str, tuple[pd.DataFrame, Sequence]]) -> pd.DataFrame:
    """How many examples of each label each set has, their mean loss in nats, and the share answered rightly.

    Args:
        sets: by what they are called, `fitted` and the examples' labels.
    """
    found = {}
    for name, (each, labels) in sets.items():
        by_label = each.groupby([label_of(label) for label in labels])
        found[name] = by_label.agg(n=("loss", "size"), loss=("loss", "mean"), right=("right", "mean"))
    return pd.concat(found, axis=1).sort_index().rename_axis(index="label")


def readable_fit(by_label: pd.DataFrame) -> pd.DataFrame:
    """`fitted_by_label` in words."""
    shown = {"n": ("n", "{:.0f}"), "loss": ("mean loss, nats", "{:.3f}"), "right": ("right", "{:.0%}")}
    columns = {(one, shown[name][0]): by_label[one, name].map(shown[name][1].format) for one, name in by_label}
    return pd.DataFrame(columns).replace("nan", "").replace("nan%", "")


def summary(
    adapter: own_models.Adapter,
    chosen: Subject,
    found: pd.DataFrame,
    answers: pd.DataFrame,
    method: str,
    suspects: int,
    by: str,
) -> str:
    """What a report says it is of, in HTML; `found` is what `learned` gave, `answers` the queries as `fitted`."""
    tuned, kind = chosen.tuned, "classifier" if chosen.labelled else "language model"
    base = Path(getattr(tuned.model.get_base_model(), "name_or_path", "") or "its base").name  # no one's disk
    facts = {
        "model": f"a {kind} on {base}",
        "training examples": f"{len(tuned.train)}, of mean loss {found['loss'].iloc[0]:.3f} nats (without the adapter "
        f"{found['base_loss'].iloc[0]:.3f}: {'not learned' if warning_of(found) else 'learned'}), in a sample",
        "queries": f"{len(answers)}, of mean loss {answers['loss'].mean():.3f} nats; {answers['right'].sum()} are "
        "answered as they should be",
        "read": "as columns of text" if chosen.labelled else f"by {TEMPLATE_NAMES[adapter.reading.template]}",
        "ranked by": label(method),
        "suspects": f"the first {suspects} by {label(by)}, in suspects.jsonl",
        "numbers": "examples and queries are counted from 0, in the order of their files",
    }
    rows = "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in facts.items())
    return f'<table class="said facts-of">{rows}</table>'


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


def best_read(
    adapter: str, train: Dataset, query: Dataset, reading: Reading, **options
) -> tuple[own_models.Adapter, pd.DataFrame]:
    """`models.own.load`; where ``template`` is "auto" and texts may be written in several ways, by the one that the
    adapter has learned best.

    Returns:
        The adapter, and what `learned` says of it.
    """
    loaded = own_models.load(adapter, train, query, reading=reading, **options)
    found = learned(loaded, train)
    if reading.template == "auto" and (best := found["over_base"].idxmin()) != IN_USE:
        loaded = loaded.read_by(best, train, query)
        found = learned(loaded, train)
    return loaded, found


def learned(adapter: own_models.Adapter, train: Dataset) -> pd.DataFrame:
    """Whether the adapter has learned its training examples as they are read here: the mean loss of a sample with it
    and without, a row per template that could write them, the one in use first.

    An adapter that is read by another template than it was trained by is not much better than its base, or better by
    that other.

    Raises:
        InputError: the losses are no numbers, as of a training that diverged.
    """
    sample, in_use, rows = train.select(range(min(SAMPLE, len(train)))), adapter.reading.template, {}
    texts_alone = not adapter.is_classifier and isinstance(own.conversation(sample[0], "Training example 0")[1], str)
    in_use = "plain" if in_use == "auto" and texts_alone else in_use
    others = [name for name in TEMPLATES if name not in (in_use, "auto")] if texts_alone else []
    for template in [in_use, *others]:
        if template == "chat" and not adapter.tuned.tokenizer.chat_template:
            continue
        encoded = adapter.tuned.train.select(range(len(sample)))
        if template != in_use:
            other = replace(adapter.reading, template=template)
            try:
                encoded = encode(sample, adapter.tuned.tokenizer, other)
            except InputError:  # by which these examples cannot be written
                continue
        with_it, without = adapter.losses_of(encoded)
        if not np.isfinite([with_it.mean(), without.mean()]).all():
            whose = "the adapter" if np.isfinite(without.mean()) else "its base"
            raise InputError(f"The training examples have no finite loss by {whose}: its weights are not to be used.")
        rows[IN_USE if template == in_use else template] = {"loss": with_it.mean(), "base_loss": without.mean()}
    table = pd.DataFrame(rows).T.rename_axis("template")
    return table.assign(over_base=table["loss"] / table["base_loss"])


def warning_of(found: pd.DataFrame) -> str:
    """What is amiss by `learned`, and what to do; empty where nothing is."""
    ours, best = found.iloc[0], found["over_base"].idxmin()
    rival = found.loc[best]
    better = best != IN_USE and rival["over_base"] < MUCH_LOWER * ours["over_base"]
    if ours["over_base"] < own_models.TUNED_IS_BELOW and not better:
        return ""
    said = f"With the adapter the mean training loss is {ours['loss']:.2f} nats, without it {ours['base_loss']:.2f}"
    if better:
        said += (
            f"; with the template {best} it is {rival['loss']:.2f}, and {rival['base_loss']:.2f} without. The adapter "
        )
        return (
            f"{said}was trained on that text: run again with AUDIT='{{template: {best}}}', and do not use these scores."
        )
    return (
        f"{said}: these are hardly the examples, or not the text, that the adapter was trained on. Do not use these "
        "scores before that is clear."
    )


def check_room(estimated: Estimate) -> None:
    """Refuse what memory does not hold, before long work starts.

    Raises:
        InputError: names the stage that needs most.
    """
    most, free = estimated.stages["peak_bytes"].astype(float), psutil.virtual_memory().available
    if most.max() > free:
        raise InputError(
            f"The stage {most.idxmax()!r} would hold {in_words(most.max())}, and {in_words(free)} of memory is free: "
            "give fewer queries, or fewer training examples."
        )


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


def retrained(chosen: Subject, judged: Dataset, suspects: Sequence[int], seeds: int, folder: Path) -> Bank:
    """Fine-tune on all examples, without the suspects, and without as many at random, each with several orders of
    batches, and measure examples that no score has seen.

    Raises:
        InputError: there is no recipe.
    """
    if chosen.tuned.training is None:
        raise InputError("To train again, the adapter's recipe must be known: give epochs and learning_rate.")
    n, share, plan = len(chosen.tuned.train), 1 - len(suspects) / len(chosen.tuned.train), []
    harm = np.isin(np.arange(n), suspects).astype(float)
    for order in range(seeds):
        chance = np.random.default_rng(order).standard_normal(n)
        each = [
            retraining.full(n),
            selection.keep(harm, share, "suspects"),
            selection.keep(chance, share, "random"),
        ]
        plan += [replace(one, order=order) for one in each]
    outcome_of = retraining.outcomes(replace(chosen.tuned, query=judged), chosen.loss_fn, chosen.right_fn, batch_size=8)
    about = {"task": chosen.task.name, "data": chosen.task.revision, "judged_on": own.revision_of(judged)}
    about["recipe"] = asdict(chosen.tuned.training.recipe)
    return retraining.bank(plan, outcome_of, about, folder)


def whether_it_helped(bank: Bank) -> pd.DataFrame:
    """The loss and the share of right answers of the models that `retrained` made, mean over orders of batches, and by
    how much they are better than those of all data, paired by order, with a 95% interval (Student's t)."""
    rows = {}
    orders = sorted(bank.rows["order"].unique())
    full = {order: bank.select(design="full", order=order) for order in orders}
    for name, values in {
        "all data": {"design": "full"},
        "suspects": {"method": "suspects"},
        "random": {"method": "random"},
    }.items():
        some = [bank.select(order=order, **values) for order in orders]
        found = {"loss": np.mean([each.losses.mean() for each in some])}
        gains = {
            "loss_gain": [
                full[order].losses.mean() - each.losses.mean() for order, each in zip(orders, some, strict=True)
            ]
        }
        if bank.right is not None:
            found["right"] = np.mean([each.right.mean() for each in some])
            gains["right_gain"] = [
                each.right.mean() - full[order].right.mean() for order, each in zip(orders, some, strict=True)
            ]
        for gain, each in gains.items():
            low, high = confidence_interval(pd.Series(each))
            found |= {gain: np.mean(each), f"{gain}_low": low, f"{gain}_high": high}
        rows["without " + name if name != "all data" else name] = found
    return pd.DataFrame(rows).T


def readable(helped: pd.DataFrame) -> pd.DataFrame:
    """`whether_it_helped` with each gain and its interval in one cell."""

    def gain(row: pd.Series, name: str) -> str:
        value, low, high = row[[name, f"{name}_low", f"{name}_high"]]
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"

    table = pd.DataFrame({"loss, nats": helped["loss"].map("{:.3f}".format)})
    table["lower than of all data by"] = helped.apply(gain, axis=1, name="loss_gain")
    if "right" in helped:
        table["right answers"] = helped["right"].map("{:.1%}".format)
        table["more than of all data by"] = helped.apply(gain, axis=1, name="right_gain")
    table.iloc[0, 1::2] = ""
    return table
