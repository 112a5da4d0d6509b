"""Rewards are called in threads of their own, one after another, beside the sampling; one that takes too long is given up."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl import devices, interruption
from diffusionrl.rewards.base import Scores
from diffusionrl.rewards.mixture import Mixture

_PATIENCE = 0.05  # seconds between two looks at whether the run was asked to stop


class RewardCall(threading.Thread):
    """One call. A daemon: a reward that hangs must not keep the process from ending.

    Args:
        previous: the call that has to be over before this one begins.
        group_size: see ``Mixture.score``.
    """

    def __init__(
        self,
        reward: Mixture,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        previous: "RewardCall | None" = None,
        group_size: int = 1,
    ) -> None:
        super().__init__(daemon=True)
        self.reward, self.images, self.prompts, self.metadata, self.previous = reward, images, prompts, metadata, previous
        self.group_size = group_size
        self.gpu = devices.current_index()
        self.over = threading.Event()
        self.began: float | None = None
        self.seconds = 0.0
        self.scores: Scores | None = None

    def run(self) -> None:
        if self.previous is not None:
            self.previous.over.wait()
        self.began = time.perf_counter()
        try:
            devices.use_index(self.gpu)
            self.scores = self.reward.score(self.images, self.prompts, self.metadata, self.group_size)
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


class RewardQueue:
    """Samples as they come, asked about in one call after another: at once, or, where the reward looks at groups, as soon as
    groups are whole.

    Args:
        group_size: samples in a row that make a group.
    """

    def __init__(self, reward: Mixture, group_size: int) -> None:
        self.reward, self.group_size = reward, group_size
        self.calls: list[RewardCall] = []
        self._images, self._prompts = torch.empty(0), list[str]()  # of a group that is not whole yet
        self._metadata: list[dict[str, Any]] = []

    def add(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """The next samples; the arguments are those of a reward."""
        images = torch.cat([self._images, images]) if len(self._images) else images
        prompts, metadata = [*self._prompts, *prompts], [*self._metadata, *metadata]
        whole = len(images) - (len(images) % self.group_size if self.reward.grouped else 0)
        self._images, self._prompts, self._metadata = images[whole:], prompts[whole:], metadata[whole:]
        if whole:
            previous = self.calls[-1] if self.calls else None
            asked = (images[:whole], prompts[:whole], metadata[:whole])
            self.calls.append(RewardCall(self.reward, *asked, previous, self.group_size))
            self.calls[-1].start()

    def result(self, timeout: float) -> Scores:
        """Of all samples, in their order; ``timeout`` is for one call (see ``RewardCall.result``)."""
        assert len(self._images) == 0, "the last group is not whole"
        return Scores.join([call.result(timeout) for call in self.calls])

    @property
    def seconds(self) -> float:
        """That the calls took."""
        return sum(call.seconds for call in self.calls)


def within(timeout: float, work: Callable[[], None]) -> bool:
    """Whether ``work``, called in a daemon thread, is over within ``timeout`` seconds. What it raises is raised here.

    Raises:
        Interrupted: the run was asked to stop.
    """
    raised: list[BaseException] = []
    gpu = devices.current_index()

    def run() -> None:
        try:
            devices.use_index(gpu)
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
