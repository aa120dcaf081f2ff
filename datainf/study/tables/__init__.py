"""The study's tables: what the paper reports beside what was measured here."""

from datainf.study.tables.answers import beside_published, first_of_two
from datainf.study.tables.claims import claims_of, ours_beside_paper
from datainf.study.tables.damping import damping_paths, dampings, hessian_record
from datainf.study.tables.selection import data_selection, gains, group_agreement
from datainf.study.tables.summaries import (
    accuracy_gained,
    by_dataset_and_rank,
    class_detection,
    counterfactuals,
    distance_gained,
    fine_tuned,
    influential,
    lds_neighbours,
    lds_over,
    lds_over_seeds,
    leaderboard,
    leaderboard_in_short,
    to_markdown,
)

__all__ = [
    "accuracy_gained",
    "beside_published",
    "by_dataset_and_rank",
    "claims_of",
    "class_detection",
    "counterfactuals",
    "damping_paths",
    "dampings",
    "data_selection",
    "distance_gained",
    "fine_tuned",
    "first_of_two",
    "gains",
    "group_agreement",
    "hessian_record",
    "influential",
    "lds_neighbours",
    "lds_over",
    "lds_over_seeds",
    "leaderboard",
    "leaderboard_in_short",
    "ours_beside_paper",
    "to_markdown",
]
