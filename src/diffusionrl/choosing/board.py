"""Rounds of images that a person judges, one after the other."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionrl.web.server import Refused

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True)
class Round:
    """Images of one prompt, files or PNG bytes, in the order in which they are shown."""

    prompt: str
    images: Sequence[Path | bytes]


class Stale(Exception):
    """What was judged is not what is shown: another window was quicker."""


class Board:
    """What the page shows, and takes.

    Args:
        several: any number of a round's images may be chosen, and the person may pause; otherwise one, and finish.
        about: for the person: what becomes of it.

    Attributes:
        rounds: that are there; more may come.
        answers: of each round that was judged, the places of the images that were chosen; None where none was.
        first: the round back to which can be undone.
        total: rounds that there will be from that one on; None: without end.
        left: seconds that there are for them; None: no bound.
        over: set when the person has finished.
        change: held by whoever reads or changes these, and notified of an answer.
    """

    def __init__(self, several: bool, about: str) -> None:
        self.several, self.about = several, about
        self.rounds: list[Round] = []
        self.answers: list[list[int] | None] = []
        self.first = 0
        self.total: int | None = 0
        self.left: float | None = None
        self.paused, self.over, self.change = False, threading.Event(), threading.Condition()

    def save(self) -> None:
        """The answers have changed. Raises OSError where they cannot be kept, and the change is taken back."""

    def state(self) -> dict[str, Any]:
        """For the page's script; "shown" has the numbers and sizes of this round and the next."""
        with self.change:
            now = len(self.answers)
            shown = [[number, len(self.rounds[number].images)] for number in range(now, min(now + 2, len(self.rounds)))]
            done = now - self.first
            return {
                "shown": shown,
                "prompt": self.rounds[now].prompt if shown else "",
                "several": self.several,
                "about": self.about,
                "done": done,
                "total": self.total,
                "ended": self.over.is_set() or (self.total is not None and done >= self.total),
                "paused": self.paused,
                "left": self.left if shown else None,
            }

    def image(self, number: int, place: int) -> tuple[bytes, str]:
        """A file and its media type. Raises LookupError where there is none, OSError where it cannot be read."""
        image = self.rounds[number].images[place]
        return (image, "image/png") if isinstance(image, bytes) else (image.read_bytes(), _KINDS[image.suffix.lower()])

    def act(self, action: str, number: int | None, chosen: list[int] | None) -> None:
        """Choose images of a round, or none; undo the round before it; pause, or go on; finish.

        Args:
            number: of the round that the person sees; None: none.

        Raises:
            Stale: another round is shown.
            Refused: that is nothing to be done with it.
            OSError: see ``save``.
        """
        with self.change:
            now = len(self.answers)
            if action == "pause":
                self.paused = not self.paused
            elif action == "finish":
                self.over.set()
            elif number != (now if now < len(self.rounds) else None):
                raise Stale
            elif action == "undo":
                self._become(self.answers[:-1] if now > self.first else self.answers)
            elif action == "choose" and number is not None and self._fits(self.rounds[now], chosen):
                self._become([*self.answers, chosen])
            else:
                raise Refused(400, "choose among the images that are shown, or none, undo, pause or finish")
            self.change.notify_all()

    def _fits(self, shown: Round, chosen: list[int] | None) -> bool:
        if chosen is None:
            return True
        return set(chosen) <= set(range(len(shown.images))) and (self.several or len(chosen) == 1)

    def _become(self, answers: list[list[int] | None]) -> None:
        before, self.answers = self.answers, answers
        try:
            self.save()
        except OSError:
            self.answers = before
            raise
