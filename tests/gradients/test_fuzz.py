"""Half a minute of random models and batches, always the same ones unless DATAINF_FUZZ_SEED is given.

``python -m tests.gradients.fuzz`` takes as long, and from whatever seed, as is asked for.
"""

import os

import pytest

from tests.gradients.fuzz import fuzz, outcome

SECONDS = 30
SIMPLE = {"mask": False, "adapter": None, "loss": "square", "share": 1.0}
# Cases that were wrong once.
FOUND = [
    # To an expert fall as many tokens as there are examples; a pair from the middle, of small gradients, is of one.
    SIMPLE
    | {"names": ["prompt", "experts", "masked"], "adapter": "lora", "size": [5] * 7, "batch_size": 7, "seed": 3100},
]


@pytest.mark.parametrize("case", FOUND)
def test_what_was_wrong_once(case):
    assert outcome(case) in ("exact", "slow", "refused")


def test_random_models_are_right_or_refused():
    seed = int(os.environ.get("DATAINF_FUZZ_SEED", 0))
    print(f"DATAINF_FUZZ_SEED={seed}")
    counts = fuzz(SECONDS, seed)
    print(counts)
    assert counts["exact"] > 50 and counts["slow"] > 10 and counts["refused"] > 10
