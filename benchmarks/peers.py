"""Influence scores of a LoRA classifier by other libraries, in our sign and order: kronfluence, dattri, bergson and
dattri-llm.

All get the model, the examples and the loss (`datainf.losses.classification`) that ours get, and exactly the layers of
`datainf.layers.trainable_layers`: weights without biases. Each takes like lengths together, the longest first, as
`datainf.per_sample_gradients` does, and its scores are put back in order. It works on a copy of the model; making that
is no part of its stages, collating is. But for rounding:

    influence(train_gradients, query_gradients, "hessian_free")  =  kronfluence "identity"  =  dattri "grad_dot"
                                                                 =  bergson  =  dattri-llm "tracin"
    influence(train_gradients, query_gradients, method)          =  dattri "datainf"
    influence(..., "ekfac", factors=...)                         =  kronfluence "ekfac"  =  dattri-llm "ekfac"

where ``method`` is `datainf.methods.datainf` with dattri's one damping constant in place of every layer's lam. (Of
dattri-llm's "ekfac" the rounding is to be seen: its eigendecompositions are in float32.)

Nothing else in the project imports them. They are installed without what they ask for and do not need here
(``benchmarks/README.md``).
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from math import ceil
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import Stages
from datainf.gradients.layers import trainable_layers
from datainf.models.losses import classification

Collate = Callable[[Sequence[dict]], Mapping[str, Tensor]]

STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")
ATTRIBUTORS = ("grad_dot", "datainf", "cg")


def longest_first(examples: Sequence[dict]) -> tuple[list[dict], Tensor]:
    """The examples by falling length, and the place of each in `examples`."""
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    return [examples[index] for index in order], torch.tensor(order)


def in_order(scores: Float[Tensor, "m n"], query_order: Tensor, train_order: Tensor) -> Float[Tensor, "m n"]:
    """Undo `longest_first` in the rows and in the columns."""
    restored = torch.empty_like(scores, device="cpu")
    restored[query_order[:, None], train_order] = scores.cpu()
    return restored


def copy_for_peers(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which the weights of `trainable_layers`, and no bias, require a gradient."""
    model = copy.deepcopy(model).eval()
    weights = set(trainable_layers(model).values())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in weights)
    return model


def missing(library: str) -> SystemExit:
    """What to do where a library is not installed."""
    return SystemExit(f"{library} is not installed: benchmarks/README.md says how.")


# --- kronfluence ----------------------------------------------------------------------------------------------------


class BiasApart(nn.Module):
    """x W^T + b in two steps: a library that tracks the Linear module takes the gradient of W alone."""

    def __init__(self, module: nn.Linear):
        super().__init__()
        self.bias, module.bias = module.bias, None
        self.linear = module

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.bias


def set_biases_apart(model: nn.Module, kind: type[BiasApart] = BiasApart) -> list[str]:
    """Put a `BiasApart` in the place of every layer with a bias; the names of the modules that hold the weights."""
    names = []
    for layer in trainable_layers(model):
        name = layer.removesuffix(".weight")
        module = model.get_submodule(name)
        if module.bias is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(module))
            name += ".linear"
        names.append(name)
    return names


