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
