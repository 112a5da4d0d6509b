"""AlignProp: Aligning Text-to-Image Diffusion Models with Reward Backpropagation (arXiv 2310.03739).

Backpropagation through the whole chain, truncated at random, against the over-optimisation of a fixed K:

    L = -r(decode(x_0), c),        x_K = sg(x_K),        K ~ U(1, ..., T)

Deviations: the authors' code (and TRL's) draws the first step from 0 to T, so an update in T + 1 teaches nothing; its loss for
the aesthetic score is |r - 10| / 100, which is -r up to a scale (``target`` 10); in a variant, K ~ N(42, 5) of 50.
``most_steps`` bounds K, and with it the memory: what K passes need is kept, less with ``policy.gradient_checkpointing``.

    diffusionrl train --algorithm.name alignprop --reward aesthetic
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.config.algorithms import AlignPropConfig


class AlignProp(RewardGradient):
    """AlignProp."""

    def __init__(self, config: AlignPropConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        steps = 1 + int(torch.randint(self.config.most_steps or count, (), generator=generator))
        return [[count - steps]]

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        return chain.through(int(plan[0, 0]))
