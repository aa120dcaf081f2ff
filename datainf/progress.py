"""The one progress bar of the study."""

import os

from tqdm.auto import tqdm


def bar(*arguments, **options) -> tqdm:
    """A bar that appears after two seconds and leaves nothing behind; none at all where TQDM_DISABLE=1.

    tqdm itself heeds that variable everywhere but in notebooks, where committed outputs should hold no bars.
    """
    disable = os.environ.get("TQDM_DISABLE") == "1"
    return tqdm(*arguments, **{"delay": 2, "leave": False, "disable": disable, **options})
