"""The figures of notebooks 00 to 03, a function for each: it draws what its cell has measured, and computes no more."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from datainf.study.plotting.named_lines import GUIDE, Look, lines, look
from datainf.study.plotting.style import GROUP_COLOURS, METHOD_STYLE, grid_of, shown_once

BLUE, GREEN, RED, PINK = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
GRADIENTS = {
    "signs": (BLUE, "-", "o"),
    "sparse": ("#56B4E9", "-", "s"),
    "four directions": (GREEN, "-", "v"),
    "decaying": (PINK, "--", "D"),
    "one direction": (RED, "-", "^"),
}
"""The look of the kinds of made-up gradients in notebook 02."""
DAMPING = r"damping: $\lambda$ as a multiple of the mean eigenvalue"
EIGENVALUE = "number of the eigenvalue, largest first"
PARAMETERS = "d, parameters of the layer"


def _curves(curves: Mapping[str, tuple[Sequence | float, Sequence | float, Look]], **labels) -> Figure:
    """`lines` of curves, name -> (x, y, look); a single number holds for every point."""
    table = pd.concat(
        pd.DataFrame(dict(zip("xy", np.broadcast_arrays(x, y), strict=True))).assign(line=name)
        for name, (x, y, _) in curves.items()
    )
    return lines(table, "x", "y", line="line", looks={name: look for name, (_, _, look) in curves.items()}, **labels)


# Notebook 00


def tangents(x: np.ndarray, theta_star: float, slope: np.ndarray) -> Figure:
    """The mean as a function of the extra weight of each of its examples `x`, and its tangent at 0, `slope`."""
    weight = np.linspace(-1 / len(x), 0.4, 60)
    curves = {}
    for x_k, slope_k, colour in zip(x, slope, (BLUE, GREEN, RED), strict=True):
        curves[f"x = {x_k:g}"] = (weight, (theta_star + weight * x_k) / (1 + weight), (colour, "-", ""))
        curves[f"_tangent of {x_k}"] = (weight, theta_star + weight * slope_k, (colour, ":", ""))
    return _curves(
        curves,
        log="",
        title="The mean when one of the examples counts more\nsolid: the minimizer; dotted: its tangent",
        xlabel=r"extra weight $\varepsilon$ of the example (left end: removed)",
        ylabel=r"minimizer $\theta^{(k)}(\varepsilon)$",
    )


@shown_once
def against_truth(predicted: np.ndarray, truth: np.ndarray, flipped: np.ndarray) -> Figure:
    """The predicted change of the validation loss against the true one, a point for each example that is left out."""
    figure, axis = plt.subplots(figsize=(6.2, 5), layout="constrained")
    for (name, colour), marker, group in zip(GROUP_COLOURS.items(), "o^", (~flipped, flipped), strict=True):
        axis.scatter(
            predicted[group], truth[group], s=26, alpha=0.7, color=colour, marker=marker, linewidth=0, label=name
        )
    axis.axline((0, 0), slope=1, color="0.5", linewidth=1, linestyle=":")
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.annotate("predicted = true", (0.42, 0.5), xycoords="axes fraction", ha="right", fontsize=9, color="0.4")
    correlation = np.corrcoef(predicted, truth)[0, 1]
    axis.set(
        title=f"Leaving out each of n = {len(truth)} training examples\nPearson correlation {correlation:.4f}",
        xlabel=r"predicted change of the validation loss, $-\mathcal{I}(k)/n$",
        ylabel="true change, from fitting again",
    )
    axis.locator_params(nbins=6)
    axis.legend(frameon=False, loc="lower right")
    return figure


# Notebook 01


def drawn_labels(draws: np.ndarray, distances: np.ndarray, own_labels: float, exponent: float) -> Figure:
    """How far the second moment is from the Hessian, by the number of labels drawn from the model for each example,
    beside a slope of -1/2 and the distance with the data's own labels."""
    return _curves(
        {
            "labels from the model": (draws, distances, (BLUE, "-", "o")),
            "the data's own labels": (draws, own_labels, (RED, "--", "")),
            "slope -1/2": (draws, 0.6 * distances[0] * draws**-0.5, GUIDE),
        },
        title=f"Second moment against Hessian\n(means of several draws; measured slope {exponent:.2f})",
        xlabel="labels drawn for each example",
        ylabel="relative distance (Frobenius norm)",
    )


