"""What a score has to beat: the loss, similarities of gradients, hidden states, words and pictures, cleanlab, chance.

All are given as scores (m, n) with the study's sign, so that they can stand beside the methods: the more alike a
training example is to the query the more helpful it is taken to be (< 0), and the more suspicious the more harmful.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import bm25s
import numpy as np
from cleanlab.rank import get_label_quality_scores
from jaxtyping import Float, Int
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

import datainf.attribution.influence as attribution
from datainf.evaluation import metrics
from datainf.models.forward import of_each
from datainf.models.lora import FineTuned, retrain
from datainf.models.training import Training
from datainf.progress import bar

Scores = Float[np.ndarray, "m n"]
Suspicion = Float[np.ndarray, " n"]


def random(m: int, n: int, seed: int = 0) -> Scores:
    """Chance."""
    return np.random.default_rng(seed).standard_normal((m, n))


def of_examples(suspicion: Suspicion, m: int) -> Scores:
    """Something said of the training examples alone, such as their loss, as scores for every query."""
    return np.tile(np.asarray(suspicion, dtype=float), (m, 1))


def self_influence(train: Mapping[str, Tensor], method: str = "datainf", damping: float = 0.1, **where) -> Suspicion:
    """How much an example's own loss falls by it: large where it is fitted by itself (Koh & Liang, 2017).

    Args:
        where: `device` and `memory`, as of `datainf.self_influence`.
    """
    return -attribution.self_influence(train, method, damping, **where).double().cpu().numpy()


def gradient_cosine(train: Mapping[str, Tensor], query: Mapping[str, Tensor], **where) -> Scores:
    """The cosine of the whole gradients, all layers together, negated; `where` as of `self_influence`."""
    return attribution.influence(train, query, "cosine", **where).double().cpu().numpy()


def mean_hidden_state(model: nn.Module, batch: Mapping) -> Float[Tensor, "batch width"]:
    """The mean of every example's last hidden states, over its tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
    mask = batch["attention_mask"][..., None].to(states)
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def hidden_state_similarity(
    model: nn.Module, train: Sequence, query: Sequence, collate: Callable[[list], Mapping]
) -> Scores:
    """The cosine of the mean last hidden states, negated."""
    return -cosine_similarity(*(of_each(model, each, mean_hidden_state, collate) for each in (query, train)))


def bm25(train: Sequence[str], query: Sequence[str]) -> Scores:
    """BM25 of every training text for the words of each query, negated."""
    options = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(train), **options), show_progress=False)
    words = bm25s.tokenize(list(query), return_ids=False, **options)
    return -np.stack([index.get_scores(each) if each else np.zeros(len(train)) for each in words]).astype(float)


def tfidf(train: Sequence[str], query: Sequence[str]) -> Scores:
    """The cosine of TF-IDF word counts, negated."""
    return -metrics.prompt_similarity(train, query)


def latents(train: Float[np.ndarray, "n ..."], query: Float[np.ndarray, "m ..."]) -> Scores:
    """The cosine of pictures' latents, negated."""
    return -metrics.picture_similarity(train, query)


def cleanlab(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n k"]) -> Suspicion:
    """How suspicious a label is by cleanlab's normalized margin: 1 less its quality score (Northcutt et al., 2021)."""
    return 1 - get_label_quality_scores(np.asarray(labels), probabilities, method="normalized_margin")


def probabilities(model: nn.Module, batch: Mapping) -> Float[Tensor, "batch k"]:
    """What a classifier gives each class of each example."""
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float().softmax(dim=1)


def out_of_sample(training: Training, folds: int = 5, seed: int = 0) -> Float[np.ndarray, "n k"]:
    """Every training example's probabilities by a model that was fine-tuned without its fold, as cleanlab asks for."""
    labels, found = np.array(training.examples["labels"]), None
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    for kept, held_out in bar(splits, total=folds, desc="cross-validation", unit="fold"):
        mask = np.zeros(len(labels), dtype=bool)
        mask[kept] = True
        model = retrain(training, mask)
        values = of_each(model, training.examples.select(held_out), probabilities, training.collate)
        found = np.zeros((len(labels), values.shape[1])) if found is None else found
        found[held_out] = values
    return found


def suspicions(
    tuned: FineTuned,
    train: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module, Mapping], Tensor],
    *,
    labelled: bool = False,
    folds: int = 0,
    damping: float = 0.1,
    batch_size: int = 32,
    **where,
) -> dict[str, Callable[[], Suspicion]]:
    """What says of the training examples alone how suspicious each is, by name, each to be called.

    Args:
        train: the examples' gradients.
        labelled: whether the model is a classifier whose labels may be wrong, which cleanlab looks at.
        folds: of cleanlab's cross-validation, each of which fine-tunes once; 0 leaves it out.
        damping, where: of `self_influence`.
        batch_size: of the forward passes.
    """
    of_train = partial(of_each, tuned.model, tuned.train, collate=tuned.collate, batch_size=batch_size)
    found: dict[str, Callable[[], Suspicion]] = {
        "training_loss": lambda: of_train(loss_fn),
        "self_influence": lambda: self_influence(train, damping=damping, **where),
    }
    if labelled:
        labels = np.array(tuned.train["labels"])
        found["cleanlab"] = lambda: cleanlab(labels, of_train(probabilities))
        if folds:
            found["cleanlab_cross_validated"] = lambda: cleanlab(labels, out_of_sample(tuned.training, folds))
    return found
