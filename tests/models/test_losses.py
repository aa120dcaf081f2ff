"""The study's losses on models of every kind: the model's own of one example without padding, or refused."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import datainf
from datainf.errors import InputError
from datainf.models import losses
from datainf.models.losses import IGNORED, as_published, classification, completion, denoising, full

PADDING = 1
SIZE = {"vocab_size": 40, "pad_token_id": PADDING, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SIZE | {"intermediate_size": 24}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=1)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZE, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32)),
    "roberta": lambda: RobertaForCausalLM(RobertaConfig(**WIDE, max_position_embeddings=32, is_decoder=True)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
}
TEXTS = [torch.arange(3, 3 + length) * 7 % 40 for length in (5, 9, 4, 7)]
PROMPT = 2


def made(model):
    torch.manual_seed(0)
    return model().double().eval()


# Losses of transformers, and parts of some models, are in float32.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)


def padded(side, prompt=PROMPT):
    """The texts in one batch, padded on this side."""
    width = max(map(len, TEXTS))

    def fill(row, value):
        more = row.new_full((width - len(row),), value)
        return torch.cat([more, row] if side == "left" else [row, more])

    labels = [torch.where(torch.arange(len(row)) < prompt, IGNORED, row) for row in TEXTS]
    return {
        "input_ids": torch.stack([fill(row, PADDING) for row in TEXTS]),
        "attention_mask": torch.stack([fill(torch.ones_like(row), 0) for row in TEXTS]),
        "labels": torch.stack([fill(row, IGNORED) for row in labels]),
    }


def own_loss(model, row, of):
    """The model's own loss of one text that is not padded."""
    place = torch.arange(len(row))
    counted = {"completion": place >= PROMPT, "as_published": place < PROMPT, "full": place >= 0}[of]
    return model(input_ids=row[None], labels=torch.where(counted, row, IGNORED)[None]).loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_on_either_side_changes_nothing(decoder, side):
    model = made(DECODERS[decoder])
    for loss_fn in (completion, as_published, full):
        with torch.no_grad():
            found = loss_fn(model, padded(side))
            expected = torch.stack([own_loss(model, row, loss_fn.__name__) for row in TEXTS])
        assert_close(found, expected)


def test_gradients_of_texts_that_are_padded_on_the_left():
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(made(DECODERS["gpt2"]), lora).double()
    rows = [{"input_ids": row.tolist(), "n": place} for place, row in enumerate(TEXTS)]

    def collate(some, side):
        batch = padded(side)
        return {name: value[[row["n"] for row in some]] for name, value in batch.items()}

    left, right = (
        datainf.per_sample_gradients(
            model, rows, completion, collate_fn=partial(collate, side=side), dtype=torch.float64, batch_size=3
        )
        for side in ("left", "right")
    )
    for name, expected in right.items():
        torch.testing.assert_close(left[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens(kind):
    more = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **more)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**WIDE)), config).double().eval()
    with torch.no_grad():
        found = completion(model, padded("right"))
        assert_close(completion(model, padded("left")), found)
        for row, loss in zip(TEXTS, found, strict=True):
            labels = torch.where(torch.arange(len(row)) < PROMPT, IGNORED, row)[None]
            own = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None], labels=labels).loss
            assert_close(loss, own)


def test_padding_on_the_left_is_refused_where_it_moves_positions():
    classifier = BertForSequenceClassification(BertConfig(**WIDE, max_position_embeddings=32))
    for model, loss_fn in ((classifier, classification), (made(ENCODER_DECODERS["t5"]), completion)):
        batch = padded("left") | ({"labels": torch.zeros(4).long()} if loss_fn is classification else {})
        with pytest.raises(InputError, match="padded on the left.*: pad on the right"):
            loss_fn(model, batch)


