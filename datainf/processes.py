"""Work shared between processes: ``accelerate launch`` (or torchrun) starts them, torch.distributed joins them.

On CPUs torchrun does, since ``accelerate launch --cpu`` starts a single process whatever it is told. In a single
process everything here does nothing. Processes wait `patience` seconds for each other to begin, and then as long as the
work takes.
"""

import atexit
import itertools
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env, reduce
from torch import Tensor
from torch.distributed import PrefixStore, Store

from datainf.errors import InputError

PATIENCE = "DATAINF_PATIENCE"
# For the end of long work, which one process may reach hours before another.
LONG = timedelta(days=7)
_meetings = itertools.count()


def rank_and_count() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are; joins the others at the first call.

    Raises:
        InputError: WORLD_SIZE says that there are others, but they do not come within `patience`.
    """
    joined = torch.distributed.is_initialized()
    if not joined and _promised() == 1:
        return 0, 1
    # Without `cpu` accelerate takes each of several processes on CPUs for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    first = not joined and not PartialState._shared_state
    state = PartialState(cpu=on_cpu, timeout=LONG, **_met() if first else {})
    if not joined:
        atexit.register(_leave)
    return state.process_index, state.num_processes


def patience() -> float:
    """Seconds to wait for other processes to begin what this one begins: what `PATIENCE` says, or 50."""
    said = os.environ.get(PATIENCE) or "50"
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= LONG.total_seconds():
        raise InputError(f"{PATIENCE} must be a number of seconds, not {said!r}.")
    return seconds


def _promised() -> int:
    """How many processes there are, as the one who started them says."""
    said = os.environ.get("WORLD_SIZE") or "1"
    if not (said.isdecimal() and int(said)):
        raise InputError(f"WORLD_SIZE must be a number of processes, not {said!r}: unset it to work alone.")
    return int(said)


def _met() -> dict[str, Store | int]:
    """What makes a group of all processes, once all are there: their store, the number of this one, and how many."""
    seconds, count = patience(), _promised()
    try:
        _find_store(seconds)
        store, rank, count = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        here = PrefixStore("datainf", store)
        here.set(str(rank), "here")
        here.wait([str(other) for other in range(count)], timedelta(seconds=seconds))
    except (KeyError, ValueError, OSError, RuntimeError) as error:  # not started as one of several, or no answer
        reason = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise InputError(
            f"WORLD_SIZE says that {count} processes work together, but they did not meet ({reason.rstrip('.')}): "
            f"start them all by torchrun or accelerate launch, unset WORLD_SIZE to work alone, or let {PATIENCE} be "
            f"more than {seconds:g} seconds if they come later."
        ) from error
    store.set_timeout(LONG)
    return {"store": PrefixStore("default_pg", store), "rank": rank, "world_size": count}


def _find_store(seconds: float) -> None:
    """Wait until the store answers, where this process does not open it: torch, which would wait too, takes several
    times as long as it is told."""
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    socket.getaddrinfo(address, port)
    opens = int(rank) == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    last = time.monotonic() + seconds
    while not opens:
        try:
            return socket.create_connection((address, int(port)), timeout=1).close()
        except OSError:
            if time.monotonic() > last:
                raise
            time.sleep(0.1)


def begin(what: str) -> None:
    """Wait until all processes begin `what`, as they do whatever they share.

    Raises:
        InputError: another process does not come within `patience`, or it begins something else.
    """
    rank, count = rank_and_count()
    if count == 1:
        return
    store = PrefixStore(f"datainf {next(_meetings)}", torch.distributed.distributed_c10d._get_default_store())
    store.set(str(rank), what)
    for other in range(count):
        try:
            store.wait([str(other)], timedelta(seconds=patience()))
            theirs = store.get(str(other)).decode()
        except RuntimeError as error:
            raise InputError(
                f"Process {rank} called {what}, but process {other} of {count} did not within {patience():g} seconds: "
                f"call it in all of them, or let {PATIENCE} be more if they come later."
            ) from error
        if theirs != what:
            raise InputError(f"Process {rank} called {what}, but process {other} called {theirs}: call each in all.")


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
