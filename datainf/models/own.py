"""An adapter that was trained elsewhere, with the examples as its training saw them.

The tokens are those of TRL's SFTTrainer, which most adapters of language models come from: messages through the
tokenizer's chat template; a prompt and a completion that are texts one after the other, with the end-of-text token.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
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


@dataclass(frozen=True)
class Adapter:
    """An adapter with its base and its examples.

    Attributes:
        tuned: the model and the encoded examples; `training` where a recipe was given.
        loss_fn, right_fn: of an example: its loss, and whether the model answers it rightly, of a language model with
            every token.
        reading: how the examples were read, with the columns of text that a classifier has.
    """

    tuned: FineTuned
    loss_fn: Callable
    right_fn: Callable
    reading: Reading

    @property
    def is_classifier(self) -> bool:
        """Whether it gives labels."""
        return self.loss_fn is losses.classification

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
    tokenizer = _tokenizer(adapter, base)
    if task == "SEQ_CLS":
        columns = tuple(own.text_columns(train, reading.text_columns, "The training file"))
        reading = replace(reading, text_columns=columns)
        k = _outputs(adapter) or 1 + max(train[own.LABEL])
        load_base = _Loading(AutoModelForSequenceClassification, base, recipe.seed if recipe else 0, k)
        names = reading.labels or _names(base, k)
        encoded = [_classified(each, tokenizer, reading, names, k, what) for each, what in _both(train, query)]
        collate, loss_fn, right_fn = DataCollatorWithPadding(tokenizer), losses.classification, losses.right_label
    else:
        load_base = _Loading(AutoModelForCausalLM, base, recipe.seed if recipe else 0)
        encoded = [encode(each, tokenizer, reading, what) for each, what in _both(train, query)]
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=losses.IGNORED)
        loss_fn, right_fn = losses.completion, losses.right_response
    model = load_base()
    revision = lora.weights_revision(model)
    model = lora.on_device(lora.load_adapter(model, adapter)).eval()
    training = None
    if recipe is not None:
        recipe = _shaped(recipe, config)
        training = Training(load_base, *encoded, collate, recipe, task_type=task)
    tuned = FineTuned(model, tokenizer, *encoded, collate, lora.no_history(), revision, training)
    return Adapter(tuned, loss_fn, right_fn, reading)


_KIND = {"SEQ_CLS": "classifier", "CAUSAL_LM": "language model"}


def _both(train: Dataset, query: Dataset):
    return ((train, "training example"), (query, "query"))


@dataclass(frozen=True)
class _Loading:
    """Loads the base afresh, with the same head each time."""

    loader: type
    base: str
    seed: int
    num_labels: int = 0

    def __call__(self) -> PreTrainedModel:
        set_seed(self.seed)
        more = {"num_labels": self.num_labels} if self.num_labels else {}
        model = lora.from_pretrained(self.loader, self.base, dtype=torch.float32, **more)
        if model.config.pad_token_id is None:  # by which a classifier on a decoder finds an example's last token
            model.config.pad_token_id = model.config.get_text_config().eos_token_id
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


def _tokenizer(adapter: str, base: str) -> PreTrainedTokenizerBase:
    """The one that was saved with the adapter, which may have another template, or the base's."""
    own_one = (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = lora.from_pretrained(AutoTokenizer, adapter if own_one else base)
    vocabulary = lora.from_pretrained(AutoConfig, base).get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(f"The tokenizer has {len(tokenizer)} tokens and {base} embeds {vocabulary}: it is another's.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _outputs(adapter: str) -> int:
    """How many labels a saved head tells apart; 0 where none was saved."""
    heads = {
        name: len(weight)
        for name, weight in load_peft_weights(adapter, device="cpu").items()
        if name.endswith(("score.weight", "classifier.weight", "out_proj.weight"))
    }
    return next(reversed(heads.values()), 0)


def _names(base: str, k: int) -> tuple[str, ...]:
    """What the base calls its outputs, where it says so of as many."""
    named = lora.from_pretrained(AutoConfig, base).id2label
    return tuple(named[place] for place in sorted(named)) if len(named) == k else ()


def _classified(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, reading: Reading, names: Sequence[str], k: int, what: str
) -> Dataset:
    """Columns input_ids, attention_mask and labels."""
    if missing := [name for name in (*reading.text_columns, own.LABEL) if name not in examples.column_names]:
        raise InputError(f"Each {what} needs the column {missing[0]!r}; there are {', '.join(examples.column_names)}.")
    labels = examples[own.LABEL][:]
    number = {str(place): place for place in range(k)} | {name: place for place, name in enumerate(names)}
    labels = [
        str(int(label)) if isinstance(label, bool | float) and label == label // 1 else str(label) for label in labels
    ]
    for index, label in enumerate(labels):
        if label not in number:
            known = ", ".join(map(str, names or range(k)))
            raise InputError(
                f"{what.capitalize()} {index} has the label {label!r}, which is none of the model's ({known}): if the "
                "labels are words, name them in the order of its outputs, labels=."
            )

    def tokens(rows: dict) -> dict:
        return dict(
            tokenizer(*(rows[name] for name in reading.text_columns), truncation=True, max_length=reading.max_length)
        )

    encoded = examples.map(tokens, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)
    return encoded.add_column("labels", [number[label] for label in labels])


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
            else _chat(before, after, tokenizer, place)
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


def _chat(before: list, after: list, tokenizer: PreTrainedTokenizerBase, place: str) -> tuple[list, list]:
    """The ids by the chat template, and where each of the assistant's turns in `after` stands."""
    if not tokenizer.chat_template:
        raise InputError("The tokenizer has no chat template: give template='plain', or a tokenizer that has one.")

    def rendered(turns: list, **options) -> dict:
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **options)

    turns, spans = [*before, *after], []
    if not before and "{% generation" in tokenizer.chat_template:  # the template says itself what the assistant says
        whole = rendered(turns, return_assistant_tokens_mask=True)
        return whole["input_ids"], [(at, at + 1) for at, said in enumerate(whole["assistant_masks"]) if said]
    ids = rendered(turns)["input_ids"]
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
    """The recipe with the shape of the adapter.

    Raises:
        InputError: an adapter that is no plain LoRA, which retraining would not make.
    """
    extras = [
        name
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform")
        if getattr(config, name, None)
    ]
    if not isinstance(config, LoraConfig) or extras or isinstance(config.target_modules, str):
        what = extras[0] if extras else config.peft_type.value
        raise InputError(f"Only plain LoRA is trained again, and this adapter has {what}: leave retraining out.")
    shape = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    return replace(recipe, targets=tuple(sorted(config.target_modules)), **shape)
