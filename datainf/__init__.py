"""DataInf: which fine-tuning examples a LoRA-tuned model's behaviour comes from.

train = datainf.per_sample_gradients(model, train_set, loss_fn, collate_fn=...)
query = datainf.per_sample_gradients(model, query_set, loss_fn, collate_fn=...)
scores = datainf.influence(train, query, method="datainf")    # Tensor (m, n); > 0 is harmful, < 0 helpful
"""

from datainf.estimating import estimate
from datainf.gradients import per_sample_gradients, reference_gradients
from datainf.influence import METHODS, ihvp, influence, resolve_method, scores, self_influence
from datainf.store import GradientStore

__all__ = [
    "METHODS",
    "GradientStore",
    "estimate",
    "ihvp",
    "influence",
    "per_sample_gradients",
    "reference_gradients",
    "resolve_method",
    "scores",
    "self_influence",
]
