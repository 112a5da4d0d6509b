"""FlowAWR: advantage-weighted regression on flows (arXiv 2606.30376).

    A_i = G * softmax_group(R / g)_i - 1,        g = max(std of the step's rewards, 1e-6)
    L   = |v_theta - stopgrad(v_old + A * (v - v_old))|^2,        v = noise - x0

for groups of G samples of one prompt. The copy v_old follows the policy before each step with a decay of
min(0.001 * steps, 0.5); the distance from the reference model has weight 1e-4 (``reference_weight``).

From second-hand notes, not from the authors' code. The notes do not say who samples: here the copy, as in DiffusionNFT.

    diffusionrl train --algorithm.name flow-awr
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point, column, mean_square
from diffusionrl.config.algorithms import FlowAWRConfig
from diffusionrl.data.prompts import members_of
from diffusionrl.sampling.rollout import Rollout


class FlowAWR(ForwardProcess):
    """Advantage-weighted regression from an older copy."""

    sampled_by = "older"

    def __init__(self, config: FlowAWRConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config
        self.copies["older"] = config.older

    def advantages(self, rollout: Rollout) -> Tensor:
        scores, advantages = rollout.scores, torch.zeros(len(rollout.scores.values))
        rewards = scores.values.double()
        spread = rewards[scores.valid].std(correction=0).clamp(min=1e-6) if scores.valid.any() else 1.0
        for indices in members_of([prompt.key for prompt in rollout.prompts]).values():
            members = torch.tensor(indices)
            members = members[scores.valid[members]]
            advantages[members] = (len(members) * (rewards[members] / spread).softmax(0) - 1).float()
        return advantages

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        at, older = point.at, point.at.output(point.others["older"])
        pull = at.output(at.true) - older
        return mean_square(at.output(point.own) - older - column(weights, pull) * pull)
