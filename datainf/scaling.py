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


def seconds(function: Callable[[], object], repeats: int = 3, enough: float = 1.0) -> float:
    """The shortest wall-clock time of at most `repeats` calls, the device's work included, after one to warm up.

    The shortest, because whatever else the machine does can only add to it. No further call is made once one took
    `enough` seconds, the first included, or all of them together did.
    """
    times = []
    while not times or (len(times) <= repeats and sum(times) < enough):
        before = time.perf_counter()
        function()
        _finish()
        times.append(time.perf_counter() - before)
    return min(times[1:] or times)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors held at a time during one call, beyond those held before it.

    Counted by torch's own allocators: on a GPU where there is one, else on the CPU, where no process-wide measure is
    fine enough. What libraries allocate for themselves, such as a matrix product's packing buffers, is not included.
    """
    if torch.cuda.is_available():
        _finish()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where a tensor is freed
            peak = max(peak, held)
    return peak


def power_law(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """The exponent and the factor of y = factor * x^exponent, by least squares on logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), deg=1)
    return float(exponent), float(np.exp(log_factor))


def _finish() -> None:
    """Wait for the work that was queued on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
