"""Text generation: tasks that make sense, losses of the right tokens, models that learn their own task's adapter."""

import json
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import datainf
from datainf.data import text
from datainf.data.built_in import math_problems, transformations
from datainf.errors import InputError
from datainf.gradients.layers import trainable_layers
from datainf.models import causal_lm, lora, losses
from datainf.models.lora import Recipe

RECIPE = {"rank": 2, "alpha": 8, "targets": ("q_proj", "v_proj"), "learning_rate": 1e-2, "epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama in the hub's format, with grouped-query attention and a tokenizer without a padding token."""
    folder = tmp_path_factory.mktemp("llama")
    letters = sorted({letter for task in text.TASKS for row in text.generate(task, 0)["prompt"] for letter in row})
    vocabulary = {
        token: i
        for i, token in enumerate(
            ["<unk>", "<s>", "</s>", *letters, *set("*ABCDEFGHIJKLMNOPQRSTUVWXYZ+=()") - set(letters)]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,  # so that an adapter can move the logits of a base that was never trained
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small():
    return text.load("math_without_reasoning", n_train=3, n_test=1)


@pytest.fixture(scope="module")
def tuned(checkpoint, small, tmp_path_factory):
    return causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE), folder=tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize("task", text.TASKS)
def test_tasks_have_ten_classes_of_ninety_and_ten_unique_examples(task):
    data = text.load(task, seed=3)
    train, test = data.train.to_pandas(), data.test.to_pandas()
    assert len(data.classes) == 10
    assert (train["class"].value_counts() == 90).all() and (test["class"].value_counts() == 10).all()
    prompts = [*train["prompt"], *test["prompt"]]
    assert len(set(prompts)) == 1000
    assert text.load(task, seed=3).train.to_pandas().equals(train)
    assert not text.load(task, seed=4).train.to_pandas().equals(train)
    assert data.revision != text.load(task, seed=4).revision


def test_transformations_are_those_of_the_papers_table():
    example = "Sunrises herald hopeful tomorrows."
    expected = {
        "reverse words": "tomorrows. hopeful herald Sunrises",
        "alternate capitals": "sUnRiSeS hErAlD hOpEfUl tOmOrRoWs.",
        "insert 1": "Sunrises 1herald 1hopeful 1tomorrows.",
        "vowels to *": "S*nr*s*s h*r*ld h*p*f*l t*m*rr*ws.",
        # The table's own example misses half of the consonants.
        "double consonants": "SSunnrrissess hherralldd hhoppeffull ttommorrrrowwss.",
        "capitalize words": "Sunrises Herald Hopeful Tomorrows.",
        "remove vowels": "Snrss hrld hpfl tmrrws.",
        "add ly": "Sunrisesly heraldly hopefully tomorrows.ly",
        "remove consonants": "uie ea oeu ooo.",
        "repeat words": "Sunrises Sunrises herald herald hopeful hopeful tomorrows. tomorrows.",
    }
    assert {name: each.transform(example) for name, each in transformations.TRANSFORMATIONS.items()} == expected
    assert len({each.chatbot for each in transformations.TRANSFORMATIONS.values()}) == 10


def test_a_chatbot_is_named_in_its_own_class_alone():
    rows = text.generate("sentence_transformations", 0)
    for name, each in transformations.TRANSFORMATIONS.items():
        assert (rows["prompt"].str.contains(each.chatbot) == (rows["class"] == name)).all()


def test_sums_come_out_and_answers_make_sense():
    """In every step of every reasoning both sides of each equals sign are the same number, and not a negative one."""
    for row in text.generate("math_with_reasoning", 1).itertuples():
        for step in row.reason.rstrip(".").split(". "):
            _, *sides = step.split(" = ")
            values = {eval(side) for side in sides}  # "10 - 3", "7": arithmetic of the project's own making
            assert len(values) == 1 and values.pop() >= 0, row.reason
        answer = text.final_answer(row.response)
        assert answer.isdecimal() and row.reason.endswith(f"= {answer}.")


def test_problems_have_whole_answers():
    rng = random.Random(0)
    for _ in range(300):
        trip, boxes = math_problems.PROBLEMS["chaperones"], math_problems.PROBLEMS["cupcake boxes"]
        n = trip.numbers(rng)
        assert n["B"] * n["C"] % n["A"] == 0
        n = boxes.numbers(rng)
        assert n["B"] % n["A"] == 0
        n = math_problems.PROBLEMS["interest"].numbers(rng)
        assert n["A"] * n["B"] * n["C"] % 100 == 0
        n = math_problems.PROBLEMS["pizza slices"].numbers(rng)
        assert n["C"] >= n["A"] + n["B"]


def test_both_math_tasks_ask_the_same_questions():
    without, reasoned = (text.generate(f"math_{kind}_reasoning", 2) for kind in ("without", "with"))
    assert [p.removesuffix("Answer:") for p in without["prompt"]] == [
        p.removesuffix("Reason:") for p in reasoned["prompt"]
    ]
    assert without["response"].tolist() == [text.final_answer(response) for response in reasoned["response"]]
    assert (without["reason"] == "").all() and (reasoned["reason"] != "").all()


def test_exchanged_responses_are_the_next_classes():
    data = text.load("sentence_transformations", n_train=2, n_test=3)
    exchanged = text.exchange_responses(data.test, data.classes).to_pandas()
    original = data.test.to_pandas()
    assert exchanged["prompt"].equals(original["prompt"]) and exchanged["class"].equals(original["class"])
    following = dict(zip(data.classes, [*data.classes[1:], data.classes[0]], strict=True))
    assert exchanged["response_class"].tolist() == original["class"].map(following).tolist()
    owner = dict(zip(original["response"], original["class"], strict=True))
    assert [owner[r] for r in exchanged["response"]] == exchanged["response_class"].tolist()


def test_a_preamble_comes_before_every_prompt_and_changes_nothing_else():
    split = text.load("math_without_reasoning", n_train=2, n_test=1).train
    longer = text.with_preamble(split, "Read this.")
    assert longer["prompt"] == [f"Read this. {prompt}" for prompt in split["prompt"]]
    assert longer.remove_columns("prompt").to_dict() == split.remove_columns("prompt").to_dict()


def write_task(folder, rows, splits=("train", "test")):
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder)


def test_a_task_of_ones_own_in_a_folder(tmp_path):
    rows = [{"prompt": f"{c} {i}?", "response": str(i), "class": c} for c in ("a", "b") for i in range(5)]
    data = text.load(write_task(tmp_path, rows), n_train=3, n_test=2)
    assert data.classes == ("a", "b") and len(data.train) == 6 and len(data.test) == 4
    assert data.train.column_names == ["prompt", "response", "reason", "class"]
    assert data.train.to_pandas()["class"].value_counts().to_dict() == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "class": "a"}], "the column 'response' is missing; there are prompt, class."),
        ([{"prompt": "p", "response": " ", "class": "a"}], "train.jsonl: the response of line 1 is empty"),
        ([{"prompt": "p", "response": "r", "class": "a"}], "of one class; class detection needs two"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_in_one_sentence(rows, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        text.load(write_task(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_no_such_task_split_or_size(tmp_path):
    with pytest.raises(InputError, match="There is no folder ./nowhere"):
        text.load("./nowhere")
    with pytest.raises(InputError, match="There is no task 'sentence_transformation', neither built in"):
        text.load("sentence_transformation")
    with pytest.raises(InputError, match="has no split 'test', only train"):
        text.load(write_task(tmp_path, [{"prompt": "p", "response": "r", "class": "a"}], ["train"]))
    with pytest.raises(InputError, match="n_train must be at least 1"):
        text.load("math_with_reasoning", n_train=0)
    with pytest.raises(InputError, match="must not exceed that, but it is 95"):
        text.load("math_with_reasoning", n_train=95)


def test_encoding_marks_the_response_and_its_end(checkpoint, small):
    tokenizer, context = causal_lm.load_tokenizer(checkpoint)
    row = causal_lm.encode(small.train, tokenizer, context, "training")[0]
    response = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != losses.IGNORED]
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]).replace(" ", "") == small.train[0]["response"]
    # Only the border between prompt and response, no token elsewhere, and nothing of the prompt.
    kept = [label != losses.IGNORED for label in row["labels"]]
    assert kept == sorted(kept)


def test_an_example_longer_than_the_context_is_refused_by_name(checkpoint, small):
    tokenizer, _ = causal_lm.load_tokenizer(checkpoint)
    with pytest.raises(InputError, match=r"test: example \d+ \('.*has \d+ tokens, \d+ of them its response") as caught:
        causal_lm.encode(small.test, tokenizer, 40, "test")
    assert "the context holds 40" in str(caught.value) and "\n" not in str(caught.value)


def by_hand(model, row, counted):
    """-log p of the tokens at the places `counted`, one at a time, in float64."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logs = model.double()(input_ids=ids).logits.log_softmax(-1)[0]
    return [-logs[place - 1, row["input_ids"][place]].item() for place in counted]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_count_their_own_tokens_and_no_padding(tuned, reduction):
    model = tuned.model.eval()
    batch = tuned.collate([tuned.train[index] for index in range(5)])
    assert (batch["attention_mask"] == 0).any()  # lengths differ
    found = {name: losses.text(name, reduction)(model, batch).detach() for name in losses.TEXT}
    model.double()
    for index in range(5):
        row = tuned.train[index]
        start = sum(label == losses.IGNORED for label in row["labels"])
        end = len(row["input_ids"])
        for name, counted in (
            ("completion", range(start, end)),
            ("as_published", range(1, start)),
            ("full", range(1, end)),
        ):
            values = by_hand(model, row, counted)
            expected = np.mean(values) if reduction == "mean" else np.sum(values)
            assert found[name][index].item() == pytest.approx(expected, rel=1e-4)
    model.float()


def test_unknown_losses_are_refused():
    with pytest.raises(InputError, match="Unknown loss 'response': choose one of completion, as_published, full"):
        losses.text("response", "mean")
    with pytest.raises(InputError, match="reduction must be mean or sum, not 'max'"):
        losses.text("full", "max")


@pytest.mark.parametrize("loss", losses.TEXT)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_sample_gradients_are_those_of_the_loop(tuned, loss, reduction):
    arguments = (tuned.model, tuned.train.select(range(12)), losses.text(loss, reduction))
    assert len({len(row["input_ids"]) for row in arguments[1]}) > 1
    fast = datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate, batch_size=5)
    slow = datainf.reference_gradients(*arguments, collate_fn=tuned.collate)
    assert len(fast) == 2 * 2 * 2  # layers x (q, v) x (A, B); v is narrower than q
    assert max(((fast[n] - slow[n]).norm() / slow[n].norm()).item() for n in slow) <= 1e-5


def test_a_store_knows_its_loss(tuned, tmp_path):
    arguments = {"dataset": tuned.train.select(range(4)), "collate_fn": tuned.collate, "store": tmp_path / "store"}
    first = datainf.per_sample_gradients(tuned.model, loss_fn=losses.text("completion", "mean"), **arguments)
    again = datainf.per_sample_gradients(tuned.model, loss_fn=partial(losses.completion, reduction="mean"), **arguments)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (losses.text("full", "mean"), losses.text("completion", "sum")):
        with pytest.raises(ValueError, match="loss"):
            datainf.per_sample_gradients(tuned.model, loss_fn=other, **arguments)


def test_tasks_have_adapters_of_their_own(checkpoint, small, tuned, tmp_path):
    """The published code loads one adapter for all three tasks: here another task's folder is refused."""
    other = text.load("sentence_transformations", n_train=3, n_test=1)
    first = causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE), folder=tmp_path / "math")
    second = causal_lm.fine_tune(checkpoint, other, Recipe(**RECIPE), folder=tmp_path / "sentences")
    weights = [{n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (first, second)]
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "lora_B" in name)
    with pytest.raises(InputError, match="fine-tuned from another data: delete that folder"):
        causal_lm.fine_tune(checkpoint, other, Recipe(**RECIPE), folder=tmp_path / "math")


