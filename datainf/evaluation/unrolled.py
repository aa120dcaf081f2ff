"""The exact derivative of a query's loss with respect to every example's weight, through the whole fine-tuning.

A fine-tuning is s_(t+1) = Phi_t(s_t, g_t), where s is the state (weights, Adam's two means) and g_t the gradient of the
batch's loss, (1/b) sum_i w_i grad loss_i(theta_t). With a^T = dloss/ds_(t+1) and u^T = a^T dPhi_t/dg, one step back is

    dloss/dw_i  +=  (1/b) u . grad loss_i(theta_t)            of every example i in the batch
    dloss/ds_t   =  a^T dPhi_t/ds + u^T (Hessian of the batch's loss at theta_t, for the weights)

which is reverse mode over the optimizer's steps (Bae et al., 2024; Ilyas and Engstrom, 2025). No H is inverted, and
nothing is taken to have converged: it is what any influence score can hope to be, where the change is small.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn

from datainf.errors import InputError
from datainf.gradients.per_sample import evaluating
from datainf.models.trajectory import Step, Trajectory, flat
from datainf.progress import bar

TOLERANCE = 0.02
"""How far a step that is taken again may be from where it led, as a part of its length."""


def unrolled(
    trajectory: Trajectory,
    queries: Sequence,
    loss_fn: Callable[[nn.Module, Mapping], Tensor],
    *,
    collate_fn: Callable[[list], Mapping],
    mean: bool = False,
) -> Float[Tensor, "m n"]:
    """n times the derivative of each query's loss by each training example's weight, which is 1 in all its batches.

    In the units and the sign of `influence`: up-weighting an example by epsilon in the mean of n losses gives it the
    weight 1 + n epsilon. Leaving examples out in the same batches is then predicted to change the loss by minus their
    scores' sum over n.

    Costs about one fine-tuning, and two more for each query. The model is left as it was at the end.

    Args:
        trajectory: the fine-tuning, as `trajectory.record` has it.
        loss_fn: ``(model, batch) -> (batch,)``, a query's loss.
        mean: of the queries' mean loss alone, shape (1, n).

    Raises:
        InputError: there are no queries, or a step of the fine-tuning leads elsewhere when it is taken again.
    """
    if not len(queries):
        raise InputError("There are no queries.")
    trajectory.put(trajectory.final[0])
    adjoints = [
        (by_weights, torch.zeros_like(by_weights), torch.zeros_like(by_weights))
        for by_weights in _query_gradients(trajectory, queries, loss_fn, collate_fn, mean)
    ]
    scores = torch.zeros(len(adjoints), trajectory.n, dtype=adjoints[0][0].dtype)
    reached = trajectory.final
    for step in bar(trajectory.steps[::-1], desc="unrolling", unit="step"):
        weights = torch.ones(len(step.examples), dtype=reached[0].dtype, device=reached[0].device, requires_grad=True)
        gradient = trajectory.gradient(step, weights)
        _check(trajectory, step, gradient.detach(), reached)
        for j, adjoint in enumerate(adjoints):
            *by_state, by_gradient = _pulled_back(trajectory, step, gradient.detach(), adjoint)
            parameters = list(trajectory.parameters.values())
            *by_theta, by_weights = torch.autograd.grad(
                gradient, [*parameters, weights], by_gradient, retain_graph=True, materialize_grads=True
            )
            adjoints[j] = (by_state[0] + flat(by_theta), *by_state[1:])
            scores[j].index_add_(0, torch.tensor(step.examples), by_weights.to(scores))
        reached = step.state
        del gradient  # and the graph with it, before the next one is made
    trajectory.put(trajectory.final[0])
    trajectory.model.eval()
    return trajectory.n * scores


def _query_gradients(trajectory, queries, loss_fn, collate_fn, mean: bool) -> list[Float[Tensor, " D"]]:
    """Of every query's loss, or of the mean, by all that was trained, at its end."""
    parameters, device = list(trajectory.parameters.values()), trajectory.final[0].device
    found = []
    with evaluating(trajectory.model):
        for query in queries:
            loss = loss_fn(trajectory.model, send_to_device(collate_fn([query]), device)).sum()
            found.append(flat(torch.autograd.grad(loss, parameters, materialize_grads=True)))
    return [torch.stack(found).mean(dim=0)] if mean else found


def _pulled_back(trajectory: Trajectory, step: Step, gradient: Tensor, adjoint: Sequence[Tensor]) -> Sequence[Tensor]:
    """adjoint^T times the derivatives of AdamW's step by the state and by the gradient."""
    inputs = [each.detach().requires_grad_() for each in (*step.state, gradient)]
    after = trajectory.after(step, tuple(inputs[:3]), inputs[3])
    return torch.autograd.grad(after, inputs, list(adjoint), materialize_grads=True)


def _check(trajectory: Trajectory, step: Step, gradient: Tensor, reached: Sequence[Tensor]) -> None:
    """Refuse a step that does not lead where it led, such as one that drew other random numbers."""
    again, before = trajectory.after(step, step.state, gradient)[0], step.state[0]
    apart, length = (again - reached[0]).norm().item(), (reached[0] - before).norm().item()
    if not apart <= TOLERANCE * length:
        raise InputError(
            f"Step {step.number} of the fine-tuning leads elsewhere when it is taken again (by {apart / length:.0%} of "
            "its length): it is no AdamW, or draws random numbers that are not torch's."
        )
