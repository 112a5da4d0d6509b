"""Rewards are called in threads of their own, one after another, beside the sampling; one that takes too long is given up."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffusionrl import interruption
from diffusionrl.rewards.base import Scores
from diffusionrl.rewards.mixture import Mixture

_PATIENCE = 0.05  # seconds between two looks at whether the run was asked to stop


class RewardCall(threading.Thread):
    """One call. A daemon: a reward that hangs must not keep the process from ending.

    Args:
        previous: the call that has to be over before this one begins.
    """

    def __init__(
        self,
        reward: Mixture,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        previous: "RewardCall | None" = None,
    ) -> None:
        super().__init__(daemon=True)
        self.reward, self.images, self.prompts, self.metadata, self.previous = reward, images, prompts, metadata, previous
        self.over = threading.Event()
        self.began: float | None = None
        self.seconds = 0.0
        self.scores: Scores | None = None

    def run(self) -> None:
        if self.previous is not None:
            self.previous.over.wait()
        self.began = time.perf_counter()
        try:
            self.scores = self.reward.score(self.images, self.prompts, self.metadata)
        except BaseException as error:  # a reward may even try to end its thread
            self.scores = self.reward.nothing(len(self.images), f"{type(error).__name__}: {error}")
        self.seconds = time.perf_counter() - self.began
        self.over.set()

    def result(self, timeout: float) -> Scores:
        """Wait for the scores, at most ``timeout`` seconds from when the call began; none of them is valid if it takes longer.

        Raises:
            Interrupted: the run was asked to stop.
        """
        while not self.over.wait(_PATIENCE):
            interruption.check()
            if self.began is not None and time.perf_counter() - self.began > timeout:
                self.over.set()
                self.seconds = timeout
                return self.reward.nothing(len(self.images), f"no scores within {timeout:g} s")
        assert self.scores is not None
        return self.scores


def within(timeout: float, work: Callable[[], None]) -> bool:
    """Whether ``work``, called in a daemon thread, is over within ``timeout`` seconds. What it raises is raised here.

    Raises:
        Interrupted: the run was asked to stop.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    end = time.monotonic() + timeout
    while thread.is_alive() and time.monotonic() < end:
        thread.join(_PATIENCE)
        interruption.check()
    if raised:
        raise raised[0]
    return not thread.is_alive()
