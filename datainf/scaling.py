"""How a quantity grows: seconds of the clock, bytes of tensors, and the exponent of a power law.

`results.stage` measures what a whole run costs its process. Here the question is how one function's cost grows with
its input, which wants bytes that are exact down to a vector, and seconds without the noise of the first call.
"""

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch.profiler import ProfilerActivity, profile

# The profiler's library writes two lines to the terminal for every profile, below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def cost(function: Callable[[], object], repeats: int = 3, enough: float = 3.0) -> tuple[float, int]:
    """Seconds and bytes of one call.

    The seconds are the shortest of `repeats` calls, since whatever else the machine does can only add to them, after
    one that warms up and has its bytes counted; where that one takes `enough` seconds, or all of them together do, no
    further call is made.
    """
    first, peak = _watched(function)
    times = []
    while len(times) < repeats and first + sum(times) < enough:
        times.append(_seconds(function))
    return min(times or [first]), peak


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors held at a time during one call, beyond those held before it.

    Counted by torch's own allocators: on a GPU where there is one, else on the CPU, where no process-wide measure is
    fine enough. What libraries allocate for themselves, such as a matrix product's packing buffers, is not included.
    """
    return _watched(function)[1]


def _watched(function: Callable[[], object]) -> tuple[float, int]:
    """Seconds and peak bytes of one call, with the allocator watched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        seconds = _seconds(function)
        return seconds, torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        seconds = _seconds(function)
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where a tensor is freed
            peak = max(peak, held)
    return seconds, peak


def _seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    before = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - before


def power_law(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """The exponent and the factor of y = factor * x^exponent, by least squares on logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), deg=1)
    return float(exponent), float(np.exp(log_factor))
