"""A reward, smoothed: its mean over Gaussian noise on the sample. What only a few pixels would be paid for is paid no more.

    r(x) = 1 / K sum_k reward(clip(x + sigma * z_k)),        z_k ~ N(0, I)

The draws z_k depend on (seed, the sample in 8 bits, k) alone: the same sample has the same score, and no two share their noise.
Images and videos are clipped to [0, 1], other samples are not. It has a gradient where the reward has one.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.errors import require
from diffusionrl.rewards.base import Reward, Scores, as_scores, attribute_of


class Smoothed:
    """A reward around another one.

    Args:
        sigma: standard deviation of the noise, in units of the sample: images are in [0, 1].
        draws: how many times the reward is asked about a sample.
    """

    def __init__(self, reward: Reward, sigma: float = 0.1, draws: int = 8, seed: int = 0) -> None:
        require(sigma > 0 and draws >= 1, f"a smoothed reward has sigma above 0 and at least 1 draw, not {sigma} and {draws}")
        self.reward, self.sigma, self.draws, self.seed = reward, sigma, draws, seed

    def __getattr__(self, name: str) -> Any:
        if "reward" not in self.__dict__:  # half made, by a copy
            raise AttributeError(name)
        return getattr(self.reward, name)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        keys, limits = [_key(image) for image in images], attribute_of(self.reward, "range", (-math.inf, math.inf))
        found = []
        for draw in range(self.draws):
            generators = [seeds.torch_generator(self.seed, "smooth", key, draw) for key in keys]
            noise = [torch.randn(images.shape[1:], generator=each) for each in generators]
            noisy = images + self.sigma * torch.stack(noise).to(images)
            noisy = noisy.clamp(0, 1) if images.ndim > 3 and images.shape[-3] == 3 else noisy
            found.append(as_scores(self.reward(noisy, prompts, metadata), prompts, limits))
        values, valid = torch.stack([each.values for each in found]), torch.stack([each.valid for each in found])
        errors = [each.error for each in found if each.error]
        return Scores(values.mean(0), valid.all(0), errors[-1] if errors else None)


def _key(sample: Tensor) -> int:
    """Of what it shows in 8 bits."""
    coarse = (255 * sample.detach()).round().to(torch.int32).cpu().contiguous()
    return int.from_bytes(hashlib.blake2b(coarse.numpy().tobytes(), digest_size=8).digest(), "little")
