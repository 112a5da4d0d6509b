"""Rewards are called beside the sampling, one call after another; one that takes too long is given up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.errors import describe
from diffusionrl.foreign.thread import Job
from diffusionrl.rewards.base import Scores
from diffusionrl.rewards.mixture import Mixture


class RewardCall:
    """One call.

    Args:
        group_size: see ``Mixture.score``.
    """

    def __init__(
        self, reward: Mixture, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], group_size: int = 1
    ) -> None:
        self.reward, self.count = reward, len(images)
        self.found: list[Scores] = []
        self.job = Job(lambda: self.found.append(reward.score(images, prompts, metadata, group_size)))

    def start(self) -> None:
        """Once all calls that were started before it are over."""
        self.job.start()

    def result(self, timeout: float) -> Scores:
        """Wait for the scores, at most ``timeout`` seconds from when the call began; none of them is valid if it takes longer.

        Raises:
            Interrupted: the run was asked to stop.
        """
        if not self.job.wait(timeout):
            return self.reward.nothing(self.count, f"no scores within {timeout:g} s")
        if self.job.raised is not None:
            return self.reward.nothing(self.count, describe(self.job.raised))
        return self.found[0]

    @property
    def seconds(self) -> float:
        """That it took."""
        return self.job.seconds


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
            self.calls.append(RewardCall(self.reward, images[:whole], prompts[:whole], metadata[:whole], self.group_size))
            self.calls[-1].start()

    def result(self, timeout: float) -> Scores:
        """Of all samples, in their order; ``timeout`` is for one call (see ``RewardCall.result``)."""
        assert len(self._images) == 0, "the last group is not whole"
        return Scores.join([call.result(timeout) for call in self.calls])

    @property
    def seconds(self) -> float:
        """That the calls took."""
        return sum(call.seconds for call in self.calls)
