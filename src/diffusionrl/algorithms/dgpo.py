"""DGPO: Direct Group Preference Optimization (arXiv 2510.08425).

Diffusion-DPO with whole groups in the place of pairs. With d = |v_theta - v|^2 and d_ref of the reference model, at one noise
level and noise for all G samples of a group:

    S = (beta / G) * sum_i A_i * (d_i - d_ref_i)
    L = mean_i sigmoid(S) * A_i * d_i,        sigmoid(S) without gradient

A sample leaves the loss where exp(d_old - d) has left 1 - c to 1 + c in the direction of its advantage; with two samples and
A = 1, -1 this is Diffusion-DPO's gradient. S takes the whole group, which a look without gradient before each update gives, so
that micro-batches are cut as memory allows.

As in the authors' code: beta is 100, c is 0.001, four noise levels an endpoint from the noisiest 60 % of the grid, and samples
whose advantage is 0 count nothing. Its variant with an averaged reference is not here.

    diffusionrl train --algorithm.name dgpo
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.forward_process import BEHAVIOUR, ForwardProcess, Point, draw_mean
from diffusionrl.config.algorithms import DGPOConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout


class DGPO(ForwardProcess):
    """Direct preference optimization of groups."""

    has_ratio = True
    leans_on_reference = True

    def __init__(self, config: DGPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        def measure(part: Tensor) -> Tensor:
            at = self.noised(policy, rollout, part)
            own = at.error(at.ask(policy, self.guidance))
            reference = at.error(self.ask(policy, at, policy.reference(), self.guidance))
            old = at.error(self.ask(policy, at, policy.copies.used(BEHAVIOUR), self.guidance)) if self.copies else own
            return torch.stack([own, reference, old], 1)

        if len(rows) == 0:
            return torch.zeros(0)
        own, reference, old = self.over(rows, measure).double().unbind(1)
        advantage = advantages[rows[:, 0]].double()
        preference = (self.config.beta * draw_mean(advantage * (own - reference), rows)).sigmoid()
        ratio = (old - own).exp()
        clip = self.config.clip_range
        left = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
        return (preference * advantage * ~left).float()

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        return weights * point.at.error(point.own)