def classification_task(names: Sequence[str]):
    """kronfluence's description of our loss: summed over the batch, so that a row's gradient is its own example's."""
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Mapping[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return classification(model, batch).sum()
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            drawn = torch.multinomial(logits.detach().softmax(dim=1), 1).squeeze(1)
            return nn.functional.cross_entropy(logits, drawn, reduction="sum")

        def compute_measurement(self, batch: Mapping[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

        def get_attention_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
            return batch["attention_mask"]

    return Classification()


def kronfluence_scores(
    model: nn.Module,
    train: Sequence[dict],
    queries: Sequence[dict],
    collate: Collate,
    strategy: str,
    stages: Stages,
    folder: str | Path,
    batch_size: int = 32,
    *,
    empirical: bool = True,
    damping: float | None = None,
) -> Float[Tensor, "m n"]:
    """kronfluence's pairwise scores, minus signed: > 0 is harmful.

    Args:
        strategy: "identity" (H is the identity), "diagonal" (the diagonal of the gradients' second moment), "kfac" or
            "ekfac", its own default.
        folder: where it writes factors and scores; what is there is overwritten.
        empirical: H of the labels that the examples have, as ours. False is the library's own default: labels drawn
            from the model.
        damping: added to H's eigenvalues; None is 0.1 times their mean in the layer, the paper's rule.

    Returns:
        Scores (m, n), in two stages:
            "factors": what H takes, nothing for "identity"; one pass over the training examples for "diagonal" and
                "kfac", two and the eigendecompositions between them for "ekfac"; written to the folder and read again.
            "scores": gradients of the queries, all held in memory and multiplied by H^-1; then one pass over the
                training examples that computes their gradients (again) and the inner products, and keeps neither.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError as error:
        raise missing("kronfluence") from error

    train, train_order = longest_first(train)
    queries, query_order = longest_first(queries)
    model = copy_for_peers(model)
    task = classification_task(set_biases_apart(model))
    analyzer = Analyzer(
        analysis_name=strategy,
        model=prepare_model(model, task),
        task=task,
        cpu=next(model.parameters()).device.type == "cpu",
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=str(folder),
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    factor_args = FactorArguments(strategy=strategy, use_empirical_fisher=empirical)
    # All queries before the one pass over the training examples, in batches of as many as these.
    score_args = ScoreArguments(
        damping_factor=damping, query_gradient_accumulation_steps=ceil(len(queries) / batch_size)
    )

    with stages("factors"):
        analyzer.fit_all_factors(
            factors_name=strategy,
            dataset=train,
            per_device_batch_size=batch_size,
            factor_args=factor_args,
            overwrite_output_dir=True,
        )
    with stages("scores"):
        analyzer.compute_pairwise_scores(
            scores_name=strategy,
            factors_name=strategy,
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=min(batch_size, len(queries)),
            per_device_train_batch_size=batch_size,
            score_args=score_args,
            overwrite_output_dir=True,
        )
        scores = analyzer.load_pairwise_scores(strategy)["all_modules"]
    return -in_order(scores, query_order, train_order)


# --- dattri ---------------------------------------------------------------------------------------------------------


def loss_of_parameters(model: nn.Module, names: Sequence[str]) -> Callable[[dict[str, Tensor], tuple], Tensor]:
    """Our loss as a function of the parameters that dattri differentiates and of the tensors called `names`.

    The mean over the batch, which has one example where dattri takes per-sample gradients by `torch.func.vmap`.
    """

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        batch = dict(zip(names, data, strict=True))
        # The mask that transformers would make of this one, but for a look at its values, which vmap forbids.
        padding = (batch["attention_mask"] == 0)[:, None, None, :]
        zeros = torch.zeros(padding.shape, device=padding.device)
        batch["attention_mask"] = zeros.masked_fill(padding, torch.finfo(zeros.dtype).min)

        labels = batch.pop("labels")
        logits = torch.func.functional_call(model, parameters, args=(), kwargs=batch).logits
        return nn.functional.cross_entropy(logits, labels)  # `classification`, but for a look at the labels

    return loss


def make_attributor(task, attributor: str, regularization: float, device: torch.device):
    """The attributor of dattri that a name in `ATTRIBUTORS` stands for."""
    from dattri.algorithm import IFAttributorCG, IFAttributorDataInf
    from dattri.algorithm.base import BaseInnerProductAttributor

    if attributor == "grad_dot":
        return BaseInnerProductAttributor(task, device=device)
    makers = {"datainf": IFAttributorDataInf, "cg": IFAttributorCG}
    return makers[attributor](task, device=device, regularization=regularization)


def dattri_scores(
    model: nn.Module,
    train: Sequence[dict],
    queries: Sequence[dict],
    collate: Collate,
    attributor: str,
    stages: Stages,
    batch_size: int = 32,
    *,
    query_batch_size: int = 8,
    regularization: float = 0.1,
    in_stages: bool = True,
) -> Float[Tensor, "m n"]:
    """dattri's scores, minus signed: > 0 is harmful.

    Args:
        attributor: "grad_dot" (H is the identity; TracIn of one checkpoint, without its random projection), "datainf",
            or "cg", ten steps of conjugate gradients on the true Hessian of the mean loss over all layers together,
            which is another H than ours and need not be positive definite. "cg" takes the training examples as one
            batch, because dattri adds up the inverses of its batches.
        query_batch_size: for "datainf" dattri holds query_batch_size^2 x d_l numbers several times over.
        regularization: added to the diagonal of H, the same in every layer.
        in_stages: call the attributor's parts, each once. Otherwise call its ``attribute``, the library's usual way,
            which computes the gradients and the ihvp of all queries anew for every batch of training examples.

    Returns:
        Scores (m, n), in stages, of which those `in_stages` are ours, too:
            "gradients": per-sample gradients of the training examples and of the queries, kept in memory.
            "ihvp": the queries' inverse-Hessian-vector products.
            "scores": the inner products.
        Else:
            "cache": per-sample gradients of the training examples for "datainf", nothing for the others.
            "scores": those gradients (again), the queries' gradients and ihvp as often as there are training batches,
                and the inner products.
    """
    try:
        from dattri.task import AttributionTask
    except ImportError as error:
        raise missing("dattri") from error

    train, train_order = longest_first(train)
    queries, query_order = longest_first(queries)
    model = copy_for_peers(model)
    model.set_attn_implementation("eager")  # torch's own kernels have no rule for vmap and no second derivative
    device = next(model.parameters()).device
    names = list(collate(train[:1]))

    def batches(examples: Sequence[dict], size: int) -> DataLoader:
        return DataLoader(examples, size, collate_fn=lambda items: tuple(collate(items)[name] for name in names))

    task = AttributionTask(loss_of_parameters(model, names), model, model.state_dict())
    method = make_attributor(task, attributor, regularization, device)
    all_of_h = batches(train, len(train) if attributor == "cg" else batch_size)
    loaders = batches(train, batch_size), batches(queries, query_batch_size)

    # Without no_grad dattri's gradients carry a graph, because the parameters that it starts from do.
    with torch.no_grad():
        if in_stages:
            scores = _in_stages(method, all_of_h, *loaders, device, stages)
        else:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # its progress bars cannot be turned off
                with stages("cache"):
                    method.cache(all_of_h)
                with stages("scores"):
                    scores = method.attribute(*loaders).T
    return -in_order(scores, query_order, train_order)


def _in_stages(
    method, all_of_h: DataLoader, train: DataLoader, queries: DataLoader, device: torch.device, stages: Stages
) -> Float[Tensor, "m n"]:
    """What ``method.cache`` and ``method.attribute`` compute, no gradient and no ihvp twice."""

    def inputs(loader: DataLoader) -> Iterator[tuple[Tensor, ...]]:
        return (tuple(tensor.to(device).unsqueeze(0) for tensor in batch) for batch in loader)

    with stages("gradients"):
        G = [method.generate_train_rep(0, data) for data in inputs(train)]
        V = [method.generate_test_rep(0, data) for data in inputs(queries)]
        kept = iter(G)
        method.generate_train_rep = lambda ckpt_idx, data: next(kept)  # cache() asks for them batch by batch
        method.cache(all_of_h)
    with stages("ihvp"):
        R = torch.cat([method.transform_test_rep(0, v) for v in V])
    with stages("scores"):
        scores = torch.cat([R @ g.T for g in G], dim=1)
    return scores


# --- bergson --------------------------------------------------------------------------------------------------------


class OneToken(BiasApart):
    """`BiasApart`, whose Linear sees (batch, 1, width) for an input (batch, width): bergson takes tokens only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])[:, 0] if x.dim() == 2 else super().forward(x)


def bergson_scores(
    model: nn.Module,
    train: Sequence[dict],
    queries: Sequence[dict],
    collate: Collate,
    stages: Stages,
    folder: str | Path,
    batch_size: int = 32,
    *,
    index: bool = False,
) -> Float[Tensor, "m n"]:
    """bergson's scores without projection, normalization and Hessian, minus signed: > 0 is harmful.

    Its commands know one loss, that of a causal language model, and do not find the modules of a trained head. So its
    collectors are told the modules, and run around our loss, batch by batch as its ``CollectorComputer`` runs them.

    Args:
        folder: where it writes the index; what is there is overwritten.
        index: keep the training examples' gradients in an index on disk and search that, as ``bergson build`` and its
            ``Attributor`` do. Otherwise keep those of the queries alone, as ``bergson score`` does.

    Returns:
        Scores (m, n), in one stage without an index and in two with it:
            "gradients": of the queries, kept in memory; of the training examples, written to disk.
            "scores": the index read, and the inner products. Without one: gradients of the queries; one pass over the
                training examples that computes their gradients and the inner products.
    """
    try:
        from bergson import Attributor, GradientCollector, IndexConfig, InMemoryCollector, Scorer
        from bergson.score.score_writer import InMemorySequenceScoreWriter
        from datasets import Dataset
    except ImportError as error:
        raise missing("bergson") from error

    train, train_order = longest_first(train)
    queries, query_order = longest_first(queries)
    model = copy_for_peers(model)
    device = next(model.parameters()).device
    modules = set(set_biases_apart(model, OneToken))
    config = IndexConfig(run_path=str(Path(folder) / "index"), drop_columns=False)

    def collected(kind: type, examples: Sequence[dict], **options):
        """A collector, after all batches. Of its dataset it uses the length, and saves it with the losses."""
        dataset = Dataset.from_dict({"length": [len(example["input_ids"]) for example in examples]})
        collector = kind(model=model, data=dataset, cfg=config, target_modules=modules, **options)
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            with collector.with_batch():
                losses = classification(model, send_to_device(collate(part), device))
                losses.sum().backward()
            model.zero_grad()
            collector.process_batch(list(range(start, start + len(part))), losses=losses)
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # a bar where the dataset is saved
            collector.teardown()
        return collector

    if index:
        with stages("gradients"):
            V = collected(InMemoryCollector, queries).gradients
            collected(GradientCollector, train)
        with stages("scores"):
            found = Attributor(config.partial_run_path, device=str(device)).search(V, k=None)
            # All examples, but each query's in the order of its scores.
            scores = torch.empty_like(found.values).scatter(1, found.indices, found.values)
    else:
        with stages("scores"):
            V = collected(InMemoryCollector, queries).gradients
            writer = InMemorySequenceScoreWriter(len(train), len(queries))
            scorer = Scorer(V, list(V), writer, device, torch.float32)
            scores = collected(InMemoryCollector, train, scorer=scorer).scores.T
    return -in_order(scores, query_order, train_order)


# --- dattri-llm -----------------------------------------------------------------------------------------------------


def dattri_llm_scores(
    model: nn.Module,
    train: Sequence[dict],
    queries: Sequence[dict],
    collate: Collate,
    attributor: str,
    stages: Stages,
    folder: str | Path,
    batch_size: int = 32,
    *,
    damping: float = 0.1,
) -> Float[Tensor, "m n"]:
    """dattri-llm's scores, minus signed: > 0 is harmful. It tells queries apart by their tokens, which must differ.

    It also sets the seed of torch, numpy and random to 42.

    Args:
        attributor: "tracin" (H is the identity) or "ekfac", of the labels that the examples have, as ours.
        folder: where it writes factors and scores; what is there is overwritten.
        damping: of "ekfac", as a multiple of the mean of a layer's eigenvalues. The paper's 0.1 is not its default.

    Returns:
        Scores (m, n), in stages:
            "gradients": kept in memory as what goes into each layer and what comes back to it, token by token.
            "factors": of "ekfac" alone: the two sides' second moments, their eigenvectors in float32, and the
                gradients' second moments in that basis; written to the folder and read again.
            "scores": the gradients of the queries, multiplied by H^-1 for "ekfac", and the inner products.
    """
    try:
        from dattri_llm import (
            AttributionArguments,
            EKFACAttributor,
            GradientStorageManager,
            GradientStreamer,
            HookManagerConfig,
            TracInAttributor,
        )
    except ImportError as error:
        raise missing("dattri-llm") from error

    train, train_order = longest_first(train)
    queries, query_order = longest_first(queries)
    model = copy_for_peers(model)
    device = next(model.parameters()).device.type
    arguments = AttributionArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
    )
    method = {"tracin": TracInAttributor, "ekfac": EKFACAttributor}[attributor](arguments)
    modules = [layer.removesuffix(".weight") for layer in trainable_layers(model)]
    streaming = {
        "batch_size": batch_size,
        "collate_fn": collate,
        # Summed over the batch, so that a row's gradient is its own example's.
        "loss_fn": lambda model, batch: classification(model, batch).sum(),
        # It would take a bias for trained, though it is frozen.
        "config": HookManagerConfig(
            dict.fromkeys(modules, "linear_io"), module_kwargs={name: {"has_bias": False} for name in modules}
        ),
    }

    def gradients(examples: Sequence[dict], name: str) -> GradientStorageManager:
        store = GradientStorageManager(str(Path(folder) / name), residency="memory")
        return method.collect_gradients(GradientStreamer(model, examples, arguments, **streaming), store)

    options = {}
    with stages("gradients"):
        G, V = gradients(train, "train"), gradients(queries, "queries")
    if attributor == "ekfac":
        with stages("factors"):
            options = {"fisher_dir": method.fit(G), "damping": damping, "relative_damping": True}
    with stages("scores"):
        scores = method.attribute_from_cache(G, V, **options).scores.T
    return -in_order(scores, query_order, train_order)
