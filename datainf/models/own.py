"""An adapter that was trained elsewhere, with the examples as its training saw them.

The tokens are those of TRL's SFTTrainer, which most adapters of language models come from: messages through the
tokenizer's chat template; a prompt and a completion that are texts one after the other, with the end-of-text token.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from datainf.data import own
from datainf.errors import InputError
from datainf.models import lora, losses
from datainf.models.causal_lm import common
from datainf.models.forward import of_each
from datainf.models.lora import FineTuned, Recipe
from datainf.models.training import Training

TEMPLATES = ("auto", "chat", "plain", "space")
"""How a prompt and a response become one text: by what they are; by the chat template; one after the other, as TRL does
with texts; with a space between, as this study's own text tasks."""

TUNED_IS_BELOW = 0.9
"""A fine-tuned model's mean loss on its training examples, over its base's, is below this; else something is amiss."""


@dataclass(frozen=True)
class Reading:
    """How examples are read.

    Attributes:
        template: one of `TEMPLATES`, of a language model.
        loss_on: "assistant", the tokens of the responses, or "all", as TRL has it by default for messages.
        max_length: tokens; what is beyond them is cut off, as in training.
        text_columns: of a classifier; by default all its columns of text.
        labels: of a classifier whose labels are words: the words in the order of the model's outputs.
    """

    template: str = "auto"
    loss_on: str = "assistant"
    max_length: int = 1024
    text_columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        if self.template not in TEMPLATES:
            raise InputError(f"template must be one of {', '.join(TEMPLATES)}, not {self.template!r}.")
        if self.loss_on not in ("assistant", "all"):
            raise InputError(f"loss_on must be assistant or all, not {self.loss_on!r}.")
        if self.max_length < 2:
            raise InputError(f"max_length must be 2 tokens at least, not {self.max_length}.")
        if not all(isinstance(label, str) for label in self.labels):
            raise InputError(f"labels must be words, in quotes where YAML reads them otherwise: not {self.labels}.")


