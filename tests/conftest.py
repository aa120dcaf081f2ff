"""Small models of the families the study covers, and where real data may be found."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from xdist.scheduler import LoadScopeScheduling

from datainf.demo.train_diffusion import build_tokenizer
from datainf.study.provenance import ROOT

VOCABULARY, PAD = 60, 1


class _ByFileWhereShared(LoadScopeScheduling):
    """Tests of a file that makes something once for all of them stay in one process; others go to whichever is free."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if 'scope="module"' in (ROOT / path).read_text(encoding="utf8") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _ByFileWhereShared(config, log)


@pytest.hookimpl(trylast=True)  # after they have been put in random order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: a test that is begun last is waited for by all processes but one."""
    long = ("notebooks", "study", "benchmarks")
    items.sort(key=lambda item: next((place for place, folder in enumerate(long) if folder in item.path.parts), 3))


FAMILIES = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig, ["value"], {"num_attention_heads": 4}),
    "bert": (BertForSequenceClassification, BertConfig, ["value"], {"num_attention_heads": 4}),
    # Grouped-query attention: v_proj is narrower than q_proj.
    "llama": (
        LlamaForSequenceClassification,
        LlamaConfig,
        ["q_proj", "v_proj"],
        {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}


@pytest.fixture
def make_model():
    """``make_model(family, rank=2, dtype=..., **lora)``: a random model with a random (not zero) adapter."""

    def make(family: str, rank: int = 2, dtype: torch.dtype = torch.float32, **lora):
        torch.manual_seed(0)
        model_class, config_class, targets, heads = FAMILIES[family]
        config = config_class(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            max_position_embeddings=64,
            pad_token_id=PAD,
            num_labels=2,
            **heads,
        )
        lora = {"target_modules": targets, "lora_dropout": 0.3, "init_lora_weights": False} | lora
        model = get_peft_model(
            model_class(config).to(dtype),
            LoraConfig(task_type="SEQ_CLS", r=rank, **lora),
            autocast_adapter_dtype=False,
        )
        return model.train()

    return make


@pytest.fixture
def token_examples():
    """Twelve examples of mixed lengths, as a tokenizer would return them."""
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 17, 3, 9, 9, 24, 4, 11, 6, 2, 13, 8]
    return [
        {
            "input_ids": torch.randint(5, VOCABULARY, (length,), generator=generator).tolist(),
            "labels": index % 2,
        }
        for index, length in enumerate(lengths)
    ]


@pytest.fixture
def pad_collate():
    """Pad to the longest example of the batch, with an attention mask."""

    def collate(examples):
        longest = max(len(example["input_ids"]) for example in examples)
        rows = [example["input_ids"] + [PAD] * (longest - len(example["input_ids"])) for example in examples]
        mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
        return {
            "input_ids": torch.tensor(rows),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    return collate


@pytest.fixture(scope="session")
def diffusion_base(tmp_path_factory) -> str:
    """A folder with a tiny, untrained Stable Diffusion pipeline, as the hub would serve it: 16 x 16 pixels, and like
    version 1.5 with a PNDM scheduler that predicts noise."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        **blocks,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **blocks,
    )
    tokenizer = build_tokenizer(["a picture of a thing in a style"])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = tmp_path_factory.mktemp("hub") / "tiny-diffusion"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        unet=unet,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def _folder_from(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"set {variable} to a folder of real data or models to run this test")
    return Path(folder)


@pytest.fixture
def real_data() -> Path:
    """A folder with glue/mrpc/train.tsv and its like, named by DATAINF_TEST_DATA."""
    return _folder_from("DATAINF_TEST_DATA")


@pytest.fixture
def real_models() -> Path:
    """A folder of pretrained checkpoints, named by DATAINF_TEST_MODELS."""
    return _folder_from("DATAINF_TEST_MODELS")
