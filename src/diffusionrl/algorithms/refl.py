"""ReFL: reward feedback learning, of ImageReward: Learning and Evaluating Human Preferences (arXiv 2304.05977).

One late step t, drawn anew for each update, is differentiated, and what the policy sees there is scored; no chain at all:

    L = -r(decode(x0(x_t)), c),        t among the last quarter of the steps (the last 10 of 40)

Deviations: the authors' loss is relu(2 - r) / 1000 for ImageReward, here -min(r, ``target``); the pretraining loss that they
add is an option of any run (``pretraining.source``). What is scored is a prediction at t, blurred where t is early, not the
sample: rewards that judge detail are misled, and ``reward/differentiated`` is not the sample's score.

    diffusionrl train --algorithm.name refl --reward preference
"""

import math

import torch
from torch import Tensor

from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.config.algorithms import ReFLConfig


class ReFL(RewardGradient):
    """ReFL."""

    ends_chain = False

    def __init__(self, config: ReFLConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        last = math.ceil(count * self.config.late)
        return [[count - 1 - int(torch.randint(last, (), generator=generator))]]

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        step = int(plan[0, 0])
        return chain.see(chain.stored[:, step], step)[0]
