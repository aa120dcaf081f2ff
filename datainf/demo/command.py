"""The command line of the scripts that pre-train the built-in bases."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path


def pretrain(train: Callable[[Path, int, int], None], what: str, *, steps: int, output: Path) -> None:
    """Call ``train(output, steps, seed)`` as the command line says; `what` describes it."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--steps", type=int, default=steps, help="optimisation steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=output, help="folder to write (default: the package's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of corpus and weights (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(args.output, args.steps, args.seed)
