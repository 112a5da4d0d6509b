"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a closed terminal) as a request to save and stop, polled wherever a
run may stand still for long.

The handler only notes the request, so no computation is torn apart; ``check`` raises it where it can be answered: between
denoising steps, while waiting for rewards, between micro-batches. Before training begins there is nothing to save, and the
handler raises at once. A second SIGINT (Ctrl-C twice) does not wait either.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """The run was asked to save and stop; the message names the signal. No ``except Exception`` takes it on the way.

    Attributes:
        saved_in: the run folder to go on with, where there was something to save.
    """

    saved_in: Path | None = None


class _Request:
    """The process's one pending request: signals have no other address."""

    name: str | None = None
    at_once: bool = False


def check() -> None:
    """Raises Interrupted once a signal has come."""
    if _Request.name is not None:
        raise Interrupted(_Request.name)


def _note(number: int, frame: FrameType | None) -> None:
    if _Request.name is not None:  # it is being answered
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        return
    _Request.name = signal.Signals(number).name
    if _Request.at_once:
        check()


def _forget() -> None:
    """A forked child, such as a reward's worker, ends by a signal as any process does."""
    for number in SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def noted() -> Iterator[None]:
    """Within it, the signals are requests, but for one that the process was started to ignore (``nohup``). Nothing changes
    where they are already, nor outside the main thread, where Python allows no handlers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    heard = [number for number in SIGNALS if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _note) for number in heard}
    _Request.name, _Request.at_once = None, True
    try:
        yield
    finally:
        _Request.name, _Request.at_once = None, False
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """The process is at its end, and its exit code is settled: further signals change nothing."""
    for number in SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)


def begin_polling() -> None:
    """From now on there is something to save: signals wait for the next ``check``."""
    _Request.at_once = False
