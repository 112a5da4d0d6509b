"""CRD: centred reward distillation (arXiv 2603.14128).

The reward that the policy implies, centred within a group, is regressed on the samples' advantages. With d = |v_theta - v|^2:

    R_i = d_old_i - d_i,        L = (beta * (R_i - mean_group R) - A_i)^2

The copy of d_old follows the policy before each step with a decay of min(0.25 + 0.005 * steps, 0.999), another copy samples
(0 for 75 steps, then rising by 0.0075 a step). The distance from the reference model has weight 0.1, and is measured from its
prediction with guidance (``reference_guidance``).

The centre takes the whole group, which a look without gradient before each update gives; what is minimised afterwards,
-2 * beta * (residual_i - mean of the group's residuals) * d_i, has the same gradient.

From the documentation of another implementation: the authors' beta is not known to us (here 1), their reward-adaptive weights
are left out, and the reference's guidance is 4.5.

    diffusionrl train --algorithm.name crd
"""

from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point, draw_mean
from diffusionrl.config.algorithms import CRDConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout


class CRD(ForwardProcess):
    """Regression of the implied reward, centred within groups."""

    sampled_by = "sampler"

    def __init__(self, config: CRDConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config, self.reference_guidance = config, config.reference_guidance
        self.copies |= {"older": config.older, "sampler": config.sampler}

    @property
    def looks_at(self) -> list[str]:
        return ["older"]

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        def measure(part: Tensor) -> Tensor:
            at = self.noised(policy, rollout, part)
            older = self.ask(policy, at, policy.copies.used("older"), self.guidance)
            return at.error(older) - at.error(at.ask(policy, self.guidance))

        implied = self.over(rows, measure).double()
        residual = self.config.beta * (implied - draw_mean(implied, rows)) - advantages[rows[:, 0]].double()
        return (-2 * self.config.beta * (residual - draw_mean(residual, rows))).float()

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        return weights * point.at.error(point.own)
