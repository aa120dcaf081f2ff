"""A bank of retrainings that is killed outright at random moments, begun again each time, and at last let finish.

Argument: a folder. Prints what was seen, as JSON. Every attempt is a fork, since importing torch takes seconds.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from datainf.evaluation import retraining

KILLS = 10
PLAN = retraining.subsets(50, 0.5, 200)


def outcome_of(one: retraining.Retraining):
    time.sleep(0.01)
    rng = np.random.default_rng(one.number)
    return one.kept[:5] + rng.random(5).astype("float32"), one.kept[:5]


def make(folder: Path) -> None:
    retraining.bank(PLAN, outcome_of, {"task": "none"}, folder / "parts").save(folder / "bank.parquet")


def begin(folder: Path) -> int:
    """A child that makes the bank in this folder."""
    if child := os.fork():
        return child
    try:
        make(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    folder = Path(sys.argv[1])
    whole, killed = folder / "whole", folder / "killed"
    # In a fork too: writing Parquet starts threads here, which would leave later forks with locks that nobody opens.
    assert os.waitpid(begin(whole), 0)[1] == 0
    after_each = []
    for _ in range(KILLS):
        child = begin(killed)
        time.sleep(random.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended before it was killed"
        after_each.append(len(list((killed / "parts").glob("[!.]*.parquet"))))
    _, status = os.waitpid(begin(killed), 0)
    assert status == 0
    files = [(each / "bank.parquet").read_bytes() for each in (whole, killed)]
    seen = {"kills": KILLS, "plan": len(PLAN), "after_each": after_each, "same_bytes": files[0] == files[1]}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
