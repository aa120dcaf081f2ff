"""Every kind of PEFT adapter on every kind of model: exact, slow or refused. ``python -m tests.gradients.adapters``
writes the table of datainf/gradients/README.md anew."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import datainf
from datainf.study.provenance import ROOT

PAGE = ROOT / "datainf" / "gradients" / "README.md"
TOLERANCE = 1e-5
SIZE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIRTUAL = {"num_virtual_tokens": 3}


def classifier() -> nn.Module:
    config = RobertaConfig(**SIZE, max_position_embeddings=40, pad_token_id=1, num_labels=2)
    return RobertaForSequenceClassification(config)


def decoder() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, pad_token_id=1))


def encoder_decoder() -> nn.Module:
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=1, pad_token_id=1))


def of_label(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["label"], reduction="none")


def of_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["input_ids"].shape[1] :]  # those of virtual tokens come first
    losses = F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none")
    return (losses * batch["attention_mask"][:, 1:]).sum(1)


def of_answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=batch["answer"]).logits
    return F.cross_entropy(logits.mT, batch["answer"], reduction="none").sum(1)


MODELS: dict[str, tuple[Callable, Callable, str, list[str], list[str], str]] = {
    # model, loss, task, attention's modules, feed-forward modules, embedding
    "classifier": (classifier, of_label, "SEQ_CLS", ["query", "value"], ["output.dense"], "word_embeddings"),
    "decoder": (decoder, of_tokens, "CAUSAL_LM", ["q_proj", "v_proj"], ["down_proj"], "embed_tokens"),
    "encoder-decoder": (encoder_decoder, of_answer, "SEQ_2_SEQ_LM", ["q", "v"], ["wo"], "shared"),
}

ADAPTERS: dict[str, Callable] = {
    "LoRA": lambda t, a, f, e: peft.LoraConfig(task_type=t, r=2, target_modules=a, init_lora_weights=False),
    "LoRA, rank-stabilized": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, use_rslora=True, target_modules=a, init_lora_weights=False
    ),
    "LoRA, ranks of their own": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, rank_pattern={a[0]: 4}, alpha_pattern={a[1]: 5}, target_modules=a, init_lora_weights=False
    ),
    "LoRA, biases trained too": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, bias="all", target_modules=a, init_lora_weights=False
    ),
    "LoRA, with a saved module": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, modules_to_save=[f[0].split(".")[-1]], target_modules=a, init_lora_weights=False
    ),
    "LoRA on embeddings": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, target_modules=[*a, e], init_lora_weights=False
    ),
    "LoRA, some tokens trained": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, trainable_token_indices={e: [7, 8]}, target_modules=a, init_lora_weights=False
    ),
    "LoRA on parameters": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, target_modules=[], target_parameters=[f"{f[0]}.weight"], init_lora_weights=False
    ),
    "DoRA": lambda t, a, f, e: peft.LoraConfig(
        task_type=t, r=2, use_dora=True, target_modules=a, init_lora_weights=False
    ),
    "AdaLoRA": lambda t, a, f, e: peft.AdaLoraConfig(
        task_type=t, init_r=2, target_r=1, total_step=10, target_modules=a, init_lora_weights=False
    ),
    "LoHa": lambda t, a, f, e: peft.LoHaConfig(task_type=t, r=2, target_modules=a, init_weights=False),
    "LoKr": lambda t, a, f, e: peft.LoKrConfig(task_type=t, r=2, target_modules=a, init_weights=False),
    "OFT": lambda t, a, f, e: peft.OFTConfig(task_type=t, r=0, oft_block_size=4, target_modules=a, init_weights=False),
    "VeRA": lambda t, a, f, e: peft.VeraConfig(task_type=t, r=2, target_modules=a[:1]),
    "VB-LoRA": lambda t, a, f, e: peft.VBLoRAConfig(
        task_type=t, r=2, num_vectors=10, vector_length=8, topk=2, target_modules=a
    ),
    "IA3": lambda t, a, f, e: peft.IA3Config(
        task_type=t, target_modules=[*a, *f], feedforward_modules=f, init_ia3_weights=False
    ),
    "X-LoRA": lambda t, a, f, e: None,  # of saved adapters: see `adapted`
    "trainable tokens": lambda t, a, f, e: peft.TrainableTokensConfig(
        task_type=t, token_indices=[7, 8], target_modules=[e], init_weights=False
    ),
    "prompt tuning": lambda t, a, f, e: peft.PromptTuningConfig(task_type=t, **VIRTUAL),
    "prefix tuning": lambda t, a, f, e: peft.PrefixTuningConfig(task_type=t, **VIRTUAL),
    "P-tuning": lambda t, a, f, e: peft.PromptEncoderConfig(task_type=t, encoder_hidden_size=16, **VIRTUAL),
}


def examples() -> list[dict]:
    torch.manual_seed(1)
    lengths = (5, 12, 3, 9, 9, 7)
    # Tokens 7 and 8 among them, which some adapters train.
    ids = [torch.cat([torch.tensor([7, 8]), torch.randint(5, 60, (length,))]) for length in lengths]
    return [{"input_ids": i, "label": k % 2, "answer": torch.randint(5, 60, (4,))} for k, i in enumerate(ids)]


def collate(rows: list[dict]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 1).long(),
        "label": torch.tensor([row["label"] for row in rows]),
        "answer": torch.stack([row["answer"] for row in rows]),
    }


def adapted(adapter: str, model: str, folder: Path) -> nn.Module:
    make, _, task, attention, feed_forward, embedding = MODELS[model]
    torch.manual_seed(0)
    base = make()
    base.config.use_cache = False  # which X-LoRA asks for
    if adapter != "X-LoRA":
        config = ADAPTERS[adapter](task, attention, feed_forward, embedding)
        return peft.get_peft_model(base, config).double()
    saved = {}
    for name in ("0", "1"):
        config = peft.LoraConfig(task_type=task, r=2, target_modules=attention, init_lora_weights=False)
        peft.get_peft_model(make(), config).save_pretrained(folder / name)
        saved[name] = str(folder / name)
    config = peft.XLoraConfig(task_type=task, hidden_size=32, xlora_depth=1, adapters=saved)
    return peft.get_peft_model(base, config).double()


def truth(model: nn.Module, loss_fn: Callable, data: list[dict], names: list[str]) -> dict[str, Tensor]:
    model.eval()
    parameters, rows = dict(model.named_parameters()), []
    for row in data:
        loss = loss_fn(model, collate([row])).sum()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
        rows.append([gradient.flatten() for gradient in gradients])
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(names)}


def outcome(adapter: str, model: str, folder: Path) -> str:
    """exact, slow (some of it one example at a time), refused, or - where PEFT itself does not allow it.

    Raises:
        AssertionError: the gradients are wrong.
    """
    loss_fn, data = MODELS[model][1], examples()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            tuned = adapted(adapter, model, folder)
            loss_fn(tuned, collate(data[:1])).sum().backward()
        except Exception:  # whatever PEFT says of a model that it does not take
            return "-"
        tuned.zero_grad(set_to_none=True)
        try:
            found = datainf.per_sample_gradients(tuned, data, loss_fn, collate_fn=collate, dtype=torch.float64)
        except ValueError as error:
            assert "\n" not in str(error).strip()
            return "refused"
    expected = truth(tuned, loss_fn, data, list(found))
    largest = max(rows.norm() for rows in expected.values())
    for name, rows in expected.items():
        assert (found[name] - rows).norm() <= TOLERANCE * rows.norm() + 1e-12 * largest, f"{adapter}, {model}: {name}"
    return "slow" if any("one example at a time" in str(warning.message) for warning in said) else "exact"


def table(folder: Path) -> dict[str, list[str]]:
    """Adapter -> its outcome on each kind of model."""
    found = {}
    for adapter in ADAPTERS:
        found[adapter] = []
        for model in MODELS:
            place = folder / re.sub(r"\W", "_", f"{adapter} {model}")
            place.mkdir(parents=True)
            found[adapter].append(outcome(adapter, model, place))
    return found


def markdown(found: dict[str, list[str]]) -> str:
    rows = [["adapter", *MODELS], ["---"] * (1 + len(MODELS)), *([name, *cells] for name, cells in found.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = markdown(table(Path(folder)))
    if PAGE.exists():
        page = re.sub(r"\| adapter \|.*?\n(?!\|)", made + "\n", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf8")
    print(made)