def traces(ratios: pd.DataFrame) -> Figure:
    """The trace of the second moment over that of the Hessian, by the share of flipped labels (index), for the model
    fitted to the noisy labels and the one fitted before the flips (columns)."""
    fitted_to, fitted_before = ratios
    return _curves(
        {
            fitted_to: (ratios.index, ratios[fitted_to], (BLUE, "-", "o")),
            fitted_before: (ratios.index, ratios[fitted_before], (RED, "-", "^")),
            "equal traces": (ratios.index, 1, GUIDE),
        },
        log="",
        title="The size of the second moment relative to the Hessian",
        xlabel="share of flipped labels",
        ylabel="trace(second moment) / trace(Hessian)",
    )


def few_examples(everyone: np.ndarray, few: np.ndarray, damped: np.ndarray) -> Figure:
    """The eigenvalues of the second moment of all examples, of a few, and of the few with damping; zeros are not
    drawn."""
    looks = {"all examples": (BLUE, "-", "o"), "a few": (RED, "-", "^"), "a few, damped": (PINK, "--", "s")}
    number = 1 + np.arange(len(everyone))
    return _curves(
        {
            name: (number, np.where(values > 1e-10, values, np.nan), looks[name])
            for name, values in zip(looks, (everyone, few, damped), strict=True)
        },
        log="y",
        title=f"Eigenvalues of the second moment, d = {len(number)}\n(zeros are not drawn)",
        xlabel=EIGENVALUE,
        ylabel="eigenvalue",
    )


def agreement_by_damping(agreement: pd.DataFrame, rule: float) -> Figure:
    """How the scores of each method agree with leaving one out (columns: method, damping, pearson, spearman); the
    `rule` is the study's damping."""
    titles = {"pearson": "By values (Pearson)", "spearman": "By ranks (Spearman)"}
    figure = lines(
        agreement.rename(columns=titles).melt(["method", "damping"], list(titles.values()), "panel"),
        *("damping", "value"),
        line="method",
        looks={method: look(method) for method in ("hessian_free", "exact", "datainf")},
        panel="panel",
        log="x",
        title="Agreement with leaving one out, by damping (dotted: the study's rule)",
        xlabel=DAMPING,
        ylabel="correlation with the truth",
        width=5.6,
    )
    for axis in figure.axes:
        axis.axvline(rule, color=GUIDE[0], linestyle=":", zorder=0)
    return figure


@shown_once
def blocks(moment: np.ndarray, sizes: Mapping[str, int], outside: float) -> Figure:
    """The second moment of the gradients scaled to a diagonal of 1, its blocks (layer -> parameters) outlined; the
    share `outside` of its squared norm, unscaled, is in none of them."""
    scale = np.sqrt(np.diag(moment))
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axis.imshow(np.abs(moment / np.outer(scale, scale)), cmap="Greys", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="absolute cosine of two parameters' gradients", shrink=0.85)
    start, middles = 0, []
    for size in sizes.values():
        edge = {"edgecolor": METHOD_STYLE["datainf"][1], "linewidth": 2, "fill": False}
        axis.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, **edge))
        middles.append(start + size / 2)
        start += size
    axis.set_xticks(middles, [f"{name}\n(d = {size})" for name, size in sizes.items()])
    axis.set_yticks(middles, list(sizes))
    axis.grid(False)
    axis.set(
        title=f"Second moment of the gradients, one block per layer\n"
        f"({outside:.0%} of its squared norm, unscaled, lies outside)"
    )
    return figure


def solver_errors(errors: pd.DataFrame) -> Figure:
    """The relative error (columns: step, error, line) of LiSSA for several largest eigenvalues, of scaled LiSSA and of
    conjugate gradients, by the step; what is above 1e4 or below 1e-9 is cut off."""
    oranges = {"0.5": "#D8A848", "1": "#E69F00", "1.9": "#A66F00", "2.1": "#5C3D00"}
    looks = {f"largest eigenvalue {name}": (colour, "-", "^") for name, colour in oranges.items()}
    looks |= {"lissa_scaled": look("lissa_scaled", marker=""), "conjugate gradients": (BLUE, "--", "")}
    return lines(
        errors[errors["error"].between(1e-9, 1e4)],
        *("step", "error"),
        line="line",
        looks=looks,
        title="LiSSA (triangles) by the largest eigenvalue of H,\nand conjugate gradients",
        xlabel="step",
        ylabel=r"relative error of $r_i$",
    )