ENCODER_DECODERS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
        )
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_have_the_loss_of_their_response(name):
    model, batch = made(ENCODER_DECODERS[name]), padded("right")
    batch["labels"] = torch.stack([torch.tensor([5, 6, 7, IGNORED]), *torch.randint(3, 40, (3, 4))])
    with torch.no_grad():
        found = completion(model, batch)
        for row, labels, loss in zip(TEXTS, batch["labels"], found, strict=True):
            own = model(input_ids=row[None], labels=labels[labels != IGNORED][None]).loss
            assert_close(loss, own)
    for loss_fn in (as_published, full):
        with pytest.raises(InputError, match="gives its prompt no likelihood: take .*, completion"):
            loss_fn(model, batch)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"num_labels": 3}, torch.tensor([0, 2, 1, 1])),
        ({"num_labels": 3}, torch.tensor([0.0, 2.0, 1.0, 1.0])),
        ({"num_labels": 1}, torch.tensor([0.5, -2.0, 1.0, 3.0])),
        ({"num_labels": 1}, torch.tensor([[0.5], [-2.0], [1.0], [3.0]])),
        ({"num_labels": 2, "problem_type": "regression"}, torch.randn(4, 2)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.tensor([[0, 1, 1]] * 4)),
        ({"num_labels": 3}, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]] * 2)),
    ],
)
def test_classifiers_of_every_kind_have_their_own_loss(settings, labels):
    model = made(lambda: BertForSequenceClassification(BertConfig(**WIDE, max_position_embeddings=32, **settings)))
    batch = padded("right") | {"labels": labels.double() if labels.is_floating_point() else labels}
    with torch.no_grad():
        found = classification(model, batch)
        for row, label, loss in zip(TEXTS, batch["labels"], found, strict=True):
            kind = settings.get("problem_type")
            if kind == "multi_label_classification" or (settings["num_labels"] == 3 and label.dim()):
                label = label.double()
            elif settings["num_labels"] == 3:
                label = label.long()
            torch.testing.assert_close(loss, model(input_ids=row[None], labels=label[None]).loss)


CLASSIFIERS = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**WIDE, num_key_value_heads=1, num_labels=3)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**WIDE, num_labels=3)),
    "xlnet": lambda: XLNetForSequenceClassification(
        XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=PADDING, num_labels=3)
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_read_a_padded_text_as_the_text_alone_or_refuse_it(name):
    model, labels = made(CLASSIFIERS[name]), torch.tensor([0, 2, 1, 1])
    right, wrong = ("left", "right") if name == "xlnet" else ("right", "left")
    with torch.no_grad():
        found = classification(model, padded(right) | {"labels": labels})
        for row, label, loss in zip(TEXTS, labels, found, strict=True):
            assert_close(loss, model(input_ids=row[None], labels=label[None]).loss)
    with pytest.raises(InputError, match=f"pad on the {right}"):
        classification(model, padded(wrong) | {"labels": labels})
    if name != "llama":  # the others know padding by the mask
        model.config.pad_token_id = 2
        assert torch.equal(classification(model, padded(right) | {"labels": labels}), found)
        return
    for known, sentence in ((2, "config.pad_token_id is 2"), (None, "config.pad_token_id is None")):
        model.config.pad_token_id = known
        with pytest.raises(InputError, match=f"padded with token 1, but the model's {sentence}"):
            classification(model, padded(right) | {"labels": labels})


def test_labels_whose_meaning_depends_on_the_model_are_asked_for():
    model = made(lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**WIDE, num_labels=3)))
    batch = padded("right") | {"labels": torch.tensor([[0.0, 0.2, 0.8]] * 4).double()}
    with pytest.raises(InputError, match="set config.problem_type"):
        classification(model, batch)
    model.config.problem_type = "multi_label_classification"
    with torch.no_grad():
        assert_close(classification(model, batch).mean(), model(**batch).loss)


def test_a_batch_that_lacks_something_is_refused_by_name():
    model = made(DECODERS["llama"])
    for loss_fn in (completion, as_published, full):
        for name in ("attention_mask", "input_ids"):
            batch = padded("right")
            del batch[name]
            with pytest.raises(InputError, match=f"The batch has no '{name}', only "):
                loss_fn(model, batch)


def test_labels_that_are_not_the_tokens_are_refused():
    batch = padded("right")
    batch["labels"][2, 3] = 17
    with pytest.raises(InputError, match="The label 17 is not the input id in its place"):
        completion(made(DECODERS["llama"]), batch)


def test_where_nobody_looks_what_is_wrong_has_no_loss(monkeypatch):
    """As on a GPU, where looking would wait for it."""
    monkeypatch.setattr(losses, "_refuse", lambda *_: None)
    batch = padded("right")
    batch["labels"][2, 3] = 17
    assert completion(made(DECODERS["llama"]), batch).isnan().tolist() == [False, False, True, False]
    model, labels = made(CLASSIFIERS["llama"]), torch.tensor([0, 0.5, 1, 2])
    batch = padded("right") | {"labels": labels}
    batch["input_ids"][2, -1] = PADDING + 1
    assert classification(model, batch).isnan().tolist() == [False, True, True, False]
    batch = padded("left") | {"labels": torch.full((4, 2), 3)}
    assert completion(made(ENCODER_DECODERS["t5"]), batch).isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_text_of_which_no_token_counts_has_no_loss(reduction):
    batch = padded("right")
    batch["labels"][1] = IGNORED
    found = completion(made(DECODERS["llama"]), batch, reduction=reduction)
    assert found.isnan().tolist() == [False, True, False, False]


