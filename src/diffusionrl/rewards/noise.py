"""A reward that is none: a number hashed from the pixels. What training on it does to other scores is drift, not learning."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.rewards.base import Reward, register


def noise(samples: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """Uniform in [0, 1): the same for the same sample (in 8 bits, where it is an image), and another for any other. (B,)."""
    coarse = (255 * samples).round().to(torch.int32)
    digests = [hashlib.sha256(sample.contiguous().cpu().numpy().tobytes()).digest() for sample in coarse]
    return torch.tensor([int.from_bytes(digest[:4], "big") / 2**32 for digest in digests])


@register("noise")
def _(config: RewardsConfig) -> Reward:
    return noise