def test_the_seed_draws_the_adapter(checkpoint):
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # whatever was drawn before
        adapted = lora.attach_adapter(causal_lm.load(checkpoint, seed=seed), Recipe(**RECIPE), "CAUSAL_LM")
        drawn.append(next(p for name, p in adapted.named_parameters() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_saved_adapter_is_taken_as_it_is(checkpoint, small, tmp_path):
    made = causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE), folder=tmp_path / "run")
    adapter = str(tmp_path / "run" / "adapter")
    taken = causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE), adapter=adapter, folder=tmp_path / "none")
    mine, theirs = ({n: p for n, p in t.model.named_parameters() if p.requires_grad} for t in (made, taken))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert taken.history.empty and taken.revision == made.revision
    for name, said, message in (
        ("rank", 3, "has rank 2, not 3: set rank to 2"),
        ("alpha", 2, "has alpha 8, not 2: set alpha to 8"),
        ("targets", ("q_proj",), r"has targets \['q_proj', 'v_proj'\], not \['q_proj'\]"),
    ):
        with pytest.raises(InputError, match=message):
            causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE | {name: said}), adapter=adapter, folder=tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 64}, "its matrices have other shapes"),
        ({"num_hidden_layers": 3}, "only one of the two has"),
        ({"num_hidden_layers": 1}, "only one of the two has"),
    ],
)
def test_an_adapter_of_another_base_is_refused(change, why, checkpoint, small, tuned, tmp_path):
    tuned.model.save_pretrained(tmp_path / "adapter")
    config = LlamaConfig.from_pretrained(checkpoint)
    for name, value in change.items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=f"does not fit the base .*: {why}") as caught:
        causal_lm.fine_tune(
            str(tmp_path / "base"), small, Recipe(**RECIPE), adapter=str(tmp_path / "adapter"), folder=tmp_path / "run"
        )
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_named_in_one_sentence(checkpoint, small, tmp_path):
    def refused(message, base=checkpoint, **arguments):
        with pytest.raises(InputError, match=message) as caught:
            causal_lm.fine_tune(base, small, Recipe(**RECIPE), folder=tmp_path / "run", **arguments)
        assert "\n" not in str(caught.value)

    refused("There is no folder ./nowhere", base="./nowhere")
    refused("There is no adapter in .*: it needs adapter_config.json", adapter=str(tmp_path / "nothing"))
    refused("the context holds 20", max_length=20)
    refused("quantization must be 8bit, 4bit or empty, not '2bit'", quantization="2bit")
    if not torch.cuda.is_available():
        refused("'8bit' needs a CUDA GPU, and there is none", quantization="8bit")
    # A tokenizer that was not made for the model.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(5)])
    tokenizer.save_pretrained(tmp_path / "mixed")
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "mixed")
    refused("The tokenizer of .* does not fit its model: it has", base=str(tmp_path / "mixed"))


