"""RAM: a policy that matches the reference model, tilted by the reward (arXiv 2605.10759).

    L = |v_theta - stopgrad(v_ref + m * A * (v - v_old))|^2,        v = noise - x0

from control with a KL penalty to the reference model: divided by m, its weight is 1 / m, so few updates and the copy do most of
the regularising. The copy v_old samples, and follows the policy before each step with a decay of min(0.01 * steps, 0.9).

From second-hand notes on the paper (Eq. 17) and the authors' configuration, not from their code: m is 100 (1000 for PickScore);
A is relative to the prompt's mean in standard deviations of the step, not clamped; eight noisings an endpoint; one update a
step, on the plain prediction, also where samples are drawn with guidance. The paper's equation has the policy itself in the
place of v_old. Deviations: the paper draws sigma from a density that rises with sigma, here all levels come from the model's
grid; gradients are clipped, as everywhere here (``--optimizer.max-grad-norm inf`` does not).

    diffusionrl train --algorithm.name ram
"""

from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point, column, mean_square
from diffusionrl.config.algorithms import RAMConfig


class RAM(ForwardProcess):
    """Reward-tilted matching of the reference model."""

    sampled_by = "older"
    leans_on_reference = True

    def __init__(self, config: RAMConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config
        self.copies["older"] = config.older

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        at = point.at
        pull = at.output(at.true) - at.output(point.others["older"])
        target = at.output(point.others["reference"]) + self.config.reward_scale * column(weights, pull) * pull
        return mean_square(at.output(point.own) - target)
