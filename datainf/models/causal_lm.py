"""Fine-tune a causal language model to respond to prompts, and let it respond (paper D.2.1)."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from datainf.data.text import TextTask
from datainf.errors import InputError
from datainf.gradients.per_sample import evaluating
from datainf.models import lora
from datainf.models.lora import FineTuned, Recipe
from datainf.models.losses import IGNORED
from datainf.models.training import Training
from datainf.progress import bar

QUANTIZATION = {"8bit": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


def fine_tune(
    base: str,
    task: TextTask,
    recipe: Recipe,
    *,
    max_length: int = 512,
    quantization: str = "",
    adapter: str = "",
    folder: str | Path,
) -> FineTuned:
    """Fine-tune `base` on a task's responses with LoRA, or load what an earlier call with this `folder` has finished.

    Args:
        base: a hub id, a folder in the hub's format, or a built-in base (a key of `demo.BASES`).
        max_length: tokens that prompt and response may have together; a model with a shorter context sets the limit.
        quantization: of the base's weights: "8bit", "4bit" or "" for none (bitsandbytes, on a GPU).
        adapter: a folder with a saved adapter to take instead of fine-tuning one.
        folder: keeps the adapter, the curve and the checkpoints; see `lora.fine_tune`.

    Raises:
        InputError: a base that cannot be loaded or has none of the recipe's modules, a tokenizer of another model, an
            example longer than the context, an adapter that does not fit, quantization without a GPU.
    """
    tokenizer, context = load_tokenizer(base)
    context = min(context, max_length)
    train, test = (
        encode(split, tokenizer, context, f"{task.name}, {name}")
        for split, name in ((task.train, "training"), (task.test, "test"))
    )
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    if adapter:
        model = load(base, quantization)
        revision = lora.weights_revision(model)
        model, history = lora.on_device(lora.load_adapter(model, adapter)), lora.no_history()
        lora.check_shape(model, recipe, adapter)
        training = None
    else:
        training = Training(
            lambda: load(base, quantization, seed=recipe.seed), train, test, collate, recipe, task_type="CAUSAL_LM"
        )
        model, history, revision = lora.fine_tune(training, data_revision=task.revision, folder=folder)
    return FineTuned(model, tokenizer, train, test, collate, history, revision, training)


def load_tokenizer(base: str) -> tuple[PreTrainedTokenizerBase, int]:
    """A causal language model's tokenizer and the length of the model's context.

    Padding is on the right and is masked everywhere, so that where a tokenizer has no token of its own for it the
    end-of-text token can stand in: a response's own end is told apart by its place, not by its id.

    Raises:
        InputError: no such model, a tokenizer that was made for another model, or one without an end-of-text token.
    """
    tokenizer = lora.from_pretrained(AutoTokenizer, base)
    config = lora.from_pretrained(AutoConfig, base).get_text_config()
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer of {base} does not fit its model: it has {len(tokenizer)} tokens, the model embeds "
            f"{config.vocab_size}. Give a folder that holds both as they were saved together."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer of {base} has no end-of-text token, by which a response ends.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, config.max_position_embeddings


def load(base: str, quantization: str = "", *, seed: int = 0) -> PreTrainedModel:
    """A pretrained causal language model in float32, or quantized on the GPU; `seed` is that of its next adapter.

    Raises:
        InputError: no such model or quantization, or no GPU or no bitsandbytes to quantize with.
    """
    set_seed(seed)
    if not quantization:
        return lora.from_pretrained(AutoModelForCausalLM, base, dtype=torch.float32)
    if quantization not in QUANTIZATION:
        raise InputError(f"quantization must be {', '.join(QUANTIZATION)} or empty, not {quantization!r}.")
    if not torch.cuda.is_available():
        raise InputError(
            f"quantization {quantization!r} needs a CUDA GPU, and there is none: leave it empty and give a base that "
            "fits in memory."
        )
    if find_spec("bitsandbytes") is None:
        raise InputError(f"quantization {quantization!r} needs bitsandbytes: pip install 'datainf-study[gpu]'.")
    model = lora.from_pretrained(
        AutoModelForCausalLM,
        base,
        quantization_config=BitsAndBytesConfig(**QUANTIZATION[quantization], bnb_4bit_compute_dtype=torch.bfloat16),
        device_map={"": torch.cuda.current_device()},
    )
    # Layer norms in float32, as fine-tuning over a quantized base needs them.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def encode(split: Dataset, tokenizer: PreTrainedTokenizerBase, context: int, what: str) -> Dataset:
    """Columns input_ids, attention_mask and labels (the input ids of the response and of the end that follows it,
    `IGNORED` on the prompt). Nothing is ever cut off.

    Raises:
        InputError: an example has more than `context` tokens.
    """

    def tokens(row: dict) -> dict:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(f"{row['prompt']} {row['response']}")["input_ids"]
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        start = common(prompt, ids)  # a token that spans the border belongs to the response
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * start + ids[start:],
        }

    encoded = split.map(tokens, remove_columns=split.column_names, load_from_cache_file=False)
    for index, row in enumerate(encoded):
        if (length := len(row["input_ids"])) > context:
            response = sum(label != IGNORED for label in row["labels"])
            raise InputError(
                f"{what}: example {index} ({split[index]['prompt'][:40]!r} ...) has {length} tokens, {response} of "
                f"them its response, and the context holds {context}: shorten it, or raise max_length as far as the "
                "model allows."
            )
    return encoded


def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, batch_size: int = 100
) -> list[str]:
    """The model's own greedy responses to the prompts of encoded examples, in their order.

    A response may be a quarter longer than the longest true one, as far as the context allows; what has not ended by
    then is cut.
    """
    prompts = [[i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label == IGNORED] for e in examples]
    longest = max(len(example["input_ids"]) - len(prompt) for example, prompt in zip(examples, prompts, strict=True))
    room = model.config.get_text_config().max_position_embeddings - max(map(len, prompts))
    settings = GenerationConfig(
        max_new_tokens=max(1, min(longest + longest // 4 + 1, room)),
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    progress = bar(total=len(prompts), desc="responding", unit="prompt")
    with progress, evaluating(model), torch.no_grad():
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            batch = _pad_left([prompts[index] for index in some], tokenizer)
            batch = send_to_device(batch, model.device)
            ids = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
            for index, text in zip(some, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                responses[index] = text.strip()
            progress.update(len(some))
    return responses


def _pad_left(prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """A batch in which every prompt ends at the same place, where its response begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a fast tokenizer would rather be called on text
        return dict(tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt"))


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
