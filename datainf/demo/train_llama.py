"""Pre-train the demo Llama: a small Llama and its tokenizer, on text of the project's own making.

    python -m datainf.demo.train_llama [--steps N] [--output DIR] [--seed 0]

The corpus (`datainf.demo.llama_corpus`) is made of prompts and answers; the loss is on the answers alone, since the
prompts are random. The tokenizer has the words of instructions and stories as one token each, so prompts are short,
and spells everything else in characters, so that the model can edit words and compute with digits.
"""

import logging
import string
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from datainf.demo import LLAMA, command
from datainf.demo.llama_corpus import LEVELS, WORDS, Line, corpus
from datainf.demo.train_base import by_length

logger = logging.getLogger(__name__)

MAX_LENGTH = 256
STEPS = 5300
BATCH = 32
SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Known words are one token each, with or without a space in front; other text is characters or else bytes."""
    signs = [" +", " -", " =", " //"]
    words = [space + word for word in WORDS for space in ("", " ")]
    characters = [*string.printable[:95], "\n"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *signs, *words]
    # Byte-pair encoding without any merges: a piece is one token where the vocabulary has it, else its characters.
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
        ignore_merges=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| //| [-+=]"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(lines: list[Line], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Token ids of each line up to its </s>, and the labels: the answer's tokens and the </s>, else -100."""
    prompts = tokenizer([line.prompt for line in lines])["input_ids"]
    wholes = tokenizer([line.prompt + line.answer for line in lines])["input_ids"]
    rows = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        ids = [*whole, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return rows


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of just under a million parameters with random weights, apart from a start for copying."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=344,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            # The usual 0.02 is for wide models: one so narrow would start out with almost no signal.
            initializer_range=0.06,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    start_with_copying(model)
    return model


@torch.no_grad()
def start_with_copying(model: LlamaForCausalLM) -> None:
    """Set the first attention weights so that the model copies early: an induction circuit, as larger models form it.

    From random weights alone so narrow a model takes most of its training to find this circuit, and every edit needs
    it. In the first layer head 0 looks one token back and head 1 two; in the second layer head 0 looks for the place
    behind an earlier occurrence of the present token, and head 1 for one behind the present pair of tokens. All heads
    pass on what they see. Training then goes on from there; nothing is held fixed.
    """
    config = model.config
    width, dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        passed_on = torch.linalg.qr(torch.randn(width, width)).Q
        attention.v_proj.weight.copy_(passed_on)
        attention.o_proj.weight.copy_(passed_on.T)
        # The component below is the same in all tokens: it carries nothing that were worth passing on.
        attention.v_proj.weight[:, 0] = 0
    first, second = attentions[:2]
    head_0, head_1 = slice(0, dim), slice(dim, 2 * dim)

    # Positions: a query and a key that depend on no token, in the fast rotations of RoPE, the key turned back.
    model.model.embed_tokens.weight[:, 0] = 0.3
    fast = torch.arange(6)
    turn = config.rope_parameters["rope_theta"] ** (-2 * fast / dim)
    for back, head in enumerate((head_0, head_1), start=1):
        query, key = torch.zeros(dim, width), torch.zeros(dim, width)
        query[fast, 0] = 1.5
        key[fast, 0], key[fast + dim // 2, 0] = 1.5 * torch.cos(back * turn), 1.5 * torch.sin(back * turn)
        first.q_proj.weight[head], first.k_proj.weight[head] = query, key

    # Both heads of the first layer project alike but write to places of their own, where the second layer reads them.
    own = first.v_proj.weight[head_0].clone()
    first.v_proj.weight[head_1] = own
    written = torch.linalg.qr(torch.randn(width, width)).Q
    first.o_proj.weight.copy_(written)
    before, two_before = written.T[head_0], written.T[head_1]
    place = torch.arange(dim)
    # What is compared has to stay out of the fast rotations.
    slow = 1.4 * (place % (dim // 2) >= 4)[:, None]
    even = (place % 2 == 0)[:, None]
    second.q_proj.weight[head_0], second.k_proj.weight[head_0] = own * slow, before * slow
    second.q_proj.weight[head_1] = torch.where(even, own, before) * slow
    second.k_proj.weight[head_1] = torch.where(even, before, two_before) * slow


def train_llama(output: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the model and save it and its tokenizer in the hub's format, the weights in float16.

    Args:
        output: Folder to write; made if need be.
        steps: Optimisation steps of `BATCH` lines each, shared out over the levels of the corpus.
        seed: Seed of the corpus, the initial weights and the order.
    """
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    logger.info("%d tokens in the vocabulary, %d parameters", len(tokenizer), model.num_parameters())
    rows = []
    for level in LEVELS:
        lines = corpus(max(1, round(steps * level.share)) * BATCH, seed, level)
        rows += by_length(encode(lines, tokenizer), seed)
    logger.info("%d lines, %d tokens", len(rows), sum(len(row["input_ids"]) for row in rows))
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, steps // 4),
                weight_decay=0.01,
                adam_beta2=0.98,
                train_sampling_strategy="sequential",
                logging_steps=100,
                save_strategy="no",
                report_to=[],
                seed=seed,
                use_cpu=True,
                bf16=True,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        ).train()
    # The checkpoint is read in float32; float16 halves its size on disk.
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    command.pretrain(train_llama, "Pre-train the demo Llama on generated text.", steps=STEPS, output=LLAMA)
