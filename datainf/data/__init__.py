"""The study's datasets: each loader returns data by seed, from the hub, from a folder, or built in.

`glue`: sentences with a label, some flipped. `text`: prompts and responses of ten classes. `images`: captioned
pictures. `built_in`: what is generated here. `tables`: rows of text files.
"""

import hashlib

import pandas as pd
from datasets import Dataset


def revision_of(*splits: Dataset) -> str:
    """A hash of the splits' rows, which tells two versions of a dataset apart wherever they came from."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(pd.util.hash_pandas_object(split.to_pandas(), index=False).to_numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:12]}"
