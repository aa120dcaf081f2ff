"""Audits of adapters that were not trained by this project, on data of which a part is known to be bad.

python -m benchmarks.audits chat --base path/to/SmolLM2-135M-Instruct --seed 0            # by TRL: pip install trl
python -m benchmarks.audits labels --base path/to/all-MiniLM-L6-v2 --data path/to/glue --seed 0     # by PEFT and a loop

chat: 200 conversations, the sentence transformations, one response in twenty exchanged for that of another class; TRL's
SFTTrainer trains on the assistant's tokens. labels: 400 texts of three classes, negative and positive reviews of SST-2
and questions of QQP, in CSV files, with twenty wrong labels. Both are then audited as by ``make audit``, and trained
again without the suspects. An adapter, gradients and retrainings that are in the folder already are taken.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.common import write
from datainf.data import text
from datainf.study.provenance import ROOT

CLASSES = ["negative review", "positive review", "question"]
RECIPES = {
    "chat": {"epochs": 3, "learning_rate": 2e-3, "batch_size": 8},
    "labels": {"epochs": 8, "learning_rate": 2e-3, "batch_size": 16},
}


def make_chat(folder: Path, base: str, data: Path | None, seed: int) -> None:
    """Conversations, some with another's response, and an adapter by TRL."""
    from trl import SFTConfig, SFTTrainer

    task = text.load("sentence_transformations", n_train=20, n_test=14, seed=seed)
    rng, rows = np.random.default_rng(seed), list(task.train)
    bad = sorted(rng.choice(len(rows), len(rows) // 20, replace=False).tolist())
    responses = [row["response"] for row in rows]
    for place in bad:
        others = [k for k, row in enumerate(rows) if row["class"] != rows[place]["class"]]
        responses[place] = rows[int(rng.choice(others))]["response"]
    of_class: dict[str, list[dict]] = {}
    for row in task.test:
        of_class.setdefault(row["class"], []).append(row)
    files = {
        "train": [_conversation(row["prompt"], given) for row, given in zip(rows, responses, strict=True)],
        "queries": [_conversation(row["prompt"], row["response"]) for own in of_class.values() for row in own[:4]],
        "judge": [_conversation(row["prompt"], row["response"]) for own in of_class.values() for row in own[4:]],
    }
    for name, conversations in files.items():
        lines = "".join(json.dumps({"messages": each}) + "\n" for each in conversations)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf8")
    (folder / "known_bad.json").write_text(json.dumps(bad))

    recipe = RECIPES["chat"]
    take = SFTConfig(
        output_dir=str(folder / "run"),
        num_train_epochs=recipe["epochs"],
        per_device_train_batch_size=recipe["batch_size"],
        learning_rate=recipe["learning_rate"],
        lr_scheduler_type="linear",
        seed=seed,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        max_length=256,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=take,
        train_dataset=Dataset.from_list([{"prompt": each[:1], "completion": each[1:]} for each in files["train"]]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))


def _conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def make_labels(folder: Path, base: str, data: Path | None, seed: int) -> None:
    """Texts of three classes, some with a wrong label, and an adapter by a plain loop."""
    if data is None:
        raise SystemExit("labels needs --data, a folder with sst2/train.tsv and qqp/train.tsv.")
    rng = np.random.default_rng(seed)
    reviews, questions = (pd.read_csv(data / name / "train.tsv", sep="\t", quoting=3) for name in ("sst2", "qqp"))
    reviews = reviews[reviews["sentence"].str.split().str.len() > 5]
    pools = [reviews.loc[reviews["label"] == label, "sentence"].str.strip().tolist() for label in (0, 1)]
    pools.append(questions["question1"].tolist())
    pools = [rng.permutation(np.array(pool, dtype=object)).tolist() for pool in pools]

    def drawn(count: int) -> list[tuple[str, int]]:
        rows = [(pools[k % 3].pop(), k % 3) for k in range(count)]
        return [rows[place] for place in rng.permutation(count)]

    train, queries, judge = drawn(400), drawn(60), drawn(300)
    bad = sorted(rng.choice(len(train), 20, replace=False).tolist())
    for place in bad:
        train[place] = (train[place][0], (train[place][1] + int(rng.integers(1, 3))) % 3)
    for name, rows in {"train": train, "queries": queries, "judge": judge}.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf8") as file:
            csv.writer(file).writerows([("text", "label"), *((words, CLASSES[label]) for words, label in rows)])
    (folder / "known_bad.json").write_text(json.dumps(bad))

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["value"])
    model = get_peft_model(model, lora).train()
    epochs, learning_rate, size = RECIPES["labels"].values()
    steps = epochs * (len(train) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(train), size):
            words, labels = zip(*(train[place] for place in order[start : start + size]), strict=True)
            batch = tokenizer(list(words), padding=True, truncation=True, max_length=128, return_tensors="pt")
            model(**batch, labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")


MAKERS: dict[str, Callable[[Path, str, Path | None, int], None]] = {"chat": make_chat, "labels": make_labels}


def audit(kind: str, folder: Path, base: str, orders: int) -> pd.DataFrame:
    """As ``make audit`` does it: a row per ranking, and what became of the models that were trained again."""
    ending = {"chat": "jsonl", "labels": "csv"}[kind]
    more = {
        **RECIPES[kind],
        "base": base,
        "labels": CLASSES if kind == "labels" else [],
        "seeds": orders,
        "suspects_by": "influence",
        "judge": str(folder / f"judge.{ending}"),
        "known_bad": str(folder / "known_bad.json"),
        "cache": str(folder / "cache"),
        "folder": str(folder / "results"),
    }
    named = {
        "ADAPTER": folder / "adapter",
        "TRAIN": folder / f"train.{ending}",
        "QUERIES": folder / f"queries.{ending}",
    }
    environment = {name: str(path) for name, path in named.items()} | {"AUDIT": json.dumps(more)}
    environment["OUT"] = str(folder / "audit")
    command = [sys.executable, "-m", "datainf.study.audit"]
    if subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode:
        raise SystemExit("The audit failed.")
    rankings = pd.read_csv(folder / "results" / "runs" / "your_adapter.csv")
    rankings = rankings[["method", "found_in_top_tenth", "auc", "n", "m", "seconds_gradients", "seconds_influence"]]
    if not orders:
        return rankings
    again = pd.read_csv(folder / "audit" / "retrained.csv").rename(columns={"trained_on": "method"})
    return pd.concat([rankings, again.assign(orders=orders)], ignore_index=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is not there, audit it, and keep the record."""
    parser = argparse.ArgumentParser(description="Audit an adapter that was trained outside this project.")
    parser.add_argument("kind", choices=MAKERS)
    parser.add_argument("--base", required=True, help="of the adapter: a hub id or a folder")
    parser.add_argument("--data", type=Path, help="of labels: a folder with sst2/ and qqp/ of GLUE")
    parser.add_argument("--seed", type=int, default=0, help="draws the data and the training")
    parser.add_argument(
        "--orders", type=int, default=3, help="orders of batches to train again with (3); 0: not at all"
    )
    parser.add_argument("--folder", type=Path, help="for all that is made (default: cache/audits/KIND-sSEED)")
    parser.add_argument("--output", type=Path, help="the record (default: results/audits/KIND-sSEED.csv)")
    options = parser.parse_args(arguments)
    name = f"{options.kind}-s{options.seed}"
    folder = (options.folder or ROOT / "cache" / "audits" / name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "adapter" / "adapter_model.safetensors").is_file():
        MAKERS[options.kind](folder, options.base, options.data, options.seed)
    found = audit(options.kind, folder, options.base, options.orders)
    record = found.assign(kind=options.kind, base=Path(options.base).name, seed=options.seed)
    write(record, options.output or ROOT / "results" / "audits" / f"{name}.csv")


if __name__ == "__main__":
    main()
