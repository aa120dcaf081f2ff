"""Influence as the paper's published code goes about it, written afresh from its description.

One example at a time: a forward and a backward pass of batch size 1, the gradients kept as a dict of CPU tensors for
every example and layer; then Python loops over queries, layers and training examples. The equations are the paper's and
so are the results but for rounding; nothing here is clever, and nothing is slowed down.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datainf.gradients.layers import trainable_layers
from datainf.models.losses import classification

Gradients = list[dict[str, Tensor]]
"""For every example, layer -> the gradient of its weight, in the weight's shape."""


def gradients(model: nn.Module, examples: Sequence[dict], collate: Callable[[Sequence[dict]], Mapping]) -> Gradients:
    """One forward and backward pass for each example."""
    weights = trainable_layers(model)
    found = []
    for example in examples:
        model.zero_grad(set_to_none=True)
        classification(model, collate([example])).sum().backward()
        found.append({name: weight.grad.detach().cpu().clone() for name, weight in weights.items()})
    model.zero_grad(set_to_none=True)
    return found


def hessian_free(train: Gradients, queries: Gradients) -> Gradients:
    """The gradients of the queries as they are."""
    return queries


def datainf(train: Gradients, queries: Gradients, damping: float = 0.1) -> Gradients:
    """The paper's Algorithm 1: for every query, layer and training example in turn."""
    n = len(train)
    products = []
    for v in queries:
        product = {}
        for name, value in v.items():
            lam = damping * sum(float((g[name] ** 2).mean()) for g in train) / n
            r = torch.zeros_like(value)
            for g in train:
                c = (value * g[name]).sum() / (lam + (g[name] ** 2).sum())
                r += (value - c * g[name]) / (n * lam)
            product[name] = r
        products.append(product)
    return products


def scores(train: Gradients, products: Gradients) -> Float[Tensor, "m n"]:
    """Minus the inner products over all layers, one pair at a time."""
    found = torch.zeros(len(products), len(train))
    for j, r in enumerate(products):
        for k, g in enumerate(train):
            found[j, k] = -sum(float((r[name] * g[name]).sum()) for name in r)
    return found
