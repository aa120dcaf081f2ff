"""The audit's parts: what was learned, the ranking, its files, and whether leaving out helped."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BertTokenizerFast

import datainf
from datainf.data import own as data
from datainf.demo import BASES
from datainf.errors import InputError
from datainf.evaluation import retraining, selection
from datainf.evaluation.retraining import KEY, Bank
from datainf.models import own
from datainf.models.forward import of_each
from datainf.models.lora import Recipe
from datainf.models.reading import Reading
from datainf.study import audit, explorer, ground_truth
from datainf.study.audit.built_in import example as make_example


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    paths = make_example(tmp_path_factory.mktemp("audit"))
    rows, asked = data.load(paths["train"]), data.load(paths["queries"])
    recipe = Recipe(epochs=4, learning_rate=0.01, batch_size=16)
    loaded = own.load(paths["adapter"], rows, asked, reading=Reading("space"), recipe=recipe)
    return paths, rows, asked, loaded


@pytest.fixture(scope="module")
def taken(example, tmp_path_factory):
    _, rows, asked, loaded = example
    chosen = audit.subject(loaded, rows, asked.select(range(6)), "it")
    chosen = ground_truth.replace(
        chosen, tuned=ground_truth.replace(loaded.tuned, query=loaded.tuned.query.select(range(6)))
    )
    return ground_truth.gradients(chosen, {"batch_size": 8}, tmp_path_factory.mktemp("gradients"))


def test_the_example_is_what_it_says(example):
    paths, rows, asked, _ = example
    bad = json.loads(open(paths["known_bad"]).read())
    assert len(rows) == 200 and len(bad) == 10 and len(asked) == 40
    assert make_example(str(paths["train"]).rpartition("/")[0]) == paths  # made once


def test_an_adapter_read_by_another_template_is_found_out(example):
    paths, rows, asked, loaded = example
    right = audit.learned(loaded, rows)
    assert right.index.tolist() == ["in use", "plain"] and audit.warning_of(right) == ""
    for given in ("auto", "space"):  # which takes what fits
        found = audit.best_read(paths["adapter"], rows, asked, Reading(given))
        assert found[0].reading.template == "space" and found[1].equals(right)
    wrong = own.load(paths["adapter"], rows, asked, reading=Reading("plain"))
    assert "run again with AUDIT='{template: space}', and do not use" in audit.warning_of(audit.learned(wrong, rows))
    untrained = pd.DataFrame({"loss": [2.0], "base_loss": [2.1], "over_base": [2 / 2.1]}, index=["in use"])
    assert "hardly the examples" in audit.warning_of(untrained)


def test_an_adapter_whose_training_diverged_is_refused(example):
    paths, rows, asked, _ = example
    broken = own.load(paths["adapter"], rows, asked, reading=Reading("space"))
    next(p for name, p in broken.tuned.model.named_parameters() if "lora_" in name).data.fill_(float("nan"))
    with pytest.raises(InputError, match="have no finite loss by the adapter: its weights are not to be used"):
        audit.learned(broken, rows)


def test_more_than_memory_holds_is_refused_before_it_is_begun(example):
    model = example[3].tuned.model
    audit.check_room(datainf.estimate(model, 200, 40))
    with pytest.raises(InputError, match="The stage .* would hold .* of memory is free: give fewer queries"):
        audit.check_room(datainf.estimate(model, 200, 10**8))


def test_the_ranking_is_by_harm():
    scores = np.array([[1.0, -2.0, 3.0], [3.0, 0.0, -1.0]])
    table = audit.ranked(scores, {"loss": np.array([[5.0, 9.0, 7.0]] * 2)}, ["a", "b", "c"])
    assert table["example"].tolist() == [0, 2, 1] and table["rank"].tolist() == [1, 2, 3]
    assert table["score"].tolist() == [2, 1, -1] and table["query"].tolist() == [1, 0, 1]
    assert table["harms"].tolist() == [
        2,
        1,
        0,
    ]  # all of the three are among the first five; a helpful one harms nothing
    assert table["change_without"].tolist() == pytest.approx([-2 / 3, -1 / 3, 1 / 3])
    assert table["rank_loss"].tolist() == [3, 2, 1]
    assert audit.first(table, 2, "influence") == [0, 2] and audit.first(table, 2, "loss") == [1, 2]
    alike = audit.ranked(scores, {"bm25": np.array([[5.0, 9.0, -7.0]] * 2)}, ["a\nb", "b", "c"])
    assert alike["rank_bm25"].tolist() == [2, 1, 3] and alike["text"][0] == "a b"
    told = audit.ranked(scores, {"training_loss": scores}, list("abc"), ["x", "y", "z"])
    assert told["loss"].tolist() == [2, 1, -1] and told["loss_of_alike"].tolist() == pytest.approx([0, 0.5, 1.5])
    assert told["label"].tolist() == ["x", "z", "y"] and "<td>z</td>" in audit.suspicious(told, 2, [0.1, 0.7])
    with pytest.raises(InputError, match="suspects_by must be influence, not 'bm25'"):
        audit.first(alike, 1, "bm25")


def test_the_files_are_the_training_file_in_two(tmp_path):
    rows = Dataset.from_list([{"prompt": f"é{k}", "response": str(k)} for k in range(4)])
    table = audit.ranked(np.array([[0.0, 3.0, 1.0, 2.0]]), {}, list("abcd"))
    scores = np.array([[0.0, 3.0, 1.0, 2.0]])
    files = audit.write(tmp_path, table, rows, audit.first(table, 2, "influence"), scores)
    worst, rest = (
        [json.loads(line) for line in files[name].read_text().splitlines()]
        for name in ("suspects.jsonl", "filtered.jsonl")
    )
    assert [row["prompt"] for row in worst] == ["é1", "é3"] and worst[0]["influence"]["rank"] == 1
    assert worst[0]["influence"]["example"] == 1
    assert rest == [rows[0], rows[2]]
    assert pd.read_csv(files["ranked.csv"])["example"].tolist() == [1, 3, 2, 0]
    assert "filtered.jsonl" not in audit.write(tmp_path / "other", table, rows, [1], scores, trusted=False)
    assert np.load(files["scores.npy"]).tolist() == scores.tolist()
    assert audit.chosen_by_hand([3, 0], 4) == [3, 0]
    for drop, sentence in (
        ([2], "0 to 1, not 2"),
        (["a"], "not 'a'"),
        ([1, 1], "each example once"),
        ([0, 1], "not all"),
    ):
        with pytest.raises(InputError, match=sentence):
            audit.chosen_by_hand(drop, 2)


def made_up_bank(helps):
    plan = []
    for order in range(3):
        harm = np.arange(4.0)
        each = [retraining.full(4), selection.keep(harm, 0.5, "suspects"), selection.keep(-harm, 0.5, "random")]
        plan += [ground_truth.replace(one, order=order) for one in each]
    rows = pd.DataFrame([one.key for one in plan], columns=KEY)
    noise = np.repeat([0.0, 0.1, 0.2], 3)  # of the order of batches, which all models of it share
    loss = 1 + noise - helps * (rows["method"] == "suspects").to_numpy() + 0.01 * np.arange(9)
    return Bank(
        {}, rows, np.stack([one.kept for one in plan]), np.tile(loss[:, None], (1, 5)), np.ones((9, 5), dtype=bool)
    )


def test_whether_it_helped_is_paired_by_order():
    found = audit.whether_it_helped(made_up_bank(helps=0.5))
    assert found.index.tolist() == ["all data", "without suspects", "without random"]
    gain = found.loc["without suspects"]
    assert gain["loss_gain"] == pytest.approx(0.49) and gain["loss_gain_low"] == pytest.approx(0.49)
    assert found.loc["without random", "loss_gain"] == pytest.approx(-0.02)
    assert audit.readable(found).iloc[1, 1] == "+0.490 [+0.490, +0.490]"


def test_without_a_recipe_nothing_is_trained_again(example, tmp_path):
    paths, rows, asked, _ = example
    chosen = audit.subject(own.load(paths["adapter"], rows, asked), rows, asked, "it")
    with pytest.raises(InputError, match="the adapter's recipe must be known"):
        audit.retrained(chosen, chosen.tuned.query, [3], 1, tmp_path)


def fit_of(taken):
    """The training examples' losses, made up, and the queries' answers."""
    return np.linspace(1, 2, len(taken.chosen.tuned.train)), audit.fitted(taken.chosen, taken.chosen.tuned.query)


def test_the_page_shows_the_scores_and_their_words(taken, tmp_path):
    scores = taken.influence("exact@1")
    words = ground_truth.baselines_of(taken)["bm25"]()
    losses, answers = fit_of(taken)
    page = explorer.collect(taken, scores, "exact", 1.0, words, losses, answers, queries=2, examples=3)
    assert len(page["queries"]) == 2
    for number, query in enumerate(page["queries"]):
        order = np.argsort(scores[number])
        helpful = [index for index in order[:3] if scores[number, index] < 0]
        harmful = [index for index in order[::-1][:3] if scores[number, index] > 0]
        assert [card["example"] for card in query["helpful"]] == helpful
        assert [card["example"] for card in query["harmful"]] == harmful
        assert query["loss"] == pytest.approx(answers["loss"][number]) and query["right"] == answers["right"][number]
        for card in (*query["helpful"], *query["harmful"]):
            size = abs(scores[number]).max()
            assert card["score"] == pytest.approx(scores[number, card["example"]])
            assert card["loss"] == losses[card["example"]]
            assert sum(card["values"]) == pytest.approx(card["score"], abs=1e-3 * size)
            assert sum(card["shares"].values()) == pytest.approx(card["score"], abs=1e-3 * size)
            assert len(card["words"]) == len(card["values"])
            text = taken.chosen.texts[0][card["example"]].replace("\n→", "")
            assert re.sub(r"\s+", " ", "".join(card["words"]).replace("<s>", "").replace("</s>", "")).strip() == re.sub(
                r"\s+", " ", text
            )
    table = audit.ranked(scores, {"bm25": words}, taken.chosen.texts[0])
    path = tmp_path / "report.html"
    explorer.report(path, "An <audit>", page, [("What", "<p>It.</p>")], table)
    html = path.read_text()
    assert "An &lt;audit&gt;" in html and path.stat().st_size < 5e6
    assert not re.search(r"""(src|href)=["']?https?://(?!itables)""", html)  # nothing is fetched
    held = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert held == json.loads(json.dumps(page))


