"""EPG: the policy gradient with the evidence bound in the place of the likelihood (arXiv 2602.04663, Eq. 3).

    log p = -|v_theta - v|^2,        ratio = p / p_old
    L     = -stopgrad(ratio) * A * log p,        A = R - mean of the prompt's

The paper's finding is that the estimator of the likelihood matters, and that clips and standardised advantages hardly do: there
are none here. The distance from the reference model (``reference_weight``) takes the place of the paper's KL.

From second-hand notes on the paper. On variance-preserving paths, v is the noise.

    diffusionrl train --algorithm.name epg
"""

from torch import Tensor

from diffusionrl.algorithms.advantages import centred_advantages
from diffusionrl.algorithms.forward_process import ForwardProcess, Point
from diffusionrl.sampling.rollout import Rollout


class EPG(ForwardProcess):
    """The unclipped policy gradient of the bound."""

    has_ratio = True

    def advantages(self, rollout: Rollout) -> Tensor:
        return centred_advantages(rollout.scores, [prompt.key for prompt in rollout.prompts])

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        error = point.at.error(point.own)
        ratio = (point.at.error(point.behaviour) - error.detach()).exp()
        return ratio * weights * error
