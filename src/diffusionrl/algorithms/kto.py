"""Diffusion-KTO: Aligning Diffusion Models by Optimizing Human Utility (arXiv 2404.04465).

Single samples with a label, y = 1 for what is wanted and -1 for what is not: no pair is needed. With d = |v_theta - v|^2 and
d_ref of the reference model, and the gain g = d_ref - d:

    z = max(0, mean of g over the update), without gradient
    L = lambda_y * (1 - sigmoid(y * beta * (g - z)))

What is minimised is lambda_y * beta * y * sigmoid'(.) * d, the first factors without gradient: it has the same gradient, and z
takes the whole update, which a look without gradient before it gives, so that micro-batches are cut as memory allows.

Labels are drawn: 1 where a sample's advantage is positive, -1 where it is negative; or they come from disk
(``preferences``). As in the authors' code, d is a mean over the latent dimensions, and beta is 1000. Its other utilities, in
the place of the sigmoid, are log sigmoid(u) ("loss-averse") and -log sigmoid(-u) ("risk-seeking"): second-hand.

Deviations: in the paper the learning rate is 1e-7 for all weights, and four of five samples that are trained on are wanted
ones; here lambda of the others is a setting (``rejected_weight``, 1). Several noise levels of a sample, stratified.

    diffusionrl train --algorithm.name kto
"""

from typing import Any

import torch
from torch import Tensor

from diffusionrl import processes
from diffusionrl.algorithms.forward_process import ForwardProcess, Point
from diffusionrl.config.algorithms import KTOConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout


class KTO(ForwardProcess):
    """Diffusion-KTO, on labels that are drawn or from disk."""

    leans_on_reference = True

    def __init__(self, config: KTOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        """Samples without a group to be compared with are from disk: their scores, 1 or 0, are the labels."""
        return 2 * rollout.scores.values - 1 if rollout.group_size == 1 else super().advantages(rollout)

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        def measure(part: Tensor) -> Tensor:
            at = self.noised(policy, rollout, part)
            reference = at.error(self.ask(policy, at, policy.reference(), self.guidance))
            return reference - at.error(at.ask(policy, self.guidance))

        label, gain = advantages[rows[:, 0]].sign().double(), self.over(rows, measure).double()
        sums = processes.ask([gain[label != 0].sum().item(), int(label.count_nonzero())])
        total, count = map(sum, zip(*sums, strict=True))
        centre = max(0.0, total / max(1, count))
        scale = torch.where(label > 0, 1.0, self.config.rejected_weight) * self.config.beta * label
        return (scale * self.slope(label * self.config.beta * (gain - centre))).float()

    def slope(self, gain: Tensor) -> Tensor:
        """Of the utility."""
        match self.config.utility:
            case "kahneman-tversky":
                return gain.sigmoid() * (-gain).sigmoid()
            case "loss-averse":
                return (-gain).sigmoid()
            case "risk-seeking":
                return gain.sigmoid()

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        return weights * point.at.error(point.own)

    def figures(self, point: Point, weights: Tensor) -> dict[str, Any]:
        gain = (point.at.error(point.others["reference"]) - point.at.error(point.own)).detach()
        return {
            "policy/chosen_gain": gain.where(weights > 0, torch.nan),
            "policy/rejected_gain": gain.where(weights < 0, torch.nan),
            "policy/ranked_right": ((weights * gain).sign() + 1).where(weights != 0, torch.nan) / 2,
        }
