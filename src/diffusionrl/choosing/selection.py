"""Rounds that are judged one after the other, each kept at once."""

import threading
from collections.abc import Sequence
from typing import Any

from diffusionrl.choosing.choices import Choices
from diffusionrl.choosing.page import Stale
from diffusionrl.choosing.rounds import Round
from diffusionrl.web.server import Refused

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


class Selection:
    """What the page shows of ``diffusionrl choose``.

    Args:
        rounds: which are there; more may be appended.
        total: that there will be; None: no end.

    Attributes:
        over: set when the person has finished.
    """

    def __init__(self, choices: Choices, rounds: Sequence[Round], total: int | None) -> None:
        self.choices, self.rounds, self.total = choices, list(rounds), total
        self.over = threading.Event()
        self._lock = threading.Lock()

    @property
    def ahead(self) -> int:
        """Rounds that wait for the person."""
        return len(self.rounds) - len(self.choices.lines)

    def state(self) -> dict[str, Any]:
        with self._lock:
            done = len(self.choices.lines)
            shown = [[number, len(self.rounds[number].images)] for number in range(done, min(done + 2, len(self.rounds)))]
            ended = self.over.is_set() or (self.total is not None and done >= self.total)
            return {
                "shown": shown,
                "prompt": self.rounds[done].prompt if shown else "",
                "several": False,
                "done": done,
                "total": self.total,
                "undo": done > 0,
                "note": "" if shown else "That was all of them." if ended else "Drawing images …",
                "ended": ended,
                "kept": f"kept in {self.choices.folder}",
            }

    def image(self, number: int, place: int) -> tuple[bytes, str]:
        file = self.rounds[number].images[place]
        return file.read_bytes(), _KINDS[file.suffix.lower()]

    def act(self, action: str, number: int | None, chosen: list[int] | None) -> None:
        with self._lock:
            if action == "finish":
                return self.over.set()
            done = len(self.choices.lines)
            if action == "pause":
                raise Refused(404, "nothing waits here")
            if number != done and not (number is None and done >= len(self.rounds)):
                raise Stale
            if action == "undo":
                return self.choices.undo() if done else None
            places = range(len(self.rounds[done].images)) if number is not None else ()
            if number is None or (chosen is not None and not (len(chosen) == 1 and chosen[0] in places)):
                raise Refused(400, "choose one of the images that are shown, or null")
            self.choices.keep(self.rounds[done], None if chosen is None else chosen[0])
