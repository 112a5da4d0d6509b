"""DRTune: Deep Reward Supervisions for Tuning Text-to-Image Diffusion Models (arXiv 2405.00760).

Gradients explode through the network's input, step by step, and hardly through the sum: so the input is cut off at every step,
and early steps can be trained:

    x' = a * x + b * output(sg(x)),        L = -r(decode(x0(x_e)), c)

K steps (``trained_steps``), equally spaced with a random offset, are trained. The chain stops early, at a step e drawn from the
last 40 % (``early_stop``), and what is seen there, x0(x_e) = a' * x_e + b' * output(sg(x_e)), is scored.

Second-hand: as in FlowBP's repository (sd35/drtune.py: K = 3, spaced within the steps up to e); we have seen no code of the
authors. Deviation: elsewhere than on linear flows the output that is held fixed is the noise, with v-prediction too.

    diffusionrl train --algorithm.name drtune --reward preference
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.config.algorithms import DRTuneConfig


class DRTune(RewardGradient):
    """DRTune."""

    ends_chain = False

    def __init__(self, config: DRTuneConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """A row is the trained steps and the one that is the last."""
        number = self.config.trained_steps
        stop = count - 1 - int(torch.randint(self.config.last(count), (), generator=generator))
        stride = (stop + 1) // number
        offset = int(torch.randint(stop + 1 - (number - 1) * stride, (), generator=generator))
        return [[*range(offset, offset + number * stride, stride), stop]]

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        *steps, stop = plan[0].tolist()
        x = chain.direct([step for step in steps if step < stop], stop)
        with torch.set_grad_enabled(stop in steps):
            seen = chain.see(chain.stored[:, stop], stop)[0]
        return seen + chain.seen[stop].item() * (x - x.detach()) if x.requires_grad else seen
