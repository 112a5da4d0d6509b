"""Questions that a program asks a person, and waits for."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionrl.choosing.page import Stale
from diffusionrl.web.server import Refused

_LOOK = 0.1  # seconds between two looks at the clock


@dataclass(frozen=True)
class Question:
    """Which of these images, PNG files of one prompt, are liked?"""

    prompt: str
    images: Sequence[bytes]


class Questions:
    """What the page shows of the reward "human".

    Attributes:
        paused: the person has asked for time: the clock stands still.
    """

    def __init__(self) -> None:
        self.paused = False
        self._asked: Sequence[Question] = ()
        self._answers: list[list[int] | None] = []
        self._before, self._left = 0, 0.0  # questions of earlier calls, seconds
        self._change = threading.Condition()

    def ask(self, asked: Sequence[Question], seconds: float, hold: Callable[[], None]) -> list[list[int] | None]:
        """The places of the images that are liked, for each question; None where it was passed over, or not answered in time.

        Args:
            hold: called again and again while the person has paused.
        """
        with self._change:
            self._asked, self._answers, self._left = asked, [], seconds
            while len(self._answers) < len(asked) and self._left > 0:
                began = time.monotonic()
                self._change.wait(_LOOK)
                if self.paused:
                    hold()
                else:
                    self._left -= time.monotonic() - began
            found = self._answers + [None] * (len(asked) - len(self._answers))
            self._before, self._asked, self._answers = self._before + len(asked), (), []
            return found

    def state(self) -> dict[str, Any]:
        with self._change:
            done, total = len(self._answers), len(self._asked)
            places = range(done, min(done + 2, total))
            return {
                "shown": [[self._before + place, len(self._asked[place].images)] for place in places],
                "prompt": self._asked[done].prompt if places else "",
                "several": True,
                "done": done,
                "total": total,
                "undo": done > 0,
                "note": "" if places else "The program is at work. Its next images come by themselves.",
                "ended": False,
                "kept": "1 for the images that you like, 0 for the others",
                "paused": self.paused,
                "left": self._left if places else None,
            }

    def image(self, number: int, place: int) -> tuple[bytes, str]:
        with self._change:
            if number < self._before:
                raise LookupError
            return self._asked[number - self._before].images[place], "image/png"

    def act(self, action: str, number: int | None, chosen: list[int] | None) -> None:
        with self._change:
            if action == "pause":
                self.paused = not self.paused
                return
            if action == "finish":
                raise Refused(404, "the program that asks ends by itself")
            done = len(self._answers)
            if done >= len(self._asked) or number != self._before + done:
                raise Stale
            if action == "undo":
                self._answers = self._answers[:-1]
            elif chosen is not None and not set(chosen) <= set(range(len(self._asked[done].images))):
                raise Refused(400, "choose among the images that are shown")
            else:
                self._answers.append(chosen)
            self._change.notify_all()