@dataclass(frozen=True)
class Adapter:
    """An adapter with its base and its examples.

    Attributes:
        tuned: the model and the encoded examples; `training` where a recipe was given.
        loss_fn, right_fn: of an example: its loss, and whether the model answers it rightly, of a language model with
            every token.
        reading: how the examples were read, with the columns of text that a classifier has.
        encoded: encodes other examples likewise; the second argument is what to call one of them in an error.
        not_again: what about the adapter keeps it from being trained again here; empty where nothing does.
    """

    tuned: FineTuned
    loss_fn: Callable
    right_fn: Callable
    reading: Reading
    encoded: Callable[[Dataset, str], Dataset] = field(repr=False)
    not_again: str = ""

    @property
    def is_classifier(self) -> bool:
        """Whether it gives labels."""
        return self.loss_fn is losses.classification

    def read_by(self, template: str, train: Dataset, query: Dataset) -> "Adapter":
        """The same language model with its examples written by another template."""
        reading = replace(self.reading, template=template)
        encoded = partial(_encoded, self.tuned.tokenizer, reading)
        both = [encoded(each, what) for each, what in _both(train, query)]
        training = self.tuned.training and replace(self.tuned.training, examples=both[0], query=both[1])
        tuned = replace(self.tuned, train=both[0], query=both[1], training=training)
        return replace(self, tuned=tuned, reading=reading, encoded=encoded)

    def losses_of(self, examples: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Each example's loss by the fine-tuned model, and by its base without the adapter."""
        take = (examples, self.loss_fn, self.tuned.collate)
        by_tuned = of_each(self.tuned.model, *take, batch_size=8)
        with self.tuned.model.disable_adapter():
            return by_tuned, of_each(self.tuned.model, *take, batch_size=8)


def load(
    adapter: str,
    train: Dataset,
    query: Dataset,
    *,
    base: str = "",
    reading: Reading = Reading(),
    recipe: Recipe | None = None,
) -> Adapter:
    """A base with the adapter in a folder, and examples as it was trained on them.

    Args:
        adapter: the folder, with ``adapter_config.json``.
        train, query: as `data.own.load` gives them.
        base: a hub id or a folder, where the one that the adapter names is not to be had.
        recipe: the adapter's training, where it is known, by which it can be done again; its shape is the adapter's.

    Raises:
        InputError: no adapter, no base, another base, a task that is neither, columns or labels that are not the
            model's, an empty response, or a template that the tokenizer lacks.
    """
    adapter = os.path.expanduser(adapter)
    config = _config_of(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise InputError(f"{adapter}/adapter_config.json names no base: give it, base=.")
    task = own.task_of(train, "The training file")
    if config.task_type and config.task_type != task:
        raise InputError(f"The adapter is of a {_KIND[config.task_type]}, the training file of a {_KIND[task]}.")
    tokenizer, context = _tokenizer(adapter, base)
    reading = replace(reading, max_length=min(reading.max_length, context))
    seed = recipe.seed if recipe else 0
    if task == "SEQ_CLS":
        columns = tuple(own.text_columns(train, reading.text_columns, "The training file"))
        reading = replace(reading, text_columns=columns)
        k = _outputs(adapter) or len(reading.labels) or len({_label(label) for label in train[own.LABEL]})
        load_base = _Loading(AutoModelForSequenceClassification, base, seed, tokenizer.pad_token_id, k)
        encoded = partial(_classified, tokenizer, reading, reading.labels or _names(base, k), k)
        collate, loss_fn, right_fn = DataCollatorWithPadding(tokenizer), losses.classification, losses.right_label
    else:
        load_base = _Loading(AutoModelForCausalLM, base, seed, tokenizer.pad_token_id)
        encoded = partial(_encoded, tokenizer, reading)
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=losses.IGNORED)
        loss_fn, right_fn = losses.completion, losses.right_response
    both = [encoded(each, what) for each, what in _both(train, query)]
    model = load_base()
    revision = lora.weights_revision(model)
    model = lora.on_device(lora.load_adapter(model, adapter)).eval()
    training = None if recipe is None else Training(load_base, *both, collate, _shaped(recipe, config), task_type=task)
    tuned = FineTuned(model, tokenizer, *both, collate, lora.no_history(), revision, training)
    return Adapter(tuned, loss_fn, right_fn, reading, encoded, _not_again(config, task))


_KIND = {"SEQ_CLS": "classifier", "CAUSAL_LM": "language model"}


def _both(train: Dataset, query: Dataset):
    return ((train, "training example"), (query, "query"))


@dataclass(frozen=True)
class _Loading:
    """Loads the base afresh, with the same head each time."""

    loader: type
    base: str
    seed: int
    pad_token_id: int
    num_labels: int = 0

    def __call__(self) -> PreTrainedModel:
        set_seed(self.seed)
        more = {"num_labels": self.num_labels} if self.num_labels else {}
        model = lora.from_pretrained(self.loader, self.base, dtype=torch.float32, **more)
        model.config.pad_token_id = self.pad_token_id  # by which a classifier on a decoder finds the last token
        return model


def _config_of(adapter: str) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no adapter in {adapter}: it needs adapter_config.json and its weights.") from error
    if config.task_type and config.task_type not in _KIND:
        raise InputError(f"The adapter is of the task {config.task_type}; SEQ_CLS and CAUSAL_LM are supported.")
    return config


def fingerprint(adapter: str) -> str:
    """A hash of the adapter's weights and configuration, which tells it from another in the same folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(os.path.expanduser(adapter)).glob("adapter_*")):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()[:12]}"


def _tokenizer(adapter: str, base: str) -> tuple[PreTrainedTokenizerBase, int]:
    """The one that was saved with the adapter, which may have another template, or the base's; and how many tokens the
    model can take."""
    own_one = (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = lora.from_pretrained(AutoTokenizer, adapter if own_one else base)
    config = lora.from_pretrained(AutoConfig, base).get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer has {len(tokenizer)} tokens and {base} embeds {config.vocab_size}: it is another's."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if "roberta" in config.model_type:  # which counts from behind its padding's
        positions -= config.pad_token_id + 1
    return tokenizer, min(positions, tokenizer.model_max_length)


def _outputs(adapter: str) -> int:
    """How many labels a saved head tells apart; 0 where none was saved."""
    ends = (["score", "weight"], ["classifier", "weight"], ["out_proj", "weight"])
    weights = load_peft_weights(adapter, device="cpu")
    heads = [len(weight) for name, weight in weights.items() if name.split(".")[-2:] in ends]
    return heads[-1] if heads else 0


def _names(base: str, k: int) -> tuple[str, ...]:
    """What the base calls its outputs, where it says so of as many."""
    named = lora.from_pretrained(AutoConfig, base).id2label
    return tuple(named[place] for place in sorted(named)) if len(named) == k else ()


def _label(value: object) -> str:
    """A label as it is looked up; a table with a gap in it has whole numbers as 1.0."""
    whole = isinstance(value, bool | float) and value == value // 1
    return str(int(value)) if whole else str(value)


def _classified(
    tokenizer: PreTrainedTokenizerBase, reading: Reading, names: Sequence[str], k: int, examples: Dataset, what: str
) -> Dataset:
    """Columns input_ids, attention_mask and labels."""
    if missing := [name for name in (*reading.text_columns, own.LABEL) if name not in examples.column_names]:
        raise InputError(f"Each {what} needs the column {missing[0]!r}; there are {', '.join(examples.column_names)}.")
    labels = [_label(value) for value in examples[own.LABEL]]
    number = {str(place): place for place in range(k)} | {name: place for place, name in enumerate(names)}
    for index, label in enumerate(labels):
        if label not in number:
            known = ", ".join(map(str, names or range(k)))
            raise InputError(
                f"{what.capitalize()} {index} has the label {label!r}, which is none of the model's ({known}): if the "
                "labels are words, name them in the order of its outputs, labels=."
            )
    for name in reading.text_columns:
        if None in (column := examples[name][:]):
            raise InputError(f"{what.capitalize()} {column.index(None)} has no {name}: write one or leave it out.")

    def tokens(rows: dict) -> dict:
        texts = ([str(text) for text in rows[name]] for name in reading.text_columns)
        return dict(tokenizer(*texts, truncation=True, max_length=reading.max_length))

    encoded = examples.map(tokens, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)
    return encoded.add_column("labels", [number[label] for label in labels])


def _encoded(tokenizer: PreTrainedTokenizerBase, reading: Reading, examples: Dataset, what: str) -> Dataset:
    return encode(examples, tokenizer, reading, what)


def encode(examples: Dataset, tokenizer: PreTrainedTokenizerBase, reading: Reading, what: str = "example") -> Dataset:
    """Columns input_ids, attention_mask and labels: the ids of the responses (or of all, by `Reading.loss_on`),
    `IGNORED` elsewhere.

    Raises:
        InputError: an example without a response, one whose response is all beyond `max_length`, or a template that
            the tokenizer lacks or that writes a conversation's beginning otherwise once it goes on.
    """

    def tokens(row: dict, index: int) -> dict:
        place = f"{what.capitalize()} {index}"
        before, after = own.conversation(row, place)
        if reading.template in ("plain", "space") and not isinstance(after, str):
            raise InputError(f"{place} is a list of messages, which template={reading.template!r} cannot write.")
        if reading.template == "chat" and isinstance(after, str):
            before, after = [{"role": "user", "content": before}], [{"role": "assistant", "content": after}]
        ids, spans = (
            _plain(before, after, tokenizer, " " if reading.template == "space" else "")
            if isinstance(after, str)
            else _chat(before, after, tokenizer, place, alone=reading.loss_on == "all")
        )
        labels = list(ids) if reading.loss_on == "all" else [losses.IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        ids, labels = ids[: reading.max_length], labels[: reading.max_length]
        if all(label == losses.IGNORED for label in labels):
            raise InputError(f"{place}: its response begins beyond max_length, {reading.max_length} tokens.")
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return examples.map(tokens, with_indices=True, remove_columns=examples.column_names, load_from_cache_file=False)


def _plain(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, between: str) -> tuple[list, list]:
    """The ids, and where the response stands; a token that spans the border belongs to it."""
    end = tokenizer.eos_token or ""
    whole = f"{prompt}{between}{response}" + ("" if response.endswith(end) else end)
    ids = tokenizer(whole)["input_ids"]
    return ids, [(common(tokenizer(prompt)["input_ids"], ids), len(ids))]


def _chat(
    before: list, after: list, tokenizer: PreTrainedTokenizerBase, place: str, *, alone: bool = False
) -> tuple[list, list]:
    """The ids by the chat template, and where each of the assistant's turns in `after` stands, unless the ids `alone`
    are wanted."""
    if not tokenizer.chat_template:
        raise InputError("The tokenizer has no chat template: give template='plain', or a tokenizer that has one.")

    def rendered(turns: list, **options) -> dict:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)
        except TemplateError as error:
            raise InputError(f"{place}: the chat template does not take it ({error}).") from error

    turns, spans = [*before, *after], []
    if not before and "{% generation" in tokenizer.chat_template:  # the template says itself what the assistant says
        whole = rendered(turns, return_assistant_tokens_mask=True)
        return whole["input_ids"], [(at, at + 1) for at, said in enumerate(whole["assistant_masks"]) if said]
    ids = rendered(turns)["input_ids"]
    if alone:
        return ids, spans
    if before:
        return ids, [(common(rendered(before, add_generation_prompt=True)["input_ids"], ids), len(ids))]
    for end, turn in enumerate(turns):
        if turn["role"] == "assistant":
            asked = rendered(turns[:end], add_generation_prompt=True)["input_ids"] if end else []
            said = rendered(turns[: end + 1])["input_ids"]
            if ids[: len(said)] != said or ids[: len(asked)] != asked:
                raise InputError(
                    f"{place}: the chat template writes what came before otherwise once the conversation goes on, so "
                    "that its responses cannot be told apart: give one response an example, as prompt and response."
                )
            spans.append((len(asked), len(said)))
    return ids, spans


def _shaped(recipe: Recipe, config: PeftConfig) -> Recipe:
    """The recipe with the shape of the adapter, as far as a recipe has one."""
    targets = getattr(config, "target_modules", None) or ()
    targets = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    shape = {"rank": getattr(config, "r", None) or 1, "alpha": getattr(config, "lora_alpha", None) or 0}
    return replace(recipe, targets=targets, dropout=getattr(config, "lora_dropout", 0.0), **shape)


def _not_again(config: PeftConfig, task: str) -> str:
    """What the adapter has that `lora.retrain` would not make."""
    if not isinstance(config, LoraConfig):
        return config.peft_type.value
    heads = {"score", "classifier"} if task == "SEQ_CLS" else set()  # PEFT trains those itself
    special = {
        **{name: getattr(config, name, None) for name in _SPECIAL},
        "modules_to_save": set(config.modules_to_save or ()) - heads,
        "bias": config.bias != "none",
        "a pattern for its targets": isinstance(config.target_modules, str),
    }
    return next((name for name, value in special.items() if value), "")


_SPECIAL = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("trainable_token_indices", "target_parameters"),
)
