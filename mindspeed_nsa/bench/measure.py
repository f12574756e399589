"""Time, memory, and what the processor could do at most."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.cpu import native
from .contenders import Run


class Spread(NamedTuple):
    """Milliseconds: the median of some runs, the fastest, the slowest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Of runs in seconds."""
        return cls(*(1e3 * s for s in (statistics.median(seconds), min(seconds), max(seconds))))

    def times(self, factor: float) -> "Spread":
        """Scaled."""
        return Spread(*(factor * x for x in self))


class Clock:
    """CPU seconds of this process, all threads, and seconds on the wall, of one call."""

    def __init__(self, run: Callable[[], object]) -> None:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        self.cpu, self.wall = time.process_time() - cpu, time.perf_counter() - wall
        del result  # freeing it is not timed, and it is not kept


def forward(run: Run) -> Clock:
    """One call without autograd."""
    with torch.no_grad():
        return Clock(run)


def backward(run: Run, leaves: list[Tensor]) -> Clock:
    """The gradients of one call; the call itself is not timed."""
    out = run()
    grad = torch.ones_like(out)
    return Clock(lambda: torch.autograd.grad(out, leaves, grad))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call holds at a time beyond what was there before, as the kernel counts pages."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what is taken
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Ceilings(NamedTuple):
    """What bounds any kernel here: operations, exponentials and bytes a second."""

    matrix: float  # floating point operations, of the type's multiplication
    exp: float  # in float32
    read: float  # bytes, of more than the caches hold


def ceilings(dtype: torch.dtype, threads: int) -> Ceilings:
    """Measured on `threads` threads at once. The exponentials are torch's, on what fits the nearest cache."""
    with ThreadPoolExecutor(threads) as pool:
        matrix = sum(pool.map(lambda _: native.peak(tiles=dtype == torch.bfloat16), range(threads)))
    small, large = -torch.rand(threads * 4096 * 2), torch.rand(1 << 26)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    exp = threads * small.numel() * 50 / _best(lambda: [small.exp() for _ in range(50)])
    torch.set_num_threads(threads)
    read = large.numel() * large.element_size() / _best(large.sum)
    torch.set_num_threads(before)
    return Ceilings(matrix, exp, read)


def _best(run: Callable[[], object]) -> float:
    return min(Clock(run).wall for _ in range(7))