# Notebook 02


@shown_once
def ellipses(gradients: np.ndarray, matrices: Sequence[np.ndarray], inverses: Sequence[np.ndarray]) -> Figure:
    """Positive definite matrices A as ellipses x^T A^-1 x = 1: S_1, S_2 and their average, with the two gradients as
    arrows, and the inverses of S_1 and S_2, Exact's and DataInf's."""
    looks = [(BLUE, ":", ""), (GREEN, "-.", ""), look("exact"), look("datainf", "--")]
    panels = {
        r"Two examples: $S_i = g_i g_i^\top + \lambda I$": (matrices, ["$S_1$", "$S_2$", "their average $H$"]),
        "Their inverses": (
            inverses,
            ["$S_1^{-1}$", "$S_2^{-1}$", "Exact: $H^{-1}$", "DataInf: average of $S_i^{-1}$"],
        ),
    }
    figure, axes = grid_of(list(panels), width=5.4, height=4.8, columns=2)
    angles = np.linspace(0, 2 * np.pi, 400)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for axis, (title, (drawn, names)) in zip(axes, panels.items(), strict=True):
        for matrix, name, (colour, line_style, _) in zip(drawn, names, looks[: len(names)], strict=True):
            x, y = np.linalg.cholesky(np.asarray(matrix)) @ circle
            axis.plot(x, y, color=colour, linestyle=line_style, linewidth=2, label=name)
        axis.set(title=title, xlabel="first parameter", ylabel="second parameter")
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    for x, y in gradients:
        axes[0].annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 1.5, "color": "0.3"})
    figure.suptitle(r"Matrices $A$ as ellipses $x^\top A^{-1}x = 1$; arrows: the two gradients", fontsize=12)
    return figure


def swap_errors(errors: pd.DataFrame) -> Figure:
    """The relative error of swapping inverse and average, by damping (index), in the cases (columns) that have one."""
    looks = {
        "independent gradients": (BLUE, "-", "o"),
        "orthogonal gradients": (GREEN, "-", "s"),
        "one direction, sizes differ": (RED, "-", "^"),
    }
    return _curves(
        {name: (errors.index, errors[name], look) for name, look in looks.items()},
        title="The error of swapping inverse and average\n(n = 1 and equal gradients: 0 at every damping)",
        xlabel=DAMPING,
        ylabel="relative error, spectral norm",
    )


def theorem1(measured: pd.DataFrame, slopes: Mapping[str, float], paper: Sequence, tighter: Sequence, n: int) -> Figure:
    """The norm that Theorem 1 bounds (columns: gradients, d, difference) by d, for each kind of gradients, with its
    slope; and for the last of them, the worst, the bound of the paper's proof and the one with lambda I canceled."""
    curves = {}
    for kind, rows in measured.groupby("gradients", sort=False):
        curves[f"{kind}, slope {slopes[kind]:.1f}"] = (rows["d"], rows["difference"], GRADIENTS[kind])
    curves["the paper's bound"] = (rows["d"], paper, ("0.3", "--", ""))
    curves[r"with $\lambda I$ canceled"] = (rows["d"], tighter, GUIDE)
    return _curves(
        curves,
        title=f"Theorem 1: spectral norm against d, small gradients, fixed $\\lambda$ (n = {n})\nslopes: up to d = n",
        xlabel=PARAMETERS,
        ylabel="spectral norm of the difference",
        width=7.6,
        height=5,
    )


