"""The one progress bar of the study."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

OFF = "TQDM_DISABLE"


def bar(*arguments, **options) -> tqdm:
    """A bar that appears after two seconds and leaves nothing behind; none at all where TQDM_DISABLE=1.

    tqdm itself heeds that variable everywhere but in notebooks, where committed outputs should hold no bars.
    """
    disable = os.environ.get(OFF) == "1"
    return tqdm(*arguments, **{"delay": 2, "leave": False, "disable": disable, **options})


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
