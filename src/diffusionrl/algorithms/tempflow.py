"""TempFlow-GRPO: When Timing Matters for GRPO in Flow Models (arXiv 2508.04324).

The samples of a group are one until they branch: they begin at the same noise, run the ODE, draw fresh noise of their own in
one denoising step, and run the ODE again. So what tells their rewards apart is that step's noise, and its credit is exact. Only
the branching step is trained, by the clipped ratio, and counts in proportion to its fresh noise, as early steps decide more:

    L = 2.25 * fresh * max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)),        fresh = g * sqrt(-dt)

with advantages relative to the branches of the same prefix. A branching step is a window of one step (``window``) and a shared
beginning: samples of one prompt in two groups have two prefixes, and are not compared.

Defaults: e = 1e-4, advantages clamped at 5, the branching step drawn anew in every training step from all that have fresh
noise; 6 branches each are the authors' (``samples_per_prompt``). Second-hand: weight, clip and branches are from notes on a
re-implementation for the flow SDE.

Deviations: the paper branches at several steps in one training step, here all groups of a training step branch at the same one;
the shared prefix is computed for each of its branches, so sampling is not cheaper. Advantages are in standard deviations of the
group; ``normalisation`` "group-mean" takes those of the step.

    diffusionrl train --preset emoji-flow --algorithm.name tempflow --algorithm.clip-range 5e-3
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config.algorithms import TempFlowConfig
from diffusionrl.sampling.rollout import Rollout


class TempFlow(SharedOut):
    """The clipped ratio where the samples of a group part."""

    shared_start = True

    def __init__(self, config: TempFlowConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.statistics.of(rollout, [str(i // rollout.group_size) for i in range(len(rollout.prompts))])

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        losses, beyond = clipped(advantage, taken.ratio, self.config.clip_range)
        return self.config.noise_weight * taken.fresh * losses, beyond