def test_a_long_beginning_of_all_examples_is_shown_as_one(taken, monkeypatch):
    """As a system prompt is; what comes through it is not lost."""
    scores = taken.influence("exact@1")
    monkeypatch.setattr(explorer, "LONG_BEGINNING", 3)
    page = explorer.collect(taken, scores, "exact", 1.0, -scores, *fit_of(taken), queries=1, examples=2)
    for card in page["queries"][0]["harmful"]:
        assert card["words"][0] == "[the same beginning in all] " and "chatbot" not in "".join(card["words"])
        assert sum(card["values"]) == pytest.approx(card["score"], abs=1e-3 * abs(scores).max())


def test_suspects_by_loss_stand_beside_those_by_influence():
    losses = np.array([[5.0, 9.0, 0.5]])
    table = audit.ranked(np.array([[1.0, 3.0, 2.0]]), {"training_loss": losses}, ["a <b>", "c" * 300, "d"])
    assert table["loss"].tolist() == [9, 0.5, 5]
    by_loss, by_influence = audit.suspicious(table, 2, [0.123]).split("Most harmful")
    assert "0.123" in by_influence
    assert "a &lt;b&gt;" in by_loss and f"{'c' * audit.SHOWN} ..." in by_loss and ">d<" not in by_loss
    assert ">d<" in by_influence and "a &lt;b" not in by_influence


