"""The model of notebooks 00 and 01: logistic regression on scikit-learn's breast-cancer data, some labels flipped.

With p_i = 1 / (1 + exp(-x_i . theta)) the loss of example i is -log p_i or -log(1 - p_i), by its label y_i in {0, 1}.
A fit minimizes 1/n sum_i w_i loss_i + ridge / 2 |theta|^2 over theta.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn


@dataclass(frozen=True)
class Tumors:
    """Is a tumor benign (1) or malignant (0)? Ten standardized features of its cell nuclei, and a constant: d = 11."""

    table: pd.DataFrame
    """The training examples as they were measured, with the label they were given and whether it was flipped."""
    X: Float[Tensor, "n d"]
    y: Float[Tensor, " n"]
    """The labels given, some of them flipped."""
    y_right: Float[Tensor, " n"]
    X_query: Float[Tensor, "m d"]
    y_query: Float[Tensor, " m"]
    """The queries' labels, which are right."""
    flipped: np.ndarray


def tumors(n_train: int, noise: float, seed: int) -> Tumors:
    """`n_train` training examples, a share `noise` of their labels flipped; the rest of the 569 are queries."""
    data = load_breast_cancer(as_frame=True)
    features = list(data.data.columns[:10])
    train, queries = train_test_split(data.frame, train_size=n_train, random_state=seed, stratify=data.target)
    scaler = StandardScaler().fit(train[features])
    flipped = np.zeros(n_train, dtype=bool)
    flipped[np.random.default_rng(seed).choice(n_train, round(noise * n_train), replace=False)] = True

    def design(rows: pd.DataFrame) -> Tensor:
        return torch.tensor(np.column_stack([scaler.transform(rows[features]), np.ones(len(rows))]))

    y_right, y_query = (torch.tensor(rows["target"].to_numpy(float)) for rows in (train, queries))
    y = torch.where(torch.tensor(flipped), 1 - y_right, y_right)
    table = train[features].assign(label=y.int().numpy(), flipped=flipped)
    return Tumors(table, design(train), y, y_right, design(queries), y_query, flipped)


def probability(X: Float[Tensor, "n d"], theta: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
    """p(1 | x) of every row of X."""
    return torch.sigmoid(X @ theta)


def loss(X: Float[Tensor, "n d"], y: Float[Tensor, " n"], theta: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    """The mean loss, without the penalty."""
    return nn.functional.binary_cross_entropy_with_logits(X @ theta, y)


def gradients(X: Float[Tensor, "n d"], y: Float[Tensor, " n"], theta: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Each example's gradient, (p_i - y_i) x_i, in a row."""
    return (probability(X, theta) - y)[:, None] * X


def curvature(
    X: Float[Tensor, "n d"], theta: Float[Tensor, " d"], weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "d d"]:
    """The Hessian of the losses alone, 1/n sum_i w_i p_i (1 - p_i) x_i x_i^T: the penalty adds ridge I to it."""
    p = probability(X, theta)
    return (p * (1 - p) * (1 if weights is None else weights) * X.T) @ X / len(X)


def fit(
    X: Float[Tensor, "n d"], y: Float[Tensor, " n"], ridge: float, weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " d"]:
    """The minimizer, by Newton's method, to a gradient of 1e-12. Without `weights` every example counts 1."""
    weights = torch.ones_like(y) if weights is None else weights
    theta = X.new_zeros(X.shape[1])
    for _ in range(100):
        gradient = weights @ gradients(X, y, theta) / len(X) + ridge * theta
        if gradient.norm() < 1e-12:
            return theta
        H = curvature(X, theta, weights) + ridge * torch.eye(len(theta), dtype=X.dtype)
        theta = theta - torch.linalg.solve(H, gradient)
    raise ArithmeticError("Newton's method did not converge: raise `ridge`.")
