"""How examples from elsewhere are read: the tokens and labels that an adapter's training saw.

The tokens of a language model are those of TRL's SFTTrainer, which most adapters come from: messages through the
tokenizer's chat template; a prompt and a completion that are texts one after the other, with the end-of-text token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from datainf.data import own
from datainf.errors import InputError
from datainf.models import losses
from datainf.models.causal_lm import common

TEMPLATES = ("auto", "chat", "plain", "space")
"""How a prompt and a response become one text: by what they are; by the chat template; one after the other, as TRL does
with texts; with a space between, as this study's own text tasks."""


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


def label_of(value: object) -> str:
    """A label as it is looked up; a table with a gap in it has whole numbers as 1.0."""
    whole = isinstance(value, bool | float) and value == value // 1
    return str(int(value)) if whole else str(value)


def encode_labelled(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, reading: Reading, names: Sequence[str], k: int, what: str
) -> Dataset:
    """Of a classifier: columns input_ids, attention_mask and labels.

    Args:
        names: what its k labels are called, in the order of its outputs.
        what: what to call one of the examples in an error.

    Raises:
        InputError: a column that is missing, a text that is, or a label that is none of the model's.
    """
    if missing := [name for name in (*reading.text_columns, own.LABEL) if name not in examples.column_names]:
        raise InputError(f"Each {what} needs the column {missing[0]!r}; there are {', '.join(examples.column_names)}.")
    labels = [label_of(value) for value in examples[own.LABEL]]
    number = {str(place): place for place in range(k)} | {name: place for place, name in enumerate(names)}
    for index, label in enumerate(labels):
        if label not in number:
            known = ", ".join(map(str, names or range(k)))
            raise InputError(
                f"{what.capitalize()} {index} has the label {label!r}, which is none of the model's ({known}): if the "
                "labels are words, name them in the order of its outputs, labels=[...] (of make audit: "
                "AUDIT='{labels: [bad, good]}')."
            )
    for name in reading.text_columns:
        if None in (column := examples[name][:]):
            raise InputError(f"{what.capitalize()} {column.index(None)} has no {name}: write one or leave it out.")

    def tokens(rows: dict) -> dict:
        texts = ([str(text) for text in rows[name]] for name in reading.text_columns)
        return dict(tokenizer(*texts, truncation=True, max_length=reading.max_length))

    encoded = examples.map(tokens, batched=True, remove_columns=examples.column_names, load_from_cache_file=False)
    return encoded.add_column("labels", [number[label] for label in labels])


def encode(examples: Dataset, tokenizer: PreTrainedTokenizerBase, reading: Reading, what: str = "example") -> Dataset:
    """Of a language model: columns input_ids, attention_mask and labels, which are the ids of the responses (or of all,
    by `Reading.loss_on`), and `IGNORED` elsewhere.

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
