"""AWM: Advantage Weighted Matching (arXiv 2509.25050).

A flow's training loss stands in for the log-likelihood of an endpoint, and the clipped policy gradient is taken of it. With
l = |v_theta - v|^2 at the time s = sigma:

    log p = -w(l, s),        ratio = p / p_old
    L     = max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)) + b * |v_theta - v_average|^2

As in the authors' code:
- w is (s / p) * ((l + 1e-10)^p - 1e-10^p) with p = 1/4 ("ghuber"), or l, s * l, s^2 * l, or s * (sqrt(l + 1e-10) - 1e-5)
  ("huber"); comparisons are made in float64;
- the clip range is 1, which hardly clips;
- the average has weight b = 1 and follows the policy before each step with a decay of min(0.001 * steps, 0.3);
- the distance from the reference model has weight 0.001 (``reference_weight``; 0.0001 for PickScore);
- six noise levels an endpoint, from the noisier 90 % of the grid.

The old policy is the one that sampled. On variance-preserving paths, v is the noise.

    diffusionrl train --algorithm.name awm
"""

from torch import Tensor

from diffusionrl.algorithms.forward_process import Estimate, ForwardProcess, Noised, Point
from diffusionrl.algorithms.policy_gradient import clipped_loss
from diffusionrl.config.algorithms import AWMConfig
from diffusionrl.devices import in_double

_FLOOR = 1e-10


class AWM(ForwardProcess):
    """Advantage Weighted Matching."""

    has_ratio = True

    def __init__(self, config: AWMConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config
        self.copies["older"] = config.older

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        ratio = (self._cost(point.at, point.behaviour) - self._cost(point.at, point.own)).exp().float()
        drift = point.at.distance(point.own, point.others["older"])
        return clipped_loss(weights, ratio, self.config.clip_range) + self.config.older_weight * drift

    def _cost(self, at: Noised, estimate: Estimate) -> Tensor:
        """w, in float64, (B,)."""
        gap, time = in_double(at.output(estimate) - at.output(at.true)), in_double(at.levels.sigma.to(at.x.device))
        error = gap.flatten(1).square().mean(1)
        match self.config.likelihood:
            case "plain":
                return error
            case "time":
                return time * error
            case "time-squared":
                return time**2 * error
            case "huber":
                return time * ((error + _FLOOR).sqrt() - _FLOOR**0.5)
            case "ghuber":
                return 4 * time * ((error + _FLOOR) ** 0.25 - _FLOOR**0.25)
