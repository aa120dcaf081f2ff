"""The factors of EK-FAC against the definition, one example at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scripts.tiny import collate, make_examples, make_model
from torch import nn

import datainf
from datainf.errors import InputError
from datainf.gradients.layers import owners, trainable_layers
from datainf.models.losses import classification


def by_definition(model, examples, loss_fn, collate) -> dict:
    """Layer -> the two sums, from what goes into its module and the gradient of what comes out, in float64."""
    modules = {
        layer: owner for owner, names in owners(model, trainable_layers(model)).items() for layer in names.values()
    }
    found = {}
    for example in examples:
        seen = {}
        hooks = [
            module.register_forward_hook(
                lambda _, inputs, output, layer=layer, seen=seen: seen.update({layer: (inputs[0], output)})
            )
            for layer, module in modules.items()
        ]
        loss = loss_fn(model, collate([example])).sum()
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
        for (layer, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
            for side, tokens in enumerate((gradient, inputs)):
                tokens = tokens.detach().double().reshape(-1, tokens.shape[-1])
                found.setdefault(layer, [0, 0])[side] += tokens.T @ tokens
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_they_are_the_second_moments_of_tokens(batch_size):
    """Whatever shares a batch: what is padded counts for nothing."""
    model, examples = make_model().eval(), make_examples(12)
    found = datainf.kronecker_factors(model, examples, classification, collate_fn=collate, batch_size=batch_size)
    expected = by_definition(model, examples, classification, collate)
    assert found.keys() == expected.keys() == trainable_layers(model).keys()
    for layer, sides in found.items():
        assert tuple(map(len, sides)) == tuple(trainable_layers(model)[layer].shape)
        for side, other in zip(sides, expected[layer], strict=True):
            assert side.dtype == torch.float64
            torch.testing.assert_close(side, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_of_one_token_and_one_example_ekfac_is_kronecker():
    """A head sees one token of each example: the sides of both have the same eigenvectors."""
    model, examples = make_model(), make_examples(1)
    options = {"collate_fn": collate, "layers": "classifier.*dense"}
    train = datainf.per_sample_gradients(model, examples, classification, **options)
    factors = datainf.kronecker_factors(model, examples, classification, **options)
    found = datainf.influence(train, train, "ekfac", factors=factors)
    torch.testing.assert_close(found, datainf.influence(train, train, "kronecker"), rtol=1e-4, atol=0)


def test_a_convolution_has_those_of_its_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 1, bias=False)).double()
    examples = list(torch.randn(4, 2, 6, 6, dtype=torch.float64))

    def loss(model, batch):
        return model(batch).square().sum(dim=1)

    found = datainf.kronecker_factors(model, examples, loss, batch_size=3)
    patches = nn.functional.unfold(torch.stack(examples), 3, stride=2).mT.reshape(-1, 18)
    torch.testing.assert_close(found["0.weight"][1], patches.T @ patches)
    assert len(found["0.weight"][0]) == 3


def test_the_model_is_left_as_found():
    model = make_model().train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    datainf.kronecker_factors(model, make_examples(3), classification, collate_fn=collate)
    assert model.training and before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals():
    model, examples = make_model(), make_examples(3)
    with pytest.raises(InputError, match="The dataset has no examples"):
        datainf.kronecker_factors(model, [], classification, collate_fn=collate)
    dora = get_peft_model(
        nn.Sequential(nn.Linear(3, 4)), LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    )
    with pytest.raises(InputError, match="is no plain matrix, so it has no factors: leave it out by layers="):
        datainf.kronecker_factors(dora, list(torch.ones(2, 3)), lambda model, x: model(x).sum(dim=1))
    train = datainf.per_sample_gradients(model, examples, classification, collate_fn=collate)
    with pytest.raises(
        InputError, match="ekfac must know the factors of layer '.*': give factors=, as kronecker_factors"
    ):
        datainf.influence(train, train, "ekfac")
    factors = datainf.kronecker_factors(model, examples, classification, collate_fn=collate)
    name = next(iter(factors))
    with pytest.raises(InputError, match=r"The factors of layer '.*' are of a matrix \(1, 1\), not \("):
        datainf.influence(train, train, "ekfac", factors=factors | {name: (torch.eye(1), torch.eye(1))})
