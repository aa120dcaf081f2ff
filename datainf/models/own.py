"""An adapter that was trained elsewhere, with its base and the examples as its training saw them (`models.reading`)."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig, PeftConfig, load_peft_weights
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from datainf.data import own
from datainf.errors import InputError
from datainf.models import causal_lm, classifier, lora, losses
from datainf.models.forward import of_each
from datainf.models.lora import FineTuned, Recipe
from datainf.models.reading import Reading, encode, encode_labelled, label_of
from datainf.models.training import Training

TUNED_IS_BELOW = 0.9
"""A fine-tuned model's mean loss on its training examples, over its base's, is below this; else something is amiss."""


@dataclass(frozen=True)
class Adapter:
    """An adapter with its base and its examples.

    Attributes:
        tuned: the model and the encoded examples; `training` where a recipe was given.
        loss_fn, right_fn: of an example: its loss, and whether the model answers it rightly, of a language model with
            every token.
        reading: how the examples were read, with the columns of text that a classifier has.
        encoded: encodes other examples likewise; `what` is what to call one of them in an error.
        not_again: what about the adapter keeps it from being trained again here; empty where nothing does.
    """

    tuned: FineTuned
    loss_fn: Callable
    right_fn: Callable
    reading: Reading
    encoded: Callable[..., Dataset] = field(repr=False)
    not_again: str = ""

    @property
    def is_classifier(self) -> bool:
        """Whether it gives labels."""
        return self.loss_fn is losses.classification

    def read_by(self, template: str, train: Dataset, query: Dataset) -> "Adapter":
        """The same language model with its examples written by another template."""
        reading = replace(self.reading, template=template)
        encoded = partial(encode, tokenizer=self.tuned.tokenizer, reading=reading)
        both = [encoded(each, what=what) for each, what in _both(train, query)]
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
    reading: Reading | None = None,
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
    reading = reading or Reading()
    reading = replace(reading, max_length=min(reading.max_length, context))
    seed = recipe.seed if recipe else 0
    if task == "SEQ_CLS":
        columns = tuple(own.text_columns(train, reading.text_columns, "The training file"))
        reading = replace(reading, text_columns=columns)
        k = _outputs(adapter) or len(reading.labels) or len({label_of(label) for label in train[own.LABEL]})
        load_base = _padded(tokenizer, partial(classifier.load, base, k, seed=seed))
        names = reading.labels or _names(base, k)
        encoded = partial(encode_labelled, tokenizer=tokenizer, reading=reading, names=names, k=k)
        collate, loss_fn, right_fn = DataCollatorWithPadding(tokenizer), losses.classification, losses.right_label
    else:
        load_base = _padded(tokenizer, partial(causal_lm.load, base, seed=seed))
        encoded = partial(encode, tokenizer=tokenizer, reading=reading)
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=losses.IGNORED)
        loss_fn, right_fn = losses.completion, losses.right_response
    both = [encoded(each, what=what) for each, what in _both(train, query)]
    model = load_base()
    revision = lora.weights_revision(model)
    model = lora.on_device(lora.load_adapter(model, adapter)).eval()
    training = None if recipe is None else Training(load_base, *both, collate, _shaped(recipe, config), task_type=task)
    tuned = FineTuned(model, tokenizer, *both, collate, lora.no_history(), revision, training)
    return Adapter(tuned, loss_fn, right_fn, reading, encoded, _not_again(config, task))


_KIND = {"SEQ_CLS": "classifier", "CAUSAL_LM": "language model"}


def _both(train: Dataset, query: Dataset):
    return ((train, "training example"), (query, "query"))


def _padded(tokenizer: PreTrainedTokenizerBase, load_base: Callable[[], PreTrainedModel]) -> Callable:
    """Loads a base that knows the tokenizer's padding, by which a classifier on a decoder finds where a text ends."""

    def load() -> PreTrainedModel:
        model = load_base()
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    return load


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
