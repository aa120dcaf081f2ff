"""Pre-train the demo base: a small RoBERTa and its tokenizer, by masked-language modelling.

    python -m datainf.demo.train_base [--steps N] [--output DIR] [--seed 0]

The corpus is the project's own generated text (`datainf.demo.corpus`). In a share of its lines the
verdict on the line is spoken out in one word ("brilliant", "awful", "same", "different"). The word
stands in front, in the place of the opening <s>, and is hidden behind <mask> or behind <s> itself.
So <s>, which carries no word of its own, learns to hold what the whole input amounts to, as BERT's
[CLS] does by next-sentence prediction. No classification head is trained here.
"""

import logging
import random
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from datainf.demo import BASE, command
from datainf.demo.corpus import VERDICTS, Line, phrases, sentences

logger = logging.getLogger(__name__)

MAX_LENGTH = 128
STEPS = 4000
BATCH = 64
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Stage:
    """A stage: its share of the steps, of phrases among its lines, of words that are masked; its rate."""

    name: str
    share: float
    phrases: float
    mask: float
    learning_rate: float


STAGES = (
    # Verdicts on phrases first: in long sentences a model without words finds nothing to hold on to.
    Stage("phrases", 0.25, 1.0, 0.0, 1e-3),
    Stage("sentences, mostly verdicts", 0.6, 0.0, 0.03, 1e-3),
    Stage("sentences, usual masking", 0.15, 0.0, 0.15, 5e-4),
)


def train_tokenizer(lines: list[Line], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """Byte-level BPE in lower case with RoBERTa's special tokens: it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every verdict has to be one token; as a line of its own it is frequent enough to become one.
    words = [word for words in VERDICTS.values() for word in words] * 1000
    tokenizer.train_from_iterator([text for line in lines for text in line.texts] + words, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=True
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(lines: list[Line], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Token ids of each line; a spoken verdict stands where the opening <s> would."""
    rows = []
    for line in lines:
        row = dict(tokenizer(*line.texts, truncation=True, max_length=MAX_LENGTH))
        if line.verdict is not None:
            (row["input_ids"][0],) = tokenizer(line.verdict, add_special_tokens=False)["input_ids"]
        rows.append(row)
    return rows


def by_length(rows: list[dict[str, list[int]]], seed: int) -> list[dict[str, list[int]]]:
    """The rows in an order in which every batch has rows of similar length, and the batches have no order.

    (The Trainer's own grouping runs from long to short time and again. Here length gives away the kind
    of text, and in such waves of one kind after another the model did not learn the verdicts.)
    """
    rng = random.Random(seed)
    batches = []
    for start in range(0, len(rows), 50 * BATCH):
        chunk = sorted(rows[start : start + 50 * BATCH], key=lambda row: len(row["input_ids"]))
        batches += [chunk[first : first + BATCH] for first in range(0, len(chunk), BATCH)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


class VerdictCollator(DataCollatorForLanguageModeling):
    """Masks words as usual, and always the verdict in front of a line that has one."""

    def torch_mask_tokens(
        self,
        inputs: torch.Tensor,
        special_tokens_mask: torch.Tensor | None = None,
        offset_mapping: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide tokens of a batch.

        Args:
            inputs: Token ids, shape (batch, length).
            special_tokens_mask: As in the parent class.
            offset_mapping: As in the parent class.

        Returns:
            The ids with some of them hidden, and the labels (-100 where nothing is to be predicted),
            both of shape (batch, length).
        """
        first = inputs[:, 0].clone()
        inputs, labels = super().torch_mask_tokens(inputs, special_tokens_mask, offset_mapping)
        spoken = first != self.tokenizer.bos_token_id
        labels[:, 0] = torch.where(spoken, first, -100)
        # <s> hides three verdicts in four: it is what the classification head will read.
        hidden = torch.where(torch.rand(len(first)) < 0.75, self.tokenizer.bos_token_id, self.tokenizer.mask_token_id)
        inputs[:, 0] = torch.where(spoken, hidden, first)
        return inputs, labels


def build_model(tokenizer: PreTrainedTokenizerFast) -> RobertaForMaskedLM:
    """A RoBERTa of about a million parameters with random weights."""
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            # RoBERTa counts positions from the padding id on.
            max_position_embeddings=MAX_LENGTH + tokenizer.pad_token_id + 1,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # So narrow a model learns to compare far sooner from these starts: attention that passes on what
    # it sees at full strength, and first layers where equal queries and keys let a word find its twin.
    for number, layer in enumerate(model.roberta.encoder.layer):
        attention = layer.attention
        torch.nn.init.normal_(attention.self.value.weight, std=0.08)
        torch.nn.init.normal_(attention.output.dense.weight, std=0.08)
        if number < 2:
            torch.nn.init.normal_(attention.self.query.weight, std=0.09)
            with torch.no_grad():
                attention.self.key.weight.copy_(attention.self.query.weight)
    return model


def _train_stage(
    model: RobertaForMaskedLM, tokenizer: PreTrainedTokenizerFast, lines: list[Line], stage: Stage, seed: int
) -> None:
    """Train the model in place, once over the lines."""
    logger.info("%s: %d lines", stage.name, len(lines))
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                learning_rate=stage.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=min(50, len(lines) // BATCH // 4),
                weight_decay=0.01,
                adam_beta2=0.98,
                adam_epsilon=1e-6,
                # Post-norm layers of this width collapse under the first large gradients.
                max_grad_norm=0.1,
                train_sampling_strategy="sequential",
                logging_steps=100,
                save_strategy="no",
                report_to=[],
                seed=seed,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=by_length(encode(lines, tokenizer), seed),
            data_collator=VerdictCollator(tokenizer, mlm_probability=stage.mask),
        ).train()


def train_base(output: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train tokenizer and model and save both in the hub's format, the weights in float16.

    Args:
        output: Folder to write; made if need be.
        steps: Optimisation steps of `BATCH` lines each, shared out over the stages.
        seed: Seed of the corpus, the initial weights, the order and the masks.
    """
    set_seed(seed)
    counts = [max(1, round(steps * stage.share)) * BATCH for stage in STAGES]
    book_counts = [round(count * stage.phrases) for count, stage in zip(counts, STAGES, strict=True)]
    book = iter(phrases(sum(book_counts), seed))
    text = sentences(sum(counts) - sum(book_counts), seed)
    tokenizer = train_tokenizer(text)
    model = build_model(tokenizer)
    logger.info("%d tokens in the vocabulary, %d parameters", len(tokenizer), model.num_parameters())
    rest = iter(text)
    for stage, count, book_count in zip(STAGES, counts, book_counts, strict=True):
        lines = [*islice(book, book_count), *islice(rest, count - book_count)]
        random.Random(seed).shuffle(lines)
        _train_stage(model, tokenizer, lines, stage, seed)
    # The checkpoint is read in float32; float16 halves its size on disk.
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    command.pretrain(train_base, "Pre-train the demo base on generated text.", steps=STEPS, output=BASE)
