"""One function per kind of figure; the same colour, marker and name for a method everywhere."""

from datainf.plotting.classification import (
    against_exact,
    by_rank,
    cost,
    detection_curves,
    fine_tuning_curve,
    score_distributions,
)
from datainf.plotting.identification import by_loss, by_method, class_heat_maps, completion_curve
from datainf.plotting.style import METHOD_STYLE, STAGES, confidence_interval, label, use_style

__all__ = [
    "METHOD_STYLE",
    "STAGES",
    "against_exact",
    "by_loss",
    "by_method",
    "by_rank",
    "class_heat_maps",
    "completion_curve",
    "confidence_interval",
    "cost",
    "detection_curves",
    "fine_tuning_curve",
    "label",
    "score_distributions",
    "use_style",
]
