"""Something to audit where nothing is given."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from datainf.data import text
from datainf.models import causal_lm, lora
from datainf.models.lora import Recipe
from datainf.storage.files import write_whole
from datainf.study.provenance import rooted


def example(folder: str | Path, *, seed: int = 0) -> dict[str, str]:
    """Something to audit where nothing is given: a small language model's adapter, its training file, of which one
    response in twenty is another example's, and queries; made once, into a folder.

    Returns:
        The paths of adapter, train, queries and known_bad, the places of the exchanged ones.
    """
    folder = rooted(folder)
    paths = {"adapter": folder / "model" / lora.ADAPTER, "train": folder / "train.jsonl"}
    paths |= {"queries": folder / "queries.jsonl", "known_bad": folder / "known_bad.json"}
    task = text.load("sentence_transformations", n_train=20, n_test=4, seed=seed)
    rng, n = np.random.default_rng(seed), len(task.train)
    bad, responses = rng.choice(n, n // 20, replace=False), list(task.train["response"])
    others = {
        index: rng.choice(np.flatnonzero(np.array(task.train["class"]) != task.train["class"][index]))
        for index in bad.tolist()
    }
    given = [responses[others.get(index, index)] for index in range(n)]
    task = replace(task, train=task.train.remove_columns("response").add_column("response", given))
    recipe = Recipe(
        rank=4, alpha=32, dropout=0.0, targets=("q_proj", "v_proj"), learning_rate=0.01, epochs=4, batch_size=16
    )
    causal_lm.fine_tune("demo-llama", task, recipe, folder=folder / "model")
    for name, split in (("train", task.train), ("queries", task.test)):
        split.select_columns(["prompt", "response"]).to_json(paths[name])
    write_whole(paths["known_bad"], json.dumps(sorted(bad.tolist())))
    return {name: str(path) for name, path in paths.items()}
