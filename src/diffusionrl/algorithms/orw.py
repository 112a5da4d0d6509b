"""ORW-CFM-W2: online reward-weighted flow matching with a Wasserstein anchor (arXiv 2502.06061).

    L = w * |v_theta - v|^2 + a * |v_theta - v_ref|^2,        w = exp(R / temperature), here over its mean in the step

Without the anchor this is reward-weighted regression (``rwr.py``); with it, the policy does not collapse onto the best samples.
Rewards are in the units of the reward: ``inverse_temperature`` 0.2 is for kilobytes. The paper's w has no mean of 1: a constant
factor changes nothing but the anchor's weight, which is here free of the reward's level.

    diffusionrl train --algorithm.name orw
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point
from diffusionrl.config.algorithms import ORWConfig
from diffusionrl.sampling.rollout import Rollout


class ORW(ForwardProcess):
    """Reward-weighted flow matching, held to the reference model."""

    def __init__(self, config: ORWConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        """Weights, of mean 1 over the valid samples."""
        scores = rollout.scores
        weights = torch.zeros(len(scores.values))
        rewards = scores.values[scores.valid].double()
        weights[scores.valid] = (len(rewards) * (self.config.inverse_temperature * rewards).softmax(0)).float()
        return weights

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        return weights * point.at.error(point.own)
