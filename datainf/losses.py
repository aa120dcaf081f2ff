"""One loss per example, for each family of models: ``loss_fn(model, batch) -> Tensor (batch,)``."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


def classification(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of each example's label, -log p(y | f(x)) (paper D.1).

    `batch` is what a transformers data collator makes: ``labels`` (batch,) and the model's inputs.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
