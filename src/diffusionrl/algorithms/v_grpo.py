"""V-GRPO: group-relative policy gradient on a variational bound of the likelihood (arXiv 2604.23380).

    l     = mean |x0_theta - x0|^2 / stopgrad(mean |x0_theta - x0|)                    (Eq. 14)
    ratio = exp(l_old - l_theta)
    L     = max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)) + b * |x0_theta - x0_old|^2   (Eq. 16)
    A     = h * tanh(A / h),        h = 3                                              (Eq. 17)

From second-hand notes on the paper: four noisings an endpoint, stratified and the same for the group; one update a step, so the
ratio is 1; no clip, b = 0; samples of the ODE without guidance. Deviation: with several updates a step, the ratio is that of
each noising, not of their mean.

    diffusionrl train --algorithm.name v-grpo
"""

from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point, mean_square, relative_error
from diffusionrl.algorithms.policy_gradient import clipped_loss
from diffusionrl.config.algorithms import VGRPOConfig
from diffusionrl.sampling.rollout import Rollout


class VGRPO(ForwardProcess):
    """The clipped policy gradient of the bound."""

    has_ratio = True

    def __init__(self, config: VGRPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.config.soft_clip * (super().advantages(rollout) / self.config.soft_clip).tanh()

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        true, old = point.at.true.x0, point.behaviour.x0
        ratio = (relative_error(old, true) - relative_error(point.own.x0, true)).exp()
        drift = self.config.behaviour_weight * mean_square(point.own.x0 - old)
        return clipped_loss(weights, ratio, self.config.clip_range) + drift
