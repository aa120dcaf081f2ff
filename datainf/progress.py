"""The one progress bar of the study, and what is said before long work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from datainf import processes

OFF = "TQDM_DISABLE"
LONG = 60  # seconds


def bar(*arguments, **options) -> tqdm:
    """A bar that appears after two seconds and leaves nothing behind; none at all where TQDM_DISABLE=1.

    tqdm itself heeds that variable everywhere but in notebooks, where committed outputs should hold no bars.
    """
    disable = os.environ.get(OFF) == "1" or processes.rank_and_count()[0] > 0
    return tqdm(*arguments, **{"delay": 2, "leave": False, "disable": disable, **options})


def say_if_long(what: str, done: float, seconds: float) -> None:
    """Say how long `what` will take if that is over a minute; a share `done` of it took `seconds`."""
    expected = seconds / done
    if expected > LONG and os.environ.get(OFF) != "1" and processes.rank_and_count()[0] == 0:
        tqdm.write(f"{what}: about {in_time(expected)}", file=sys.stderr)


def in_time(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def off() -> Iterator[None]:
    """No bars inside: making one in a notebook takes milliseconds, which is much beside a short computation."""
    before = os.environ.get(OFF)
    os.environ[OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFF]
        else:
            os.environ[OFF] = before
