"""How a quantity grows: seconds of the clock, bytes of tensors, and the exponent of a power law.

`results.stage` measures what a whole run costs its process. Here the question is how one function's cost grows with
its input, which wants bytes that are exact down to a vector, and seconds without the noise of the first call.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch.profiler import ProfilerActivity, profile

from datainf import progress

# The profiler's library writes two lines to the terminal for every profile, below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def cost(
    function: Callable[[], object], repeats: int = 3, enough: float = 3.0, device: torch.device | str = "cpu"
) -> tuple[float, int]:
    """Seconds and peak bytes of one call whose tensors are on `device`; no progress bars are drawn in it.

    The seconds are the shortest of `repeats` calls, since whatever else the machine does can only add to them, after
    one that warms up and has its bytes counted. Where that one takes `enough` seconds, its own count; where all of
    them together do, no further call is made.
    """
    first, peak = _watched(function, device)
    times = []
    with progress.off():
        while len(times) < repeats and first + sum(times) < enough:
            times.append(_seconds(function, device))
    return min(times or [first]), peak


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors on `device` held at a time during one call, beyond those held before it.

    Counted by torch's own allocators, since on a CPU no process-wide measure is fine enough. What libraries allocate
    for themselves, such as a matrix product's packing buffers, is not included.
    """
    return _watched(function, device)[1]


def _watched(function: Callable[[], object], device: torch.device | str) -> tuple[float, int]:
    """Seconds and peak bytes of one call, with the allocator watched."""
    with watched_bytes(device) as peak:
        seconds = _seconds(function, device)
    return seconds, peak[0]


@contextmanager
def watched_bytes(device: torch.device | str = "cpu") -> Iterator[list[int]]:
    """Yield a list that has, after the block, the peak bytes of tensors on `device` that the block held: as
    `peak_bytes`, for work that is no single call."""
    found: list[int] = []
    with progress.off(), _no_collection():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            yield found
            torch.cuda.synchronize(device)
            found.append(torch.cuda.max_memory_allocated(device) - before)
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield found
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where a tensor is freed
            peak = max(peak, held)
    found.append(peak)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage inside: it would free tensors of before, whose sizes the profile lacks."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _seconds(function: Callable[[], object], device: torch.device | str) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    before = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def power_law(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """The exponent and the factor of y = factor * x^exponent, by least squares on logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), deg=1)
    return float(exponent), float(np.exp(log_factor))
