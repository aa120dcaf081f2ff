"""An extraction killed outright at random moments, begun again each time, and at last let finish.

Arguments: a folder for the stores. Prints what was seen, as JSON. The model is made once and every attempt is a fork of
this process, since importing torch takes seconds.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny import collate, make_examples, make_model

import datainf
from datainf.models.losses import classification
from datainf.storage.shards import MANIFEST, Shards
from datainf.storage.store import GradientStore

KILLS, SHARDS, ROWS = 20, 48, 16


TELL: list[int] = []
"""The end of a pipe, in the process that extracts."""


def say(line: object) -> None:
    os.write(TELL[-1], f"{line}\n".encode())


def loss(model, batch):
    say(len(batch["labels"]))
    return classification(model, batch)


class Attempt:
    """A process that extracts. It says "began", then the number of examples of each batch: of each shard, and after the
    first two times one, which are compared with plain training."""

    def __init__(self, model, examples, folder: Path):
        self.folder = folder
        told, tell = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            TELL.append(tell)
            self._extract(model, examples)
        os.close(tell)
        self.told = open(told)

    def _extract(self, model, examples) -> None:
        options = {"collate_fn": collate, "batch_size": ROWS, "shard_examples": ROWS}
        try:
            say("began")
            datainf.per_sample_gradients(model, examples, loss, store=self.folder, **options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def kill(self) -> bool:
        """Whether it was still at work."""
        os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        return os.WIFSIGNALED(status)

    def finish(self) -> None:
        _, status = os.waitpid(self.process, 0)
        assert status == 0

    def is_writing(self) -> bool:
        """Whether it is writing a shard, or was when it was killed."""
        return any(self.folder.glob(f".shard-*.{self.process}.part"))

    def examples(self) -> int:
        """How many it differentiated, beyond those of the lines read already."""
        return sum(int(line) for line in self.told)


def fingerprint(folder: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def check_whole(folder: Path, indices: set[int]) -> None:
    for index in indices:
        Shards.open(folder).check(index, every_byte=True)


def main(folder: Path) -> dict:
    model, examples, rng = make_model(rank=256), make_examples(SHARDS * ROWS), random.Random(0)
    seen = {"kills": 0, "in_write": 0, "before_first_batch": 0, "after_each": []}

    whole = Attempt(model, examples, folder / "whole")
    began = time.monotonic()
    whole.told.readline(), whole.told.readline()
    start = time.monotonic() - began
    whole.finish()
    shard = (time.monotonic() - began - start) / SHARDS
    seen |= {"start_seconds": start, "shard_seconds": shard}

    store, differentiated, there = folder / "killed", 0, set()
    for number in range(KILLS):
        attempt = Attempt(model, examples, store)
        assert attempt.told.readline() == "began\n"
        kind, delay = number % 5, rng.random()
        if kind == 0:  # while it looks at what is there
            delay *= start
        else:
            differentiated += sum(int(attempt.told.readline()) for _ in (ROWS, 1, 1))
            if kind == 1:  # in a write, or shortly after one
                limit = time.monotonic() + 10 * shard
                while not attempt.is_writing() and time.monotonic() < limit:
                    time.sleep(1e-4)
                delay *= shard / 4
            else:  # at any moment, leaving some shards for the kills to come
                delay *= 2 * shard * (SHARDS - len(there)) / (KILLS - number + 5)
        time.sleep(delay)
        seen["kills"] += attempt.kill()
        batches = attempt.examples()
        differentiated += batches
        seen["before_first_batch"] += kind == 0 and batches == 0
        seen["in_write"] += attempt.is_writing()
        if (store / MANIFEST).exists():
            shards = Shards.open(store)
            now = set(range(SHARDS)) - set(shards.missing())
            assert there <= now
            check_whole(store, now - there)
            there = now
        seen["after_each"].append(len(there))
    last = Attempt(model, examples, store)
    last.finish()
    last.told.readline()
    differentiated += last.examples()
    GradientStore.load(store).verify()
    return seen | {
        "differentiated": differentiated,
        "shards": SHARDS,
        "shard_examples": ROWS,
        "files": sorted(path.name for path in store.iterdir()),
        "same_bytes": fingerprint(store) == fingerprint(folder / "whole"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]))))
