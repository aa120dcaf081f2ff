"""Work shared between processes: ``accelerate launch`` (or torchrun) starts them, torch.distributed joins them.

In a single process everything here does nothing.
"""

import os
from collections.abc import Mapping

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor


def rank_and_count() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are; joins the others at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not torch.distributed.is_initialized():
        return 0, 1
    state = PartialState()
    return state.process_index, state.num_processes


def wait() -> None:
    """Wait until all processes have come here."""
    if rank_and_count()[1] > 1:
        PartialState().wait_for_everyone()


def add_up(tensor: Tensor) -> Tensor:
    """The sum of the tensors that the processes hold, which are of one shape; the same in each."""
    if rank_and_count()[1] == 1:
        return tensor
    return reduce(tensor.to(PartialState().device), reduction="sum").to(tensor.device)


def collect(items: list) -> list:
    """The lists of all processes, one after another; the same in each."""
    return items if rank_and_count()[1] == 1 else gather_object(items)


def my_share(weights: Mapping[str, int]) -> list[str]:
    """The names that fall to this process: the largest first, each to whom the least has fallen so far."""
    rank, count = rank_and_count()
    totals, mine = [0] * count, []
    for name in sorted(weights, key=weights.get, reverse=True):
        receiver = totals.index(min(totals))
        totals[receiver] += weights[name]
        if receiver == rank:
            mine.append(name)
    return [name for name in weights if name in set(mine)]