def test_labels_that_are_none_of_the_models_are_refused():
    def refused(sentence, labels, **settings):
        settings = {"num_labels": 3} | settings
        model = BertForSequenceClassification(BertConfig(**WIDE, max_position_embeddings=32, **settings))
        batch = padded("right") | {"labels": labels}
        with pytest.raises(InputError, match=sentence) as caught:
            classification(model, batch)
        assert "\n" not in str(caught.value)

    refused("Label 3 is not one of the model's: they are 0 to 2", torch.tensor([0, 1, 2, 3]))
    refused("Label -100 is not one of", torch.tensor([0, 1, 2, -100]))
    refused("Label 0.5 is not one of", torch.tensor([0, 1, 2, 0.5]))
    refused(r"Labels have shape \(4, 1\), but the model has 3 for each of 4", torch.tensor([[0], [1], [2], [0]]))
    refused(r"Labels have shape \(4, 2\)", torch.zeros(4, 2), problem_type="multi_label_classification")
    refused(r"Labels have shape \(3,\)", torch.zeros(3), num_labels=1)
    model = BertForSequenceClassification(BertConfig(**WIDE, max_position_embeddings=32))
    inputs = {name: value for name, value in padded("right").items() if name != "labels"}
    with pytest.raises(InputError, match="The batch has no 'labels', only input_ids, attention_mask"):
        classification(model, inputs | {})


def test_tokens_without_an_embedding_are_refused():
    batch = padded("right")
    batch["input_ids"][1, 2] = batch["labels"][1, 2] = 40
    for make, loss_fn in ((DECODERS["llama"], completion), (DECODERS["gpt2"], full)):
        with pytest.raises(InputError, match="Token 40 has no embedding, of which the model has 40"):
            loss_fn(made(make), batch)


def unet(**more):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    ).double()


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + 8,
}
LATENTS = [
    {
        "sample": torch.randn(2, 4, 8, 8).double(),
        "target": torch.randn(2, 4, 8, 8).double(),
        "timestep": torch.tensor([1, 500]),
        "encoder_hidden_states": torch.randn(5, 12).double(),
    }
    for _ in range(3)
]


@pytest.mark.parametrize(
    ("settings", "condition"),
    [
        (SDXL, {"added_cond_kwargs": {"text_embeds": torch.randn(3, 8).double(), "time_ids": torch.randn(3, 6)}}),
        ({"num_class_embeds": 4}, {"class_labels": torch.tensor([0, 3, 1])}),
        ({}, {}),
    ],
    ids=["SDXL", "classes", "SD 1"],
)
def test_denoising_with_what_else_a_unet_asks_for(settings, condition):
    model, batch = unet(**settings), default_collate(LATENTS) | condition
    with torch.no_grad():
        found = denoising(model, batch)
        for place, row in enumerate(LATENTS):

            def own(value, place=place):
                if isinstance(value, dict):
                    return {name: own(part) for name, part in value.items()}
                return value[place : place + 1]

            errors = [
                (
                    model(
                        row["sample"][v][None], row["timestep"][v], row["encoder_hidden_states"][None], **own(condition)
                    ).sample
                    - row["target"][v][None]
                )
                .square()
                .mean()
                for v in range(2)
            ]
            assert_close(found[place], torch.stack(errors).mean())


def test_what_a_unet_does_not_take_is_named():
    with pytest.raises(InputError, match="takes no 'pixel_values', which is in the batch"):
        denoising(unet(), default_collate(LATENTS) | {"pixel_values": torch.zeros(3)})


def test_losses_of_logits_in_half_precision_are_in_float32():
    model = made(DECODERS["llama"]).bfloat16()
    assert completion(model, padded("right")).dtype == torch.float32
    logits = model(**{k: v for k, v in padded("right").items() if k != "labels"}).logits[0, :4].float()
    expected = F.cross_entropy(logits[1:4], TEXTS[0][2:5])
    assert completion(model, padded("right"))[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.text("completion", "mean").func is completion
