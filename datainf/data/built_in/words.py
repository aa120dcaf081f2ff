"""Helpers shared by the grammars of the demo tasks."""

import random
from collections.abc import Sequence
from typing import TypeVar

Lexicon = tuple[str, ...]
Item = TypeVar("Item")


def pick(rng: random.Random, options: Sequence[Item]) -> Item:
    """One of the options.

    Uses up exactly one random number whatever the number of options (`random.choice` may use
    more), so that two sentences rendered from the same seed keep making the same choices even
    where their words have different numbers of synonyms.
    """
    return options[int(rng.random() * len(options))]


def pick_other(rng: random.Random, options: Sequence[Item], current: Item) -> Item:
    """One of the options that differs from the current one."""
    return pick(rng, [option for option in options if option != current])


def capitalise(text: str) -> str:
    """The text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]
