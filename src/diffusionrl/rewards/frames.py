"""Rewards for images on videos: the mean of what some frames score."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Reward, Scores, as_scores


class OnFrames:
    """A reward for images that is asked about videos too; of images, it is the reward itself.

    Args:
        count: frames of a video, spread evenly, the first and the last among them; 0: all.
    """

    def __init__(self, reward: Reward, name: str, count: int) -> None:
        self.reward, self.name, self.count = reward, name, count

    def __getattr__(self, name: str) -> Any:
        if "reward" not in self.__dict__:  # half made, by a copy
            raise AttributeError(name)
        return getattr(self.reward, name)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            sound = any("sampling_rate" in each for each in metadata)
            made = "sound: give a reward for sound" if sound else f"{tuple(images.shape[1:])}: give one of yours"
            raise UserError(f"{self.name} scores images, and the model makes {made}")
        if images.ndim == 4:
            return self.reward(images, prompts, metadata)
        total = images.shape[1]
        rows = torch.linspace(0, total - 1, min(self.count or total, total)).round().long()
        limits = getattr(self.reward, "range", (-math.inf, math.inf))
        found = [as_scores(self.reward(images[:, row], prompts, metadata), prompts, limits) for row in rows.tolist()]
        valid = torch.stack([scores.valid for scores in found]).all(0)
        errors = [scores.error for scores in found if scores.error]
        return Scores(torch.stack([scores.values for scores in found]).mean(0), valid, errors[-1] if errors else None)
