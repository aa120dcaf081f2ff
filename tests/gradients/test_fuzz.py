"""A minute of random models and batches, always the same ones unless DATAINF_FUZZ_SEED is given.

``python -m tests.gradients.fuzz`` takes as long, and from whatever seed, as is asked for.
"""

import os

from tests.gradients.fuzz import fuzz

SECONDS = 60


def test_random_models_are_right_or_refused():
    seed = int(os.environ.get("DATAINF_FUZZ_SEED", 0))
    print(f"DATAINF_FUZZ_SEED={seed}")
    counts = fuzz(SECONDS, seed)
    print(counts)
    assert counts["exact"] > 50 and counts["slow"] > 10 and counts["refused"] > 10