def test_how_well_each_label_is_fitted(taken):
    answers = audit.fitted(taken.chosen, taken.chosen.tuned.query)
    own_losses = of_each(
        taken.chosen.tuned.model, taken.chosen.tuned.query, taken.chosen.loss_fn, taken.chosen.tuned.collate
    )
    assert len(answers) == 6 and answers["loss"].to_numpy() == pytest.approx(own_losses, rel=1e-4)
    made_up = pd.DataFrame({"loss": [1.0, 3.0, 5.0], "right": [True, False, True]})
    table = audit.fitted_by_label({"training": (made_up, [1, 0, 1]), "queries": (made_up[:1], [0])})
    assert table["training"].loc["1"].tolist() == [2, 3, 1] and table["training"].loc["0"].tolist() == [1, 3, 0]
    assert table["queries"].loc["0"].tolist() == [1, 1, 1] and table["queries"].loc["1"].isna().all()
    assert audit.readable_fit(table).loc["1"].tolist() == ["2", "3.000", "100%", "", "", ""]


def test_what_a_text_holds_cannot_leave_its_place(taken, tmp_path):
    evil = "</script><script>alert(1)</script>"
    chosen = ground_truth.replace(taken.chosen, texts=([evil] * 200, [evil] * 6))
    scores = taken.influence("hessian_free")
    page = explorer.collect(
        ground_truth.replace(taken, chosen=chosen),
        scores,
        "hessian_free",
        0.1,
        -scores,
        *fit_of(taken),
        queries=1,
        examples=1,
    )
    explorer.report(tmp_path / "report.html", evil, page, [], audit.ranked(scores, {}, [evil] * 200))
    assert evil not in (tmp_path / "report.html").read_text()
    assert evil not in explorer.fragment(page).data


def test_pieces_are_the_text(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "warm", "mel", "##ons", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    of_words = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    ids = of_words("The warm melons.", add_special_tokens=False)["input_ids"]
    assert explorer.pieces(of_words, ids, range(5)) == ([" the", " warm", " mel", "ons", " ."], [0, 1, 2, 3, 4])
    for base in ("demo-llama", "demo-roberta"):
        tokenizer = AutoTokenizer.from_pretrained(BASES[base])
        tokenizer.add_tokens(["##"])  # as some vocabularies of byte pairs have
        for words in ("The warm cooks cover melons.", "Ein Übel, 你好"):
            ids = tokenizer(words, add_special_tokens=False)["input_ids"]
            texts, values = explorer.pieces(tokenizer, ids, [1.0] * len(ids))
            assert "".join(texts).strip() == tokenizer.decode(ids).strip()
            assert len(values) == len(texts) and sum(values) == len(ids)
