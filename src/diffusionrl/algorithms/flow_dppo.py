"""Flow-DPPO: divergence proximal policy optimization on flows (arXiv 2606.11025).

No clip of the ratio: a step leaves the loss where the policy has gone far from the one that sampled, by the divergence of the
two Gaussians, and would go further still.

    D = mean[(m - m_old)^2] / (2 * g^2),        g^2 = fresh^2 / -dt
    L = -A * ratio, but 0 where D >= d and (A > 0 and ratio > 1, or A < 0 and ratio < 1)

The ratio of one draw says little about how far the policy is; D says it exactly, so a step's samples can be passed over several
times. With d = inf it is plain importance sampling. D is the KL times the length of the step, -dt: the fall of the noise level,
on paths that are no flows.

Defaults: d = 1e-5 and two updates. Second-hand: the formula and d are from notes on two re-implementations (one takes 1e-6);
we have not seen the paper. Costs the means of all steps beside their latents, twice the memory of a rollout.

    diffusionrl train --preset emoji-flow --algorithm.name flow-dppo --algorithm.divergence 1e-3 --algorithm.step-weight-power 2
"""

import torch
from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken
from diffusionrl.config.algorithms import FlowDPPOConfig
from diffusionrl.sampling.rollout import Needs


class FlowDPPO(SharedOut):
    """Importance sampling with a mask by divergence."""

    needs: Needs = "means"

    def __init__(self, config: FlowDPPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        ratio, far = taken.ratio, taken.moved.detach() * taken.fall >= self.config.divergence
        further = torch.where(advantage > 0, ratio > 1, (advantage < 0) & (ratio < 1))
        left = far & further
        return torch.where(left, 0.0, -advantage * ratio), left
