"""The demo tasks and the demo base."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from datainf.data.built_in import TASKS, generate
from datainf.data.built_in.tasks import MAX_ROWS, in_corpus
from datainf.demo import BASE
from datainf.demo.corpus import VERDICTS, sentences
from datainf.demo.train_base import train_base


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.mark.parametrize("task", TASKS)
def test_rows_follow_from_the_seed(task):
    assert generate(task, 50, 3).equals(generate(task, 50, 3))
    assert not generate(task, 50, 3).equals(generate(task, 50, 4))


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_unique_balanced_and_of_readable_length(task):
    frame = generate(task, 2000, 0)
    texts = list(TASKS[task])
    assert list(frame.columns) == [*texts, "label"]
    assert not frame.duplicated(texts).any()
    assert set(frame["label"]) == {0, 1}
    assert 0.45 <= frame["label"].mean() <= 0.6
    # Mixed, not sorted by label.
    assert 0.4 <= frame["label"][:500].mean() <= 0.65
    for column in texts:
        lengths = frame[column].str.split().str.len()
        assert lengths.min() >= 5
        assert lengths.max() <= 35
        assert frame[column].str.match(r"[A-Z].*[a-z]\.$").all()
        assert not frame[column].str.contains(r"  | ,|\{|\(|'", regex=True).any()


def test_pairs_of_either_label_share_words_but_are_not_equal():
    pairs = generate("demo-paraphrases", 500, 1)
    assert (pairs["sentence1"] != pairs["sentence2"]).all()
    shared = [
        len(set(one.lower().split()) & set(two.lower().split()))
        for one, two in zip(pairs["sentence1"], pairs["sentence2"], strict=True)
    ]
    pairs["shared"] = shared
    means = pairs.groupby("label")["shared"].mean()
    assert abs(means[0] - means[1]) < 1.5


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown demo task 'sst2': choose one of demo-reviews, demo-paraphrases"):
        generate("sst2", 10, 0)


@pytest.mark.parametrize("n", [0, MAX_ROWS + 1])
def test_number_of_rows_out_of_range(n):
    with pytest.raises(ValueError, match=f"between 1 and {MAX_ROWS} unique rows, not {n}"):
        generate("demo-reviews", n, 0)


def test_corpus_and_tasks_never_share_a_row():
    for task, columns in TASKS.items():
        rows = generate(task, 300, 0)[list(columns)].itertuples(index=False, name=None)
        assert not any(in_corpus(row) for row in rows)
    assert all(in_corpus(line.texts) for line in sentences(300, 0))


def test_base_is_small_and_loads_with_a_classification_head(tokenizer):
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4_000_000
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2, dtype=torch.float32)
    assert model.roberta.embeddings.word_embeddings.weight.dtype == torch.float32
    batch = tokenizer(
        ["A short one.", "word " * 300], truncation=True, max_length=128, padding=True, return_tensors="pt"
    )
    assert batch["input_ids"].shape == (2, 128)
    assert model(**batch).logits.shape == (2, 2)


def test_tokenizer_follows_roberta(tokenizer):
    assert tokenizer.model_max_length == 128
    pair = tokenizer("The film was dull.", "I liked it.", truncation=True, max_length=128)
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[0] == "<s>"
    assert tokens.count("</s>") == 3
    assert set(pair) == {"input_ids", "attention_mask"}
    # Any text survives, seen before or not, in lower case.
    assert tokenizer.decode(pair["input_ids"], skip_special_tokens=True).split()[:3] == ["the", "film", "was"]
    assert tokenizer.unk_token_id not in tokenizer("Zürich, 東京 & Ωmega")["input_ids"]


@pytest.mark.parametrize("task", TASKS)
def test_base_predicts_masked_words_of_unseen_rows(task, tokenizer):
    model = AutoModelForMaskedLM.from_pretrained(BASE, dtype=torch.float32).eval()
    rows = generate(task, 200, 12345)
    batch = tokenizer(*[rows[column].tolist() for column in TASKS[task]], padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    words = ids >= len(tokenizer.all_special_ids)
    masked = words & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.15)
    batch["input_ids"] = ids.masked_fill(masked, tokenizer.mask_token_id)
    with torch.no_grad():
        guesses = model(**batch).logits[masked].argmax(-1)
    truth = ids[masked]
    most_frequent = Counter(truth.tolist()).most_common(1)[0][1] / len(truth)
    assert (guesses == truth).float().mean() > 1.5 * most_frequent


@pytest.mark.parametrize("task", TASKS)
def test_base_reads_the_verdict_of_unseen_rows_from_the_opening_token(task, tokenizer):
    model = AutoModelForMaskedLM.from_pretrained(BASE, dtype=torch.float32).eval()
    rows = generate(task, 600, 54321)
    batch = tokenizer(*[rows[column].tolist() for column in TASKS[task]], padding=True, return_tensors="pt")
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in VERDICTS[task]]
    with torch.no_grad():
        verdicts = model(**batch).logits[:, 0, words].argmax(-1)
    accuracy = (verdicts == torch.tensor(rows["label"].to_numpy())).float().mean()
    # Above the share of the most frequent label, and not perfect: hard rows remain, above all among the pairs.
    assert rows["label"].value_counts(normalize=True).max() + 0.05 < accuracy < 1


def test_train_base_writes_a_folder_that_loads(tmp_path):
    train_base(tmp_path, steps=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2, dtype=torch.float32)
    assert model.config.vocab_size == len(tokenizer)
    assert model(**tokenizer("A film.", return_tensors="pt")).logits.isfinite().all()
