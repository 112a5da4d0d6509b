"""FlowBP-Sparse: backpropagation on a cached trajectory (arXiv 2606.11075).

The trajectory is sampled without gradient and kept. K of its steps (``trained_steps``), drawn with weights that favour late
ones, are computed again with gradient, each from its stored latent; the endpoint is the sum of all steps, so each step's
gradient is its direct term, and none runs through a network's input:

    x_0 = x_init + sum_i dt_i v_i,        L = -r(decode(x_0), c),        dL/dtheta = sum_k g * dt_k * (dv_k/dtheta)^T dL/dx_0

    P(step i) ~ i ** late_bias,        g = 1 + rescale * (sum_i |dt_i| / sum_k |dt_k| - 1)

As in the authors' code and its configuration for SD3.5 (4 of 25 steps, bias 1, rescale 1/2), with any sampler's steps in the
place of Euler's. Deviations: scores are not clipped at 0.55, which is for HPSv2 (``target``), and the unguided half of a guided
prediction has a gradient too; elsewhere than on linear flows, |dt| is the difference of sigma, and a step passes the gradient
on as in DRTune, whose form this is, without the early stop.

    diffusionrl train --algorithm.name flowbp --reward preference
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.config.algorithms import FlowBPConfig


class FlowBP(RewardGradient):
    """FlowBP-Sparse."""

    def __init__(self, config: FlowBPConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        weights = torch.arange(1.0, count + 1) ** self.config.late_bias
        return [torch.multinomial(weights, self.config.trained_steps, generator=generator).sort().values.tolist()]

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        steps, grid = plan[0].tolist(), chain.table.grid
        lengths = (grid.sigma_next - grid.sigma).abs()
        share = (lengths[steps].sum() / lengths.sum()).item()
        return chain.direct(steps, len(chain.table), 1 + self.config.rescale * (1 / share - 1))
