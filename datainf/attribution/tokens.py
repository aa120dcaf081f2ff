"""Which words of an example, or which places of a picture, its influence comes from.

The gradient of a matrix is a sum over tokens, g = sum_t (dloss/dy_t) x_t^T, and a score is linear in it. So a score is
exactly a sum over the example's tokens:

    score[j, k] = - sum over layers, sum over tokens t of example k  of  (dloss/dy_t)^T R[j] x_t ,

R[j] being the query's inverse-Hessian-vector product. H is symmetric, so that the same with the two exchanged, the
ihvp of a training example and the tokens of a query, says which of the query's words it acts on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from datainf.errors import InputError
from datainf.gradients.batches import as_sequence
from datainf.gradients.layers import as_tokens, check_adapters, trainable_layers
from datainf.gradients.per_sample import LossFn, check_at_hand, frozen
from datainf.gradients.recording import Recorder
from datainf.progress import bar
from datainf.storage.store import matrix_shape


@dataclass(frozen=True)
class TokenInfluence:
    """One example's scores for m queries, token by token.

    Attributes:
        by_length: T -> (m, T), what comes through the layers that see T tokens; of a text model there is one T, of a
            UNet one for each size of picture, and the prompt's.
        rest: (m,), what comes through layers that see no tokens, such as a head on the pooled state, or see them
            otherwise than in the example's order, such as an expert, or that are no plain matrix.
    """

    by_length: Mapping[int, Float[Tensor, "m T"]]
    rest: Float[Tensor, " m"]

    @property
    def total(self) -> Float[Tensor, " m"]:
        """The scores themselves."""
        return self.rest + sum(each.sum(dim=1) for each in self.by_length.values())

    def places(self, height: int, width: int) -> Float[Tensor, "m height width"]:
        """A picture's scores by place of its latent: what a layer sees at half the size is spread evenly.

        Raises:
            InputError: no layer sees such a picture.
        """
        sizes = [(height >> k, width >> k) for k in range(int(math.log2(min(height, width))) + 1)]
        of_size = {h * w: (h, w) for h, w in sizes}
        if found := {of_size[length]: each for length, each in self.by_length.items() if length in of_size}:
            return sum(
                each.view(-1, *size).repeat_interleave(height // size[0], 1).repeat_interleave(width // size[1], 2)
                / (height // size[0] * (width // size[1]))
                for size, each in found.items()
            )
        raise InputError(f"No layer sees {height} x {width} places; there are {sorted(self.by_length)} tokens.")


def token_influence(
    model: nn.Module,
    examples: Sequence,
    loss_fn: LossFn,
    ihvp: Mapping[str, Float[Tensor, "m d"]],
    *,
    collate_fn: Callable[[list], Mapping] | None = None,
    rows_per_example: int = 1,
) -> list[TokenInfluence]:
    """The scores of some examples, token by token: of each a forward and a backward pass by itself.

    Args:
        examples: training examples, with the `ihvp` of queries; or queries, with the `ihvp` of training examples.
        loss_fn, collate_fn, rows_per_example: as of `per_sample_gradients`.
        ihvp: layer name -> R of shape (m, d_l), by `datainf.ihvp`; of its layers alone are the scores.

    Raises:
        ValueError: a layer that the model does not train.
    """
    examples, collate_fn = as_sequence(examples), collate_fn or default_collate
    weights = trainable_layers(model, list(ihvp))
    check_adapters(model, weights)
    check_at_hand(model)
    device, found = next(model.parameters()).device, []
    with frozen(model), _TokenRecorder(model, weights, ihvp, rows_per_example) as recorder:
        for example in bar(examples, desc="tokens", unit="example"):
            batch = send_to_device(collate_fn([example]), device)
            found.append(recorder.influence_of(lambda batch=batch: loss_fn(model, batch)))
    return found


class _TokenRecorder(Recorder):
    """Contracts what goes into a matrix and what comes back with R, token by token, instead of with each other."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], ihvp: Mapping[str, Tensor], rows: int):
        super().__init__(model, weights, rows, parts=1)
        self.R = {
            name: ihvp[name].to(weight.device).view(len(ihvp[name]), *matrix_shape(weight.shape))
            for name, weight in weights.items()
        }
        self._whole: set[str] = set()  # layers of which only the gradient of the whole example can be told

    def influence_of(self, loss: Callable[[], Tensor]) -> TokenInfluence:
        """Of the one example whose loss it is."""
        done = False
        while not done:
            self._by_length: dict[int, Tensor] = {}
            self._rest = torch.zeros(len(next(iter(self.R.values()))))
            for name in self._whole:
                self.weights[name].requires_grad_(True).grad = None
            with self.batch_of(1):
                loss().sum().backward()
            done = not self.copy_what_was_lost() and self.broken.keys() <= self._whole
            self._whole |= self.broken.keys()
        for name in self._whole:
            if (gradient := self.weights[name].grad) is not None:
                self._add_whole(name, gradient.to_dense())
        return TokenInfluence(self._by_length, self._rest)

    def _take(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        if name in self._whole:
            return
        x, dy = as_tokens(module, inputs, gradient)
        R, tokens = self.R[name], x.shape[1:-1].numel()
        x, dy = (side.reshape(len(side), tokens, -1).to(R.dtype) for side in (x, dy))
        # Rows are an example's timesteps; of those it has the sum.
        if dy.shape[-1] > x.shape[-1]:  # what stands between is as narrow as it can be
            scores = -(torch.einsum("rto,moi->mrti", dy, R) * x).sum(dim=(1, 3)).cpu()
        else:
            scores = -(torch.einsum("rti,moi->mrto", x, R) * dy).sum(dim=(1, 3)).cpu()
        if inputs.dim() == 2:
            self._rest = self._rest + scores.sum(dim=1)
        else:
            self._by_length[tokens] = self._by_length.get(tokens, 0) + scores

    def _add(self, name: str, gradients: Tensor) -> None:
        """Of a layer that is no plain matrix the whole gradient is at hand, and no tokens."""
        if name not in self._whole:
            self._add_whole(name, gradients)

    def _add_whole(self, name: str, gradient: Tensor) -> None:
        R = self.R[name].flatten(1)
        self._rest = self._rest - (R @ gradient.flatten().to(R.dtype)).cpu()
