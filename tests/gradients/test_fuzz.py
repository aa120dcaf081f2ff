"""A minute of random models and batches; ``python -m tests.gradients.fuzz`` takes as long as is asked for."""

import os
import random

from tests.gradients.fuzz import fuzz

SECONDS = 60


def test_random_models_are_right_or_refused():
    seed = int(os.environ.get("DATAINF_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
    print(f"DATAINF_FUZZ_SEED={seed} repeats this")
    counts = fuzz(SECONDS, seed)
    print(counts)
    assert counts["exact"] > 50 and counts["slow"] > 10 and counts["refused"] > 10
