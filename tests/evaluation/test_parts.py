"""Parts of models of all kinds, by their layers' names."""

import pytest
import torch

from datainf.evaluation.parts import parts, some_layers
from datainf.storage.store import GradientStore

PATH = "base_model.model.{}.{}.attention.self.value.lora_{}.default.weight"


@pytest.mark.parametrize("blocks", ["roberta.encoder.layer", "model.layers", "transformer.h"])
def test_thirds_of_blocks(blocks):
    names = [PATH.format(blocks, number, side) for number in (0, 1, 2, 3, 10, 11) for side in "AB"]
    found = parts([*names, "base_model.model.classifier.modules_to_save.default.dense.weight"])
    assert list(found) == ["head", "lora_A", "lora_B", "low", "middle", "top"]
    assert [len(found[part]) for part in found] == [1, 6, 6, 4, 4, 4]
    assert found["top"] == names[8:] and found["low"] == names[:4]


def test_of_a_unet():
    names = [
        f"base_model.model.{place}.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
        for place in ("down_blocks.0", "mid_block", "up_blocks.1")
    ]
    assert parts(names) == {"lora_A": names, "low": names[:1], "middle": names[1:2], "top": names[2:]}


def test_some_layers_keep_their_shapes():
    store = GradientStore({"a": torch.ones(2, 3, 4), "b": torch.ones(2, 5, 1)})
    some = some_layers(store, ["b"])
    assert list(some) == ["b"] and some.shapes == {"b": (5, 1)} and torch.equal(some["b"], store["b"])
