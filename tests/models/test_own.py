"""An adapter that was trained by plain PEFT, read as its training read it; and what cannot be read."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from datainf.data import own as data
from datainf.demo import BASES
from datainf.errors import InputError
from datainf.models import own
from datainf.models.lora import Recipe, retrain
from datainf.models.losses import IGNORED
from datainf.models.reading import Reading, encode

LLAMA, ROBERTA = BASES["demo-llama"], BASES["demo-roberta"]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
MARKED = (
    "{% for message in messages %}<s>{{ message['role'] }}: {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}</s>{% endif %}\n{% endfor %}"
)
TALK = [
    {"role": "user", "content": "Remove all the vowels."},
    {"role": "assistant", "content": "Rmv ll th vwls."},
    {"role": "user", "content": "Once more."},
    {"role": "assistant", "content": "nc mr."},
]


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def said(tokenizer, row):
    """The text that the loss is of."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def encoded(tokenizer, row, **reading):
    return encode(Dataset.from_list([row]), tokenizer, Reading(**reading))[0]


def test_of_messages_the_loss_is_of_what_the_assistant_says(tokenizer):
    row = encoded(tokenizer, {"messages": TALK})
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole
    text = said(tokenizer, row)
    assert "Rmv ll th vwls.</s>" in text and "nc mr.</s>" in text and "user" not in text and "Once" not in text
    assert encoded(tokenizer, {"messages": TALK}, loss_on="all")["labels"] == whole
    tokenizer.chat_template = MARKED  # says itself what is the assistant's
    assert said(tokenizer, encoded(tokenizer, {"messages": TALK})) == "Rmv ll th vwls.</s>nc mr.</s>"


def test_a_prompt_and_a_completion_of_messages(tokenizer):
    row = encoded(tokenizer, {"prompt": TALK[:3], "completion": TALK[3:]})
    assert said(tokenizer, row).strip() == "nc mr.</s>"
    assert row["input_ids"] == encoded(tokenizer, {"messages": TALK})["input_ids"]


def test_texts_go_one_after_the_other_or_through_the_template(tokenizer):
    row = {"prompt": "Remove all the vowels: cat", "response": " ct"}
    plain, chat, space = (encoded(tokenizer, row, template=name) for name in ("auto", "chat", "space"))
    assert plain["input_ids"] == tokenizer("Remove all the vowels: cat ct</s>")["input_ids"]
    assert said(tokenizer, plain) == " ct</s>" or said(tokenizer, plain) == "ct</s>"
    asked = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    assert chat["input_ids"] == encoded(tokenizer, {"messages": asked})["input_ids"]
    assert space["input_ids"] == tokenizer("Remove all the vowels: cat  ct</s>")["input_ids"]


def test_what_is_too_long_is_cut_as_in_training(tokenizer):
    row = {"prompt": "Remove all the vowels:", "response": " " + "cat " * 50}
    whole, cut = encoded(tokenizer, row), encoded(tokenizer, row, max_length=20)
    assert cut["input_ids"] == whole["input_ids"][:20] and len(cut["labels"]) == 20


@pytest.mark.parametrize(
    ("row", "reading", "sentence"),
    [
        ({"prompt": "x", "response": " "}, {}, "Example 0: the response is empty"),
        ({"messages": TALK[:1]}, {}, "Example 0: no message is the assistant's"),
        ({"messages": [{"role": "assistant", "content": ""}]}, {}, "Example 0: the response is empty"),
        ({"messages": [{"role": "assistant", "content": None}]}, {}, "a message has a role and a content"),
        ({"prompt": None, "response": "x"}, {}, "Example 0: the prompt is missing"),
        ({"messages": TALK}, {"template": "plain"}, "a list of messages, which template='plain' cannot write"),
        ({"prompt": "a b c d e f g h", "response": "x"}, {"max_length": 3}, "its response begins beyond max_length"),
        ({"prompt": "x", "response": "y"}, {"template": "xml"}, "template must be one of auto, chat, plain, space"),
        ({"prompt": "x", "response": "y"}, {"loss_on": "nobody"}, "loss_on must be assistant or all"),
        ({"prompt": "x", "response": "y"}, {"max_length": 1}, "max_length must be 2 tokens at least"),
    ],
)
def test_what_cannot_be_read_is_named(tokenizer, row, reading, sentence):
    with pytest.raises(InputError, match=sentence):
        encoded(tokenizer, row, **reading)


def test_a_tokenizer_without_a_template_or_with_one_that_changes(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(InputError, match="the chat template writes what came before otherwise"):
        encoded(tokenizer, {"messages": TALK})
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="The tokenizer has no chat template: give template='plain'"):
        encoded(tokenizer, {"messages": TALK})


