"""The process as foreign code finds it, and as it has to leave it: what it changes is put back."""

import gc
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, TextIO

import numpy as np
import torch

from diffusionrl.errors import RunStopped
from diffusionrl.foreign.thread import is_left_behind


class _Setting(NamedTuple):
    """Of the process or of the thread."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_cudnn(flags: tuple[bool, ...]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = flags


def _cudnn() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32


def _set_determinism(mode: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def _alarming() -> list[Any]:
    """The filters that make errors of warnings. Others come and go beside foreign code, in the libraries that sample."""
    return [each for each in warnings.filters if each[0] == "error"]


def _set_alarming(filters: list[Any]) -> None:
    warnings.filters[:] = [each for each in warnings.filters if each[0] != "error" or each in filters]  # type: ignore[index]


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


_NUMERIC = (
    _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch's matrix product precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _Setting(
        "torch's deterministic mode",
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_determinism,
    ),
    _Setting("the settings of cuDNN", _cudnn, _set_cudnn),
)
"""All threads have them in common, and what is computed depends on them."""

_SETTINGS = (
    *_NUMERIC,
    _Setting("the working directory", _folder, _set_folder),
    _Setting("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("torch's default device", torch.get_default_device, _set_device),
    _Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("torch's anomaly mode", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Setting("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    _Setting("the filters of warnings", _alarming, _set_alarming),
    _Setting("the command line", lambda: list(sys.argv), lambda found: sys.argv.__setitem__(slice(None), found)),
)
_TOLD = {*(each.name for each in _NUMERIC), "the working directory", "the standard streams"}
"""Whoever changes them relies on it, and will miss it: that they are put back is said."""


def _alarm() -> float | None:
    """When the process's timer goes off, by the monotonic clock; None where it has none."""
    left = signal.getitimer(signal.ITIMER_REAL)[0] if hasattr(signal, "getitimer") else 0
    return time.monotonic() + left if left else None


def _set_alarm(when: float | None) -> None:
    """Where it is another one now: it ends the process where nobody takes its signal."""
    now = _alarm()
    if (now is None) != (when is None) or (now is not None and when is not None and abs(now - when) > 1):
        signal.setitimer(signal.ITIMER_REAL, 0 if when is None else max(0.001, when - time.monotonic()))


class _Generators:
    """Foreign code draws from the process's generators; it goes on where it was, and the process knows nothing of it."""

    theirs: list[Any] | None = None

    @staticmethod
    def read() -> list[Any]:
        return [torch.get_rng_state(), random.getstate(), np.random.get_state()]

    @staticmethod
    def write(states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class _Told:
    """What was said of foreign code, and what it changed of what is computed beside it."""

    once: ClassVar[set[tuple[str, str]]] = set()
    meddled: str | None = None


@contextmanager
def _told(whose: str, changed: list[str]) -> Iterator[None]:
    """What was put back is said, once."""
    try:
        yield
    finally:
        for what in changed:
            if (whose, what) not in _Told.once:
                _Told.once.add((whose, what))
                print(f"warning: {whose} changes {what}, which is put back", file=sys.stderr, flush=True)


@contextmanager
def kept(whose: str, changed: list[str]) -> Iterator[None]:
    """Foreign code runs within. Afterwards the process is as it was before: the settings above, generators, timers and standard
    streams. What somebody may rely on, and had to be put back, is said, and added to ``changed``."""
    before = [(each, each.read()) for each in _SETTINGS]
    ours, alarm = _Generators.read(), _alarm()
    if _Generators.theirs is not None:
        _Generators.write(_Generators.theirs)
    with _told(whose, changed), _streams_kept(changed):
        try:
            yield
        finally:
            if not is_left_behind():  # when the process has long gone on
                _Generators.theirs = _Generators.read()
                _Generators.write(ours)
                _set_alarm(alarm)
                changed += _put_back(before)


def _put_back(before: list[tuple[_Setting, Any]]) -> list[str]:
    """Returns what somebody may rely on that had to be put back."""
    different = [(setting, value) for setting, value in before if setting.read() != value]
    for setting, value in different:
        setting.write(value)
    return [setting.name for setting, _ in different if setting.name in _TOLD]


@contextmanager
def _streams_kept(changed: list[str]) -> Iterator[None]:
    """Standard streams that were exchanged or closed, objects and descriptors, are as before."""
    streams = sys.stdin, sys.stdout, sys.stderr
    copies = {}
    for descriptor in (1, 2):
        with suppress(OSError):  # there is none
            copies[descriptor] = os.dup(descriptor)
    try:
        yield
    finally:
        lost = [each for each, copy in copies.items() if not _same(each, copy) and not is_left_behind()]
        for descriptor in lost:
            os.dup2(copies[descriptor], descriptor)
        for copy in copies.values():
            os.close(copy)
        if not is_left_behind():
            found = sys.stdin, sys.stdout, sys.stderr
            sys.stdin, sys.stdout, sys.stderr = streams[0], _open(streams[1], 1), _open(streams[2], 2)
            if lost or found != (sys.stdin, sys.stdout, sys.stderr):
                changed.append("the standard streams")


def _same(descriptor: int, copy: int) -> bool:
    try:
        return os.path.sameopenfile(descriptor, copy)
    except OSError:
        return False


def _open(stream: TextIO, descriptor: int) -> TextIO:
    """The stream, or where it was closed, another one to the same place."""
    if stream is None or not stream.closed:
        return stream
    return open(descriptor, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)


def meddling(whose: str, changed: list[str]) -> str | None:
    """What is wrong where foreign code has changed what is computed beside it; remembered for ``check``."""
    numeric = [each.name for each in _NUMERIC if each.name in changed]
    if not numeric:
        return None
    _Told.meddled = f"{whose} changes {' and '.join(numeric)}, which the sampling beside it sees: leave that as it is"
    return _Told.meddled


def forget() -> None:
    """Nothing was computed beside what was changed so far."""
    _Told.meddled = None


@contextmanager
def suspected() -> Iterator[None]:
    """Raises RunStopped in the place of whatever else fails where such a change is at work, or was."""
    before = [each.read() for each in _NUMERIC]
    try:
        yield
    except Exception as error:
        changed = [each.name for each, value in zip(_NUMERIC, before, strict=True) if each.read() != value]
        check()
        if changed:
            raise RunStopped(f"a reward changes {' and '.join(changed)} beside the sampling: leave that as it is") from error
        raise


def check() -> None:
    """Raises RunStopped where images were sampled beside such a change."""
    said, _Told.meddled = _Told.meddled, None
    if said is not None:
        raise RunStopped(said)
