"""A person as the reward: images are shown on a page of this machine, and score 1 where they are liked, 0 where they are not
(as with Demon's person, arXiv 2410.05760).

A call waits for the person within ``rewards.timeout``; while they have paused, the clock stands still. What is not judged by
then, or passed over, is invalid.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.choosing.board import Board, Round
from diffusionrl.choosing.page import PageServer
from diffusionrl.config.rewards import HumanConfig, RewardsConfig
from diffusionrl.data.images import to_png
from diffusionrl.errors import require
from diffusionrl.foreign import thread
from diffusionrl.rewards.base import NothingSeen, Reward, Scores, grey, register

_LOOK = 0.1  # seconds between two looks at the clock
_SHARE, _SECONDS = 0.2, 5.0  # of the time-out, and at most: what is left of it to hand over what was judged


class Human:
    """Asks on a page.

    Args:
        timeout: seconds for a call.

    Attributes:
        range: of the scores.
        counts: images that were shown ("asked"), and judged.

    Raises:
        UserError: the port cannot be had.
    """

    range = (0.0, 1.0)

    def __init__(self, config: HumanConfig, timeout: float) -> None:
        self.size, self._seconds = config.size, timeout - min(_SECONDS, _SHARE * timeout)
        self.board = Board(several=True, about="1 for the images that you like, 0 for the others")
        self.page = PageServer(config.port, "--rewards.human.port")
        self.page.show(self.board)
        self.counts = {"asked": 0, "judged": 0}
        self._say("you are the reward: open")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        if torch.equal(images, grey(tuple(images.shape[1:])).expand_as(images)):
            raise NothingSeen("a person is not asked about the grey images on which rewards are tried")
        parts = self._parts(prompts)
        if not self.page.is_open:
            self._say(f"{len(images)} images wait for you at")
        answers = self._ask([Round(prompts[part[0]], [to_png(images[row]) for row in part]) for part in parts])
        values = torch.full((len(images),), torch.nan, dtype=torch.float64)
        for part, liked in zip(parts, answers, strict=True):
            if liked is not None:
                values[part] = torch.tensor([float(place in liked) for place in range(len(part))], dtype=torch.float64)
        judged = int(values.isfinite().sum())
        self.counts["asked"] += len(images)
        self.counts["judged"] += judged
        if judged == len(images):
            return Scores(values, values.isfinite())
        late = f"{len(images) - judged} of {len(images)} images were passed over, or not judged within {self._seconds:g} s"
        return Scores(values, values.isfinite(), f"{late} (rewards.timeout): pause on the page to take more")

    def _ask(self, rounds: list[Round]) -> list[list[int] | None]:
        """The places of the images that are liked, for each round; None where it was passed over, or not judged in time."""
        board = self.board
        with board.change:
            board.rounds += rounds
            board.total, left = len(rounds), self._seconds
            while len(board.answers) < len(board.rounds) and left > 0:
                board.left, began = left, time.monotonic()
                board.change.wait(min(left, _LOOK))
                if board.paused:
                    thread.hold()
                else:
                    left -= time.monotonic() - began
            board.answers += [None] * (len(board.rounds) - len(board.answers))
            found = board.answers[board.first :]
            board.rounds[board.first :] = [Round("", ())] * len(rounds)  # whose images are not needed any more
            board.first, board.total = len(board.rounds), 0
            return found

    def _parts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Rows of one prompt in a row, as many as are shown at once."""
        found: list[list[int]] = []
        for row, prompt in enumerate(prompts):
            if not found or len(found[-1]) == self.size or prompts[found[-1][0]] != prompt:
                found.append([])
            found[-1].append(row)
        return found

    def _say(self, what: str) -> None:
        print(f"{what} {self.page.address}", file=sys.stderr, flush=True)


@register("human")
def human(config: RewardsConfig) -> Reward:
    """What ``rewards.human`` says."""
    from diffusionrl import processes  # here: ``serve-reward`` runs without what it needs

    require(processes.count() == 1, "the reward human asks one person on one page: train on one process")
    return Human(config.human, config.timeout)
