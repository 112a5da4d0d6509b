"""Several processes as one run, on ``torch.distributed``: which samples are whose, and the few things they tell each other.

``torchrun`` and ``accelerate launch`` start the same command several times and say so in the environment. Samples, scores and
advantages belong to global indices; a process draws and trains on a contiguous share of them, and sums of gradients are shared.
What is sent are tensors and JSON, never pickles. With one process, nothing is sent and everything is one's own.

Attributes:
    traffic: what this process has sent and waited for so far; see ``Traffic``.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from diffusionrl import devices, interruption
from diffusionrl.errors import RunStopped, UserError

_WATCH, _LOOK = "launcher", 1.0  # a thread, and seconds between two of its looks
PATIENCE = 600.0  # seconds for which a process waits for the others, beside what a reward may take


@dataclass
class Traffic:
    """Since the process began: seconds spent in collective operations, waiting for the others included, and bytes sent (of a
    tensor of B bytes on W processes: 2 B (W - 1) / W for a sum, B (W - 1) / W on average for one that is told to all). What
    FSDP2 sends is not counted; on NCCL, the seconds are those of starting an operation, which is over later."""

    seconds: float = 0.0
    bytes: float = 0.0


traffic = Traffic()


def metrics(before: Traffic) -> dict[str, float]:
    """Of the traffic since then; nothing where there is one process."""
    if count() == 1:
        return {}
    sent = {"time/communication": traffic.seconds - before.seconds, "communication/bytes": traffic.bytes - before.bytes}
    return {"processes": count()} | sent


def start(device: str, reward_timeout: float) -> None:
    """Join the processes that a launcher has started, and end with it; nothing without one.

    Args:
        device: see ``devices.choose``; each process of a machine takes a GPU of its own. Where there are fewer GPUs than
            processes they share them, and send over the CPU: NCCL wants a GPU each.
        reward_timeout: seconds for which the others may be waiting for a reward.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        kind = devices.choose(device)
        shared = devices.count(kind) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        PartialState(cpu=kind == "cpu" or shared, timeout=timedelta(seconds=reward_timeout + PATIENCE))
        if shared:
            devices.share(kind, int(os.environ["LOCAL_RANK"]))
    if "TORCHELASTIC_RUN_ID" in os.environ and _WATCH not in [thread.name for thread in threading.enumerate()]:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name=_WATCH).start()


def _end_with(launcher: int) -> None:
    """Save and stop when the launcher has ended, which cannot end this process any more."""
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """The one process that writes."""
    return index() == 0


def share(total: int, unit: int = 1, of: int | None = None, setting: str = "prompts_per_step") -> range:
    """Which of ``total`` samples are a process's own (this one's by default): whole units, as even as can be, in order.

    Raises:
        UserError: there are fewer units than processes; the message says that ``setting`` is to be raised.
    """
    if count() == 1:
        return range(total)
    units, process = total // unit, index() if of is None else of
    if units < count():
        each = "samples" if unit == 1 else f"groups of {unit} samples"
        raise UserError(f"{units} {each} cannot be shared among {count()} processes: start fewer, or raise {setting}")
    first, last = units * process // count(), units * (process + 1) // count()
    return range(first * unit, total if process == count() - 1 else last * unit)


@contextmanager
def _collective(sent: float) -> Iterator[None]:
    """Raises RunStopped where another process has ended, or does not answer."""
    began = time.perf_counter()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        interruption.check()  # whoever ended the others has probably ended this one
        raise RunStopped(
            f"another process has ended or does not answer: {str(error).splitlines()[0]}. See what it said last; "
            "the same command goes on from the newest checkpoint"
        ) from error
    traffic.seconds += time.perf_counter() - began
    traffic.bytes += sent * (count() - 1) / count()


def gather(own: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes, in their order, on all of them.

    Args:
        own: (sizes[index()], ...).
        sizes: how many rows each process has.
    """
    if count() == 1:
        return own
    moved = own.to(_device()).contiguous()
    parts = [moved if i == index() else moved.new_empty(size, *own.shape[1:]) for i, size in enumerate(sizes)]
    with _collective(own.nbytes * count()):
        for process, part in enumerate(parts):
            _broadcast(part, process)
    return torch.cat(parts).to(own.device)


def _broadcast(tensor: Tensor, source: int) -> None:
    """In place. Booleans and empty tensors are not every backend's."""
    if tensor.numel():
        dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, source)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, in one message."""
    if count() == 1 or not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors])
    with _collective(2 * together.nbytes):
        dist.all_reduce(together)
    for tensor, total in zip(tensors, torch.split(together, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def tell(value: Any) -> Any:
    """What the main process says, a JSON value, on all of them."""
    return value if count() == 1 else _tell(value, 0)


def ask(value: Any) -> list[Any]:
    """What each process says, a JSON value, in their order."""
    return [value] if count() == 1 else [_tell(value, process) for process in range(count())]


def _tell(value: Any, source: int) -> Any:
    device = _device()
    said = json.dumps(value).encode() if index() == source else b""
    length = torch.tensor([len(said)], device=device)
    with _collective(len(said) + 8):
        dist.broadcast(length, source)
        message = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else torch.empty(int(length), dtype=torch.uint8)
        message = message.to(device)
        dist.broadcast(message, source)
    return json.loads(bytes(message.tolist()))


def tell_tensors(files: Mapping[str, Mapping[str, Tensor]] | None) -> dict[str, dict[str, Tensor]]:
    """Tensors of the main process by file and name, on the CPU of all of them; the others give None."""
    if count() == 1:
        assert files is not None
        return {file: dict(tensors) for file, tensors in files.items()}
    described = tell(
        {file: {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}
         for file, tensors in (files or {}).items()}
    )  # fmt: skip
    found: dict[str, dict[str, Tensor]] = {}
    for file, tensors in described.items():
        found[file] = {}
        for name, (shape, dtype) in tensors.items():
            tensor = files[file][name] if files else torch.empty(shape, dtype=getattr(torch, dtype))
            moved = tensor.to(_device()).contiguous()
            with _collective(moved.nbytes):
                _broadcast(moved, 0)
            found[file][name] = moved.cpu()
    return found


def sharded(parameters: Iterable[Tensor]) -> bool:
    """Each process holds a part of the weights: all of them are needed whenever the model is used, equally often."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over the processes, in one piece on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of the main process. The others help where a tensor is sharded, and keep nothing; one is gathered
    after the other, as all of them together may not fit on a GPU."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if is_main():
            found[name] = gathered.to("cpu", copy=True)
    return found


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor where the parameter is, and sharded as it is."""
    moved = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