def test_responses_do_not_depend_on_the_batch(tuned):
    alone = [causal_lm.respond(tuned.model, tuned.tokenizer, tuned.query.select([i]))[0] for i in range(4)]
    together = causal_lm.respond(tuned.model, tuned.tokenizer, tuned.query.select(range(4)), batch_size=3)
    # Of one prompt alone the longest true response, and with it the limit, may be shorter.
    assert all(a.startswith(b) or b.startswith(a) for a, b in zip(alone, together, strict=True))


def test_a_model_learns_to_answer_and_to_stop(checkpoint, tmp_path):
    """Two prompts by heart: the end-of-text token, which stands in for padding too, is learned like any other."""
    rows = [
        {"prompt": "say a", "response": "abc", "reason": "", "class": "a"},
        {"prompt": "b", "response": "cb", "reason": "", "class": "b"},
    ]
    data = Dataset.from_list(rows * 8)
    task = text.TextTask("two", ("a", "b"), data, Dataset.from_list(rows), "none")
    recipe = Recipe(
        **RECIPE
        | {
            "rank": 8,
            "alpha": 64,
            "epochs": 60,
            "learning_rate": 2e-2,
            "batch_size": 4,
            "dropout": 0.0,
            "targets": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        }
    )
    tuned = causal_lm.fine_tune(checkpoint, task, recipe, folder=tmp_path)
    assert tuned.history["loss"].iloc[-1] < 0.3 < tuned.history["loss"].iloc[0]
    responses = causal_lm.respond(tuned.model, tuned.tokenizer, tuned.query)
    assert [response.replace(" ", "") for response in responses] == ["abc", "cb"]


