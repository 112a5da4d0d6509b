"""Standard streams that never end a command: closed, gone, full, or without the letters for what is printed."""

import io
import os
import sys
from contextlib import suppress
from typing import IO, Any


class _Steady(io.TextIOBase):
    """A stream whose writes are lost where they fail."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """Of this process, from here on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a terminal that cannot be flushed
                stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Steady(stream))