def language_model(folder):
    """An adapter as plain PEFT saves it, with the tokenizer beside it, as TRL does."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32), config)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"messages": TALK[:2]}, {"messages": TALK}, {"messages": TALK[2:]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load(str(path))


def test_a_language_model_comes_with_its_base_and_template(talks, tmp_path):
    model = language_model(tmp_path / "adapter")
    loaded = own.load(str(tmp_path / "adapter"), talks, talks)
    assert not loaded.is_classifier and len(loaded.tuned.train) == 3 and loaded.tuned.training is None
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(loaded.tuned.model.get_parameter(name), weight)
    with_it, without = loaded.losses_of(loaded.tuned.train)
    batch = loaded.tuned.collate([loaded.tuned.train[0]])
    with torch.no_grad():
        assert with_it[0] == pytest.approx(model.eval()(**batch).loss.item(), rel=1e-4)
        with model.disable_adapter():
            assert without[0] == pytest.approx(model(**batch).loss.item(), rel=1e-4)
    recipe = Recipe(epochs=1, batch_size=2, learning_rate=1e-3)
    again = own.load(str(tmp_path / "adapter"), talks, talks, recipe=recipe).tuned.training
    assert (again.recipe.rank, again.recipe.targets) == (3, ("v_proj",))
    assert retrain(again, np.ones(3, dtype=bool)).active_peft_config.r == 3


@pytest.mark.parametrize("words", [False, True])
def test_a_classifier_of_three_labels(words, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_pretrained(ROBERTA, num_labels=3, dtype=torch.float32)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    names = ["bad", "so-so", "good"]
    labels = [0, 2, 1, 2]
    rows = pd.DataFrame({"text": ["a, b", "c", "d", "e"], "label": [names[k] for k in labels] if words else labels})
    rows.to_csv(tmp_path / "train.csv", index=False)
    examples = data.load(str(tmp_path / "train.csv"))
    reading = Reading(labels=tuple(names) if words else ())
    loaded = own.load(str(tmp_path / "adapter"), examples, examples, reading=reading)
    assert loaded.is_classifier and loaded.tuned.train["labels"][:] == labels
    if not words:  # as a table with a gap in it has them
        of_floats = Dataset.from_dict({"text": list("abcd"), "label": [float(label) for label in labels]})
        assert own.load(str(tmp_path / "adapter"), of_floats, examples).tuned.train["labels"][:] == labels
    assert loaded.reading.text_columns == ("text",)
    batch = loaded.tuned.collate([loaded.tuned.train[1]])
    with torch.no_grad():
        expected, found = model.eval()(**batch).logits, loaded.tuned.model(**batch).logits
    assert found.shape == (1, 3)
    torch.testing.assert_close(found, expected)
    if words:
        with pytest.raises(InputError, match="Training example 0 has the label 'bad', which is none of the model's"):
            own.load(str(tmp_path / "adapter"), examples, examples)
    else:
        with pytest.raises(InputError, match="Query 0 has the label '7', which is none of the model's"):
            own.load(str(tmp_path / "adapter"), examples, Dataset.from_dict({"text": ["x"], "label": [7]}))


def test_an_adapter_that_cannot_be_used(talks, tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(InputError, match="There is no adapter in"):
        own.load(str(folder), talks, talks)
    language_model(folder)
    sentiments = Dataset.from_dict({"text": ["x"], "label": [0]})
    with pytest.raises(InputError, match="The adapter is of a language model, the training file of a classifier"):
        own.load(str(folder), sentiments, sentiments)
    with pytest.raises(InputError, match="There is no folder ./nowhere"):
        own.load(str(folder), talks, talks, base="./nowhere")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="adapter_config.json names no base: give it"):
        own.load(str(folder), talks, talks)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    loaded = own.load(str(folder), talks, talks, recipe=Recipe())
    assert (
        loaded.not_again == "use_rslora" and loaded.tuned.training.recipe.rank == 3
    )  # its length is known all the same
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    assert own._not_again(PeftConfig.from_pretrained(folder), "CAUSAL_LM") == "modules_to_save"


def test_the_number_of_labels_is_that_of_the_head(tmp_path):
    """DistilBERT has another layer whose name ends like its head's."""
    config = DistilBertConfig(vocab_size=30, dim=16, n_heads=2, n_layers=1, hidden_dim=16, num_labels=3)
    heads = ["pre_classifier", "classifier"]
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["v_lin"], modules_to_save=heads)
    get_peft_model(DistilBertForSequenceClassification(config), lora).save_pretrained(tmp_path)
    assert own._outputs(str(tmp_path)) == 3


def test_nothing_is_longer_than_the_model_can_take(tmp_path):
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_pretrained(ROBERTA, dtype=torch.float32)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    long = Dataset.from_dict({"text": ["warm " * 500, "cold"], "label": [0, 1]})
    loaded = own.load(str(tmp_path), long, long)
    assert np.isfinite(loaded.losses_of(loaded.tuned.train)[0]).all()


def test_a_template_that_rewrites_what_came_before_is_no_matter_where_all_counts(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    row = encoded(tokenizer, {"messages": TALK}, loss_on="all")
    assert row["labels"] == row["input_ids"]
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match="Example 0: the chat template does not take it .no system"):
        encoded(tokenizer, {"messages": TALK})