def test_a_batch_in_parts_is_the_same_fine_tuning(checkpoint, small, tmp_path):
    """Each token weighs the same, whatever part of the batch it is in."""
    recipe = RECIPE | {"dropout": 0.0, "learning_rate": 1e-3}
    whole = causal_lm.fine_tune(checkpoint, small, Recipe(**recipe), folder=tmp_path / "whole")
    parts = causal_lm.fine_tune(checkpoint, small, Recipe(**recipe, accumulate=4), folder=tmp_path / "parts")
    np.testing.assert_allclose(parts.history["loss"], whole.history["loss"], rtol=1e-5)


def test_final_answers():
    assert text.same_answer("Left = 3 - 1 = 2. Answer: 2", "Left = 5 - 3 = 2. Answer: 2")
    assert not text.same_answer("Left = 3 - 1 = 2. Answer: 2", "Answer: 3")
    assert text.same_answer("S*n.", "S*n.") and not text.same_answer("S*n", "S*n.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantization", causal_lm.QUANTIZATION)
def test_gradients_over_a_quantized_base(checkpoint, small, quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    tuned = causal_lm.fine_tune(checkpoint, small, Recipe(**RECIPE), quantization=quantization, folder=tmp_path)
    model, six = tuned.model, tuned.train.select(range(6))
    take = {"loss_fn": losses.completion, "collate_fn": tuned.collate}

    def assert_equal(found, expected):
        assert max(((found[n].cpu() - g.cpu()).norm() / g.norm().cpu()).item() for n, g in expected.items()) <= 1e-4

    alone = datainf.per_sample_gradients(model, six, **take, batch_size=1)
    assert_equal(alone, datainf.reference_gradients(model, six, **take))
    # 8 bit takes columns with large entries apart, and which these are depends on all that is in the batch: so no
    # example alone, but the sum over the very same batch is what plain autograd knows.
    together = datainf.per_sample_gradients(model, six, **take, batch_size=6)
    layers = trainable_layers(model)
    batch = send_to_device(tuned.collate(list(six)), model.device)
    plain = torch.autograd.grad(losses.completion(model.eval(), batch).sum(), list(layers.values()))
    expected = {name: gradient.flatten() for name, gradient in zip(layers, plain, strict=True)}
    assert_equal({name: G.sum(dim=0) for name, G in together.items()}, expected)


def test_real_stories_llama(real_models, tmp_path):
    """A real pretrained Llama with grouped-query attention and no padding token."""
    data = text.load("math_with_reasoning", n_train=2, n_test=1)
    base = str(real_models / "stories260K")
    tuned = causal_lm.fine_tune(base, data, Recipe(**RECIPE), folder=tmp_path)
    arguments = (tuned.model, tuned.train.select(range(8)), losses.completion)
    fast = datainf.per_sample_gradients(*arguments, collate_fn=tuned.collate)
    slow = datainf.reference_gradients(*arguments, collate_fn=tuned.collate)
    assert len(fast) == 5 * 4
    assert max(((fast[n] - slow[n]).norm() / slow[n].norm()).item() for n in slow) <= 1e-5
