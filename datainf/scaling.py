"""How a quantity grows: seconds of the clock, bytes of tensors, and the exponent of a power law.

How one function's cost grows with its input wants bytes that are exact down to a vector, which torch's allocators
count (`cost`, `peak_bytes`), and seconds without the noise of the first call. What a whole stage costs its process is
coarser, and costs nothing to watch (`peak_mib`).
"""

import ctypes
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
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
def peak_mib() -> Iterator[Callable[[], float]]:
    """Yield a function that gives, after the block, the peak memory in MiB beyond what was held before it: of the GPU
    where there is one, else of the process.

    Of a process, memory that was freed earlier is given back to the system first. Otherwise the block would fill it
    again, the process would not grow, and the peak would be missed.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - held) / 2**20
        torch.cuda.synchronize()
        return
    _give_back_freed_memory()
    held = psutil.Process().memory_info().rss
    with _highest_resident() as highest:
        yield lambda: max(0, highest() - held) / 2**20


def _give_back_freed_memory() -> None:
    """Let the C library return what was freed but kept for reuse; where it cannot be told to, nothing happens."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's
    if trim is not None:
        trim(0)


@contextmanager
def _highest_resident() -> Iterator[Callable[[], int]]:
    """Yield a function that gives the most bytes that were resident since the block began."""
    try:
        # Linux keeps the peak itself, and forgets it when told to: nothing is so short that it is missed.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        with _sampled_resident() as highest:
            yield highest
        return
    yield lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def _sampled_resident(interval: float = 0.005) -> Iterator[Callable[[], int]]:
    """`_highest_resident` where the system does not keep it: looked at every few milliseconds."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(interval):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(seen[0], process.memory_info().rss)
    finally:
        done.set()
        watcher.join()


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
