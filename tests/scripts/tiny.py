"""A small classifier with a random adapter and texts for it, the same in every process that asks."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import RobertaConfig, RobertaForSequenceClassification

VOCABULARY, PAD = 60, 1

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # of transformers by peft


def make_model(rank: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        num_labels=2,
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=["value"], init_lora_weights=False)
    return get_peft_model(RobertaForSequenceClassification(config), lora)


def make_examples(n: int) -> list[dict]:
    """Texts of 2 to 24 tokens, as a tokenizer would return them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 25, (n,), generator=generator).tolist()
    texts = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": text, "labels": index % 2} for index, text in enumerate(texts)]


def collate(examples: list[dict]) -> dict[str, Tensor]:
    texts = [torch.tensor(example["input_ids"]) for example in examples]
    ids = pad_sequence(texts, batch_first=True, padding_value=PAD)
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
