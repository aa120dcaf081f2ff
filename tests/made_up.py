"""Made-up records of a sweep, by which tables, figures and verdicts are tried."""

import pandas as pd

from datainf.study import plotting, results


def records(experiment: str) -> pd.DataFrame:
    """Made-up records: DataInf nearer to Exact than the others, falling with the rank."""
    rows = []
    for dataset in ("one", "two"):
        for rank in (1, 4):
            for seed in (0, 1, 2):
                for index, method in enumerate(["hessian_free", "lissa", "lissa_scaled", "datainf", "exact"]):
                    value = 0.5 + 0.1 * index - 0.02 * rank + 0.01 * seed
                    curve = {f"found_{share:02d}": share / 100 for share in range(0, 101, 5)}
                    rows.append(
                        {
                            **dict.fromkeys(results.RUN_COLUMNS, 0),
                            "experiment": experiment,
                            "dataset": dataset,
                            "rank": rank,
                            "seed": seed,
                            "method": method,
                            "accuracy": 0.8,
                            "majority": 0.5,
                            **dict.fromkeys(["pearson", "spearman", "auc"], value),
                            **{
                                f"{field}_{s}": 1.0
                                for field in ("seconds", "peak_mib")
                                for s in plotting.STAGES.values()
                            },
                            **curve,
                        }
                    )
    return pd.DataFrame(rows)


def identification() -> pd.DataFrame:
    """Made-up records of class detection: DataInf above Hessian-free in all tasks but one."""
    rows = [
        {
            "experiment": "text_identification",
            "dataset": task,
            "rank": 8,
            "seed": seed,
            "loss": loss,
            "method": method,
            "model": "base",
            "n_train": 900,
            "accuracy": 0.6,
            "accuracy_base": 0.1,
            **dict.fromkeys(["auc", "auc_signed", "recall", "recall_signed"], value - 0.3 * (task == "mine")),
            "prompt_preferred": 0.4,
            "prompt_preferred_signed": 0.9,
        }
        for task in ("sentence_transformations", "math_with_reasoning", "mine")
        for seed in (0, 1)
        for loss in ("completion", "as_published")
        for method, value in (("hessian_free", 0.6), ("datainf", 0.7 + seed / 10), ("exact", 0.5))
    ]
    frame = pd.DataFrame(rows)
    frame.loc[(frame["dataset"] == "mine") & (frame["method"] == "hessian_free"), "auc"] = 0.9
    return frame


def pictures() -> pd.DataFrame:
    """Made-up records of pictures: as those of text, of two tasks whose names are not the paper's."""
    kinds = {"sentence_transformations": ("styles", "style_generation"), "mine": ("dreambooth", "subject_generation")}
    frame = identification().replace({"loss": {"completion": "mean", "as_published": "concat"}})
    frame = frame[frame["dataset"].isin(kinds)].drop(columns=["accuracy", "accuracy_base"])
    named = pd.DataFrame(frame["dataset"].map(kinds).tolist(), index=frame.index, columns=["dataset", "kind"])
    distances = {"frechet_features": "autoencoder", "frechet_base": 4.0, "frechet": 3.0}
    return frame.assign(**named, experiment="image_identification", **distances)
