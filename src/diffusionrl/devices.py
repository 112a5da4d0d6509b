"""The devices that there are, and what is asked of each: the one place that names them."""

import sys
from typing import Any

import torch
from torch import Tensor

from diffusionrl.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

KINDS = ("cuda", "mps", "cpu")
"""The best first."""


def choose(wanted: str = "auto") -> str:
    """ "auto" is the best that is here. Raises UserError for a device that is not."""
    here = [kind for kind in KINDS if kind == "cpu" or torch.get_device_module(kind).is_available()]
    if wanted == "auto":
        return here[0]
    if wanted not in here:
        raise UserError(f"device {wanted} was asked for, but torch sees none here: use auto or {' or '.join(here)}")
    return wanted


def count(kind: str) -> int:
    """How many of them this machine has."""
    return int(torch.get_device_module(kind).device_count())


def share(kind: str, process: int) -> None:
    """Of fewer devices than processes, use the one that is a process's turn."""
    backend = torch.get_device_module(kind)
    if hasattr(backend, "set_device"):
        backend.set_device(process % count(kind))


def name_of(device: torch.device) -> str | None:
    """What its maker calls it; None where torch does not know."""
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(ask(device)) if ask else None


def in_double(values: Tensor) -> Tensor:
    """In float64 where the device has that, else as they are."""
    return values if values.device.type == "mps" else values.double()


# Memory: the device's own where its backend counts it, else the process's


def own_memory(device: torch.device) -> Any:
    """The backend of a device that counts its memory, such as ``torch.cuda``, or None."""
    backend = torch.get_device_module(device)
    return backend if hasattr(backend, "max_memory_reserved") else None


def peak_bytes(device: torch.device) -> int:
    """Most in use so far; 0 where it is not known."""
    backend = own_memory(device)
    if backend:
        return int(backend.max_memory_allocated(device))
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Threads


def current_index() -> int | None:
    """Which of the GPUs "cuda" is; a thread begins with the first one, whatever its process has chosen. None where none is in
    use."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def use_index(index: int | None) -> None:
    if index is not None:
        torch.cuda.set_device(index)
