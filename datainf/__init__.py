"""DataInf: which fine-tuning examples a LoRA-tuned model's behaviour comes from.

train = datainf.per_sample_gradients(model, train_set, loss_fn, collate_fn=...)
query = datainf.per_sample_gradients(model, query_set, loss_fn, collate_fn=...)
scores = datainf.influence(train, query, method="datainf")    # Tensor (m, n); > 0 is harmful, < 0 helpful
"""

from datainf.attribution.damping import damping_of_training
from datainf.attribution.estimating import estimate
from datainf.attribution.influence import METHODS, ihvp, influence, resolve_method, scores, self_influence, suspects
from datainf.gradients.factors import kronecker_factors
from datainf.gradients.per_sample import per_sample_gradients, reference_gradients
from datainf.storage.store import GradientStore

__all__ = [
    "METHODS",
    "GradientStore",
    "damping_of_training",
    "estimate",
    "ihvp",
    "influence",
    "kronecker_factors",
    "per_sample_gradients",
    "reference_gradients",
    "resolve_method",
    "scores",
    "self_influence",
    "suspects",
]
