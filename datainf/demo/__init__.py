"""What the demo scale needs, built in: two generated tasks and a small RoBERTa base."""

from pathlib import Path

from datainf.demo.tasks import TASKS, generate

BASE = Path(__file__).with_name("base")
"""Folder of the pre-trained base, in the hub's format."""

__all__ = ["BASE", "TASKS", "generate"]

BASES: dict[str, Path] = {"demo-roberta": BASE}
"""Built-in bases by the name that stands for a model in notebooks and configuration files."""
