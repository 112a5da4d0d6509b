"""What a batch costs: seconds and bytes, measured at two sizes and taken to be linear between and beyond."""

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from diffusionrl import devices

_POLL = 0.002  # seconds
_PATIENCE = 4.0  # seconds for the larger of the two sizes
_SHARE = 0.5  # of the free memory that the larger size may be expected to take
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cost:
    """Of a batch of n: (what it costs however small, what each further one adds), in seconds, and in bytes at the peak,
    everything that the process holds included.

    Attributes:
        tried: the larger of the two sizes.
    """

    seconds: tuple[float, float]
    bytes: tuple[float, float]
    tried: int

    def time(self, n: int) -> float:
        return self.seconds[0] + self.seconds[1] * n

    def peak(self, n: int) -> float:
        return self.bytes[0] + self.bytes[1] * n


def used_bytes(device: torch.device) -> int:
    """Held by this process, in the memory that the device counts, or else in the process's."""
    backend = devices.own_memory(device)
    return int(backend.memory_reserved(device) if backend else psutil.Process().memory_info().rss)


def _give_back() -> None:
    """Return freed memory to the system, which glibc puts off, so that what is held is what is in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def limit_bytes(device: torch.device) -> int:
    """What this process may come to hold: what it holds, and what is free. A container's limit counts (cgroup v2)."""
    backend = devices.own_memory(device)
    if backend:
        return int(backend.mem_get_info(device)[0]) + used_bytes(device)
    free = psutil.virtual_memory().available
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (said := limit.read_text().strip()) != "max":
        cached = next(line for line in (_CGROUP / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
        in_use = int((_CGROUP / "memory.current").read_text()) - int(cached.split()[1])
        free = min(free, int(said) - in_use)
    return free + used_bytes(device)


class Peak(threading.Thread):
    """``with Peak(device) as peak``: afterwards, the most that was held is ``peak.bytes``, and the time ``peak.seconds``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.device, self.bytes, self.seconds = device, 0, 0.0
        self._backend = devices.own_memory(device)
        self._over = threading.Event()

    def __enter__(self) -> "Peak":
        if self._backend:
            self._backend.empty_cache()
            self._backend.reset_peak_memory_stats(self.device)
        else:
            _give_back()
            self.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._backend:
            self._backend.synchronize(self.device)
            self.bytes = self._backend.max_memory_reserved(self.device)
        self.seconds = time.perf_counter() - self._began
        if not self._backend:
            self._over.set()
            self.join()

    def run(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._over.wait(_POLL):
                return


def measure(work: Callable[[int], object], wanted: int, device: torch.device) -> Cost:
    """Run ``work`` on a batch of 1, and on one as near to ``wanted`` as time and memory safely allow."""
    work(1)  # whatever is slow the first time
    with Peak(device) as small:
        held = used_bytes(device)
        work(1)
    room = max(1, limit_bytes(device) - held)
    size = wanted
    while size > 2 and (size * small.seconds > _PATIENCE or size * (small.bytes - held) > _SHARE * room):
        size //= 2
    if size == 1:
        return Cost((0.0, small.seconds), (held, max(0.0, small.bytes - held)), 1)
    with Peak(device) as large:
        work(size)
    slopes = [max(0.0, (b - a) / (size - 1)) for a, b in ((small.seconds, large.seconds), (small.bytes, large.bytes))]
    return Cost((max(0.0, large.seconds - size * slopes[0]), slopes[0]), (large.bytes - size * slopes[1], slopes[1]), size)
