"""The model of notebooks 00 and 01 beside automatic differentiation, and data that are what they say."""

import torch
from torch import nn

from datainf.study import logistic


def test_gradients_curvature_and_fit_are_those_of_the_loss():
    tumors = logistic.tumors(100, 0.2, seed=1)
    weights = torch.rand(100, dtype=torch.float64)

    def total(theta, ridge=0.05):
        mean = nn.functional.binary_cross_entropy_with_logits(tumors.X @ theta, tumors.y, weight=weights)
        return mean + ridge / 2 * theta.square().sum()

    theta = logistic.fit(tumors.X, tumors.y, 0.05, weights)
    assert torch.func.grad(total)(theta).norm() < 1e-10
    hessian = logistic.curvature(tumors.X, theta, weights) + 0.05 * torch.eye(len(theta))
    assert torch.allclose(torch.func.hessian(total)(theta), hessian)
    penalty = 0.05 * theta
    assert torch.allclose(
        weights @ logistic.gradients(tumors.X, tumors.y, theta) / 100 + penalty, 0 * theta, atol=1e-10
    )


def test_flipped_labels_are_the_share_asked_for_and_the_rest_are_queries():
    tumors = logistic.tumors(100, 0.2, seed=1)
    assert tumors.X.shape == (100, 11) and tumors.X_query.shape == (469, 11)
    assert tumors.flipped.sum() == 20 and ((tumors.y != tumors.y_right).numpy() == tumors.flipped).all()
    assert (tumors.table["label"] == tumors.y.numpy()).all() and (tumors.table["flipped"] == tumors.flipped).all()
    assert not logistic.tumors(100, 0.2, seed=2).X.equal(tumors.X)


def test_influence_predicts_leaving_one_out_at_the_lessons_parameters():
    """What notebook 00 shows; its own assertion is one that holds for all parameters that it allows."""
    ridge, tumors = 0.01, logistic.tumors(300, 0.1, seed=0)
    theta = logistic.fit(tumors.X, tumors.y, ridge)
    H = logistic.curvature(tumors.X, theta) + ridge * torch.eye(11)
    v = logistic.gradients(tumors.X_query, tumors.y_query, theta).mean(dim=0)
    predicted = logistic.gradients(tumors.X, tumors.y, theta) @ torch.linalg.solve(H, v) / 300
    before, truth = logistic.loss(tumors.X_query, tumors.y_query, theta), torch.empty(300, dtype=torch.float64)
    for k in range(300):
        weights = torch.ones(300, dtype=torch.float64)
        weights[k] = 0
        left_out = logistic.fit(tumors.X, tumors.y, ridge, weights)
        truth[k] = logistic.loss(tumors.X_query, tumors.y_query, left_out) - before
    assert torch.corrcoef(torch.stack([predicted, truth]))[0, 1] > 0.99
    assert (predicted - truth).abs().max() < 0.3 * truth.abs().max()
