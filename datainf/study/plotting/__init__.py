"""One function per kind of figure; the same colour, marker and name for a method everywhere."""

from datainf.study.plotting.benchmarks import side_by_side
from datainf.study.plotting.classification import (
    against_exact,
    by_rank,
    cost,
    detection_curves,
    detection_ranks,
    fine_tuning_curve,
)
from datainf.study.plotting.hessian import along_weights, by_damping
from datainf.study.plotting.identification import (
    KINDS,
    NORMAL,
    by_loss,
    by_method,
    class_detection,
    class_heat_maps,
    loss_curve,
)
from datainf.study.plotting.pictures import influential_pictures, picture_grid, places_of_influence, stability
from datainf.study.plotting.retraining import by_task, calibration, ensembles, leaderboard
from datainf.study.plotting.selection import SELECTIONS, against_loss, by_share, group_changes
from datainf.study.plotting.style import BASELINES, METHOD_STYLE, STAGES, label, use_style
from datainf.study.plotting.teaching import GUIDE, against_truth, blocks, ellipses, lines, look

__all__ = [
    "look",
    "lines",
    "ellipses",
    "blocks",
    "against_truth",
    "BASELINES",
    "GUIDE",
    "KINDS",
    "METHOD_STYLE",
    "NORMAL",
    "SELECTIONS",
    "STAGES",
    "against_exact",
    "against_loss",
    "along_weights",
    "by_damping",
    "by_loss",
    "by_method",
    "by_rank",
    "by_share",
    "by_task",
    "calibration",
    "class_detection",
    "class_heat_maps",
    "cost",
    "detection_curves",
    "detection_ranks",
    "ensembles",
    "fine_tuning_curve",
    "group_changes",
    "influential_pictures",
    "label",
    "leaderboard",
    "loss_curve",
    "picture_grid",
    "places_of_influence",
    "side_by_side",
    "stability",
    "use_style",
]