def two_errors(measured: pd.DataFrame, n: int) -> Figure:
    """Two measures of DataInf's error by d, under the study's damping rule: the norm that Theorem 1 bounds over its
    cap, and the correlation of the scores with Exact's (columns: gradients, d, times_lambda, correlation)."""
    titles = {
        "times_lambda": r"What Theorem 1 bounds, times $\lambda$",
        "correlation": "Correlation of the scores with Exact",
    }
    return lines(
        measured.rename(columns=titles).melt(["gradients", "d"], list(titles.values()), "panel"),
        *("d", "value"),
        line="gradients",
        looks=GRADIENTS,
        panel="panel",
        log="x",
        ylim=(-0.02, 1.05),
        title=f"Two measures of DataInf's error under the study's damping rule, n = {n}",
        xlabel=PARAMETERS,
        ylabel=dict(zip(titles.values(), ("norm of the difference / cap", "Pearson correlation"), strict=True)),
        width=5.6,
    )


def what_is_left(eigenvalue: np.ndarray, kept: Mapping[str, np.ndarray]) -> Figure:
    """What Exact, DataInf for three d, and Hessian-free leave of a direction, by its eigenvalue."""
    exact, *datainf, hessian_free = kept
    looks = {exact: look("exact", marker=""), hessian_free: look("hessian_free", marker="")}
    looks |= {name: look("datainf", style, "") for name, style in zip(datainf, (":", "--", "-"), strict=True)}
    return _curves(
        {name: (eigenvalue, left, looks[name]) for name, left in kept.items()},
        log="x",
        ylim=(-0.02, 1.08),
        title="What a method leaves of a direction, by its eigenvalue\n(1: nothing lost; gradients of equal norm)",
        xlabel=r"eigenvalue $\mu$, in units of the mean eigenvalue",
        ylabel=r"what is left of it (times $\lambda$)",
        width=8.5,
    )


def spectra(of: Mapping[str, np.ndarray], above: Mapping[str, int], rule: float) -> Figure:
    """The eigenvalues of a LoRA layer's second moment beside those of made-up gradients of the same shape, in units of
    their mean and cut at 1e-4; the title says how many are `above` the damping `rule`."""
    lora, independent, decaying = of
    looks = {lora: look("datainf", marker=""), independent: (BLUE, "--", ""), decaying: (PINK, "-.", "")}
    number = 1 + np.arange(len(of[lora]))
    return _curves(
        {name: (number, np.where(values > 1e-4, values, np.nan), looks[name]) for name, values in of.items()}
        | {r"$\lambda$": (number[[0, -1]], rule, GUIDE)},
        title="Spectrum of one lora_A layer (cut at $10^{-4}$)\nabove $\\lambda$: "
        + ", ".join(f"{name} {above[name]}" for name in of),
        xlabel=EIGENVALUE,
        ylabel="size, in units of the mean eigenvalue",
    )


def agreement_by_d(layers: pd.DataFrame) -> Figure:
    """DataInf's correlation with Exact by d (columns: d, line, correlation): every layer of the LoRA adapters as a dot,
    their means as a line, and beside it the means for independent entries of the same shapes."""
    means = layers.groupby(["line", "d"], as_index=False)["correlation"].mean()
    dots = layers[layers["line"] == "LoRA gradients"].assign(line="_one layer")
    return lines(
        pd.concat([means, dots]),
        *("d", "correlation"),
        line="line",
        looks={
            "_one layer": ("#F0B48A", "", "."),
            "LoRA gradients": look("datainf"),
            "independent entries": (BLUE, "--", "s"),
        },
        log="x",
        ylim=(0, 1.05),
        title="DataInf against Exact, by d\n(dots: single layers; lines: means over layers; one seed)",
        xlabel=f"{PARAMETERS} (proportional to the LoRA rank)",
        ylabel="Pearson correlation with Exact",
    )


# Notebook 03


def passes(seconds: pd.DataFrame) -> Figure:
    """Seconds for the gradients of n examples (index) one at a time, with hooks, and of a plain forward and backward
    pass (columns); the title gives ratios at the largest n."""
    last = seconds.iloc[-1] / seconds["forward and backward"].iloc[-1]
    looks = {
        "one at a time": ("#777777", "-", "s"),
        "with hooks": (RED, "-", "o"),
        "forward and backward": ("#000000", "--", "D"),
    }
    return _curves(
        {name: (seconds.index, seconds[name], look) for name, look in looks.items()},
        title=f"Gradients of n = {seconds.index[-1]} examples: one at a time {last['one at a time']:.0f}, "
        f"with hooks {last['with hooks']:.1f} times a plain pass",
        xlabel="examples, n",
        ylabel="seconds",
        width=8,
    )
