"""Work shared between processes: ``accelerate launch`` (or torchrun) starts them, torch.distributed joins them.

On CPUs torchrun does, since ``accelerate launch --cpu`` starts a single process whatever it is told. In a single
process everything here does nothing.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from torch import Tensor


def rank_and_count() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are; joins the others at the first call."""
    joined = torch.distributed.is_initialized()
    if not joined and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    # Without `cpu` accelerate takes each of several processes on CPUs for the only one. The timeout is for the end of
    # long work, which one process may reach hours before another.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if not joined:
        atexit.register(_leave)
    return state.process_index, state.num_processes


def _leave() -> None:
    """Leave the group, since a process that ends without leaving may be aborted. Not after an error: the others are at
    work and never leave, and leaving would wait for them."""
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


def wait() -> None:
    """Wait until all processes have come here."""
    if rank_and_count()[1] > 1:
        PartialState().wait_for_everyone()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block before the others."""
    if rank_and_count()[0] > 0:
        wait()
    yield
    if rank_and_count()[0] == 0:
        wait()


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
    return sorted(mine, key=list(weights).index)
