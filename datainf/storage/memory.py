"""How much memory a computation may take, and how it is shared out between what it holds."""

from typing import NamedTuple

from accelerate.utils.modeling import convert_file_size_to_int
from tqdm import tqdm

from datainf.errors import InputError
from datainf.storage.rows import BLOCK_BYTES

Memory = int | str | None
"""The most bytes to hold: a number, a string such as "2GB" or "500MiB", or None for no bound."""


def bytes_of(memory: int | str) -> int:
    """The number of bytes that "2GB" stands for (2 * 10^9; "2GiB" is 2 * 2^30).

    Raises:
        InputError: it is no size, or not above zero.
    """
    try:
        size = convert_file_size_to_int(memory.upper() if isinstance(memory, str) else int(memory))
    except (TypeError, ValueError, OverflowError):
        size = 0
    if isinstance(memory, bool) or size <= 0:
        raise InputError(f'memory must be a number of bytes or a size such as "2GB", not {memory!r}.')
    return size


def in_words(size: float) -> str:
    """A number of bytes for people: 1.40GB."""
    return tqdm.format_sizeof(size, "B")


class Needs(NamedTuple):
    """Bytes that a method holds for one layer: whatever the blocks, for every query, and of the layer's gradients."""

    fixed: int
    per_query: int
    layer: int  # all of them at once
    smallest_block: int


class Blocks(NamedTuple):
    """How many bytes of the training gradients, and how many queries, are at hand at a time."""

    block_bytes: int
    queries: int


def share_out(memory: int | None, what: str, needs: Needs, *, kept: int, queries: int) -> Blocks:
    """Divide `memory` between the training gradients of a layer and at most `queries` queries.

    Up to half of what is left beyond the fixed needs and what is `kept` goes to the gradients, the rest to as many
    queries as fit, and what those leave to the gradients again.

    Raises:
        InputError: not even the smallest block and one query fit; names `what` and says how much it needs.
    """
    if memory is None:
        return Blocks(BLOCK_BYTES, queries)
    left = memory - kept - needs.fixed
    if left < needs.smallest_block + needs.per_query:
        least = kept + needs.fixed + needs.smallest_block + needs.per_query
        at_least = in_words(1.01 * least)  # what is said is rounded, and has to do
        raise InputError(f"memory={in_words(memory)} is too little: {what} needs at least {at_least}.")
    for_blocks = max(needs.smallest_block, min(needs.layer, left // 2))
    queries = max(1, min(queries, (left - for_blocks) // max(1, needs.per_query)))
    return Blocks(left - queries * needs.per_query, queries)
