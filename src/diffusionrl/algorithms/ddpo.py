"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al., arXiv 2305.13301).

Denoising is a decision process of T steps: the state is (prompt, t, x_t), the action x_{t-1}, the policy the sampler's
Gaussian, and the reward comes at the end. With the advantage A of a sample, each of its steps has the loss

    score function (SF, Eq. 3)        -A * log p(x_{t-1} | x_t, c)
    importance sampling (IS, Eq. 4)   max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)),    ratio = p / p_old, per step

averaged over samples and steps. SF is on-policy: one update a step. At p = p_old the two gradients agree.

Where the paper is silent or its code departs from it, this file follows the code:
- log-probabilities are means over the latent dimensions (the equations imply sums), so the ratio is the geometric mean over
  dimensions; ``logprob_reduction`` says which, and ``clip_range`` is in its units;
- advantages are clamped (at 5, as in the PyTorch release; 10 in JAX);
- steps whose fresh noise is 0 carry no log-probability and are left out.

Where its code shuffles the samples and cuts them into updates, every ``updates_per_step`` samples in a row are shared out at
random here, one to each update: so each has its part of every prompt's samples, and of every process's.

An option that is not in the paper: ``step_weight_power`` weighs denoising steps by a power of their fresh noise (1 as in
TempFlow-GRPO). A step's gradient is residual / fresh^2 * dmean, about as long as 1 / fresh, so on coarse grids the noise of the
last steps drowns the rest.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.policy_gradient import PolicyGradient
from diffusionrl.config import DDPOConfig
from diffusionrl.sampling.rollout import Rollout


class DDPO(PolicyGradient):
    """DDPO-IS and DDPO-SF."""

    def __init__(self, config: DDPOConfig, guidance: float) -> None:
        super().__init__(config, guidance, score_function=config.variant == "sf")
        self.config = config

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        total, count = len(rollout.prompts), self.config.updates_per_step
        blocks = -(-total // count)
        draws = torch.rand(blocks, count, generator=seeds.torch_generator(seed, "update_order", step)).argsort(1)
        for part in (torch.arange(blocks)[:, None] * count + draws).unbind(1):
            part = part[part < total]
            yield self.pairs(rollout, part[rollout.scores.valid[part]], seed, step)

    def pairs(self, rollout: Rollout, samples: Tensor, seed: int, step: int) -> Tensor:
        """The (sample, denoising step) pairs that an update on these samples runs over, (P, 2)."""
        stochastic = (rollout.table.fresh > 0).nonzero().flatten()
        count = max(1, round(self.config.train_fraction * len(stochastic)))
        pairs = []
        for sample in samples.tolist():
            drawn = torch.randperm(len(stochastic), generator=seeds.torch_generator(seed, "trained_steps", step, sample))
            chosen = stochastic[drawn[:count]].sort().values
            pairs.append(torch.stack([torch.full_like(chosen, sample), chosen], 1))
        return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)
