"""DiffusionRL: Large-scale Reinforcement Learning for Diffusion Models (Zhang et al., arXiv 2401.12244).

DDPO's decision process (``ddpo.py``) at the scale of millions of prompts. With the advantage A of a sample, each of its
denoising steps has the loss

    max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)),        ratio = p(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)
    A = (r - mean) / sqrt(variance + eps), clamped to plus or minus 10

where mean and variance are those of all rewards of the step, whatever their prompts: with so many prompts, none comes up often
enough to be compared with itself. In every training step a few of the denoising steps (5 of 50) are drawn without replacement,
the same for all samples, and there is one optimizer step on each, over all samples. There is no KL: the clip holds the policy,
and the pretraining loss (``training/pretraining.py``). Several rewards are trained on in turn (``training/tasks.py``).

Where the paper and its released code differ, or this file from either:
- log-probabilities are means over the latent dimensions, as in the code (the equations imply sums): ``logprob_reduction``;
- A divides by standard deviation + 1e-6, as everywhere here; the paper has sqrt(variance + eps), the code deviation + 1e-7;
- the loss is the mean over samples; the code sums over the 16 of a GPU and averages over GPUs. AdamW divides the factor out
  again, but for its epsilon, which the preset "diffusionrl-paper" divides by 16;
- the code does not clip gradients: ``--optimizer.max-grad-norm inf``, as in the preset;
- in the code each GPU draws denoising steps of its own; here, as in Algorithm 1, they are the same for all samples;
- the code samples with weights from before its last pretraining step; here the policy samples as it is: the first ratio is 1;
- steps whose fresh noise is 0 carry no log-probability and are not drawn.

Not in the paper: ``normalisation``, ``kl_weight``, ``window`` and ``step_weight_power``, as in DDPO.

    diffusionrl train --algorithm.name diffusionrl
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.policy_gradient import PolicyGradient, Taken, clipped
from diffusionrl.config import DiffusionRLConfig
from diffusionrl.sampling.rollout import Rollout


class DiffusionRL(PolicyGradient):
    """One optimizer step on each of a few denoising steps of all samples."""

    def __init__(self, config: DiffusionRLConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return clipped(advantage, taken.ratio, self.config.clip_range)

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """Raises UserError where fewer steps have fresh noise than are to be trained."""
        stochastic = rollout.table.stochastic
        self.config.check_steps(len(stochastic))
        order = torch.randperm(len(stochastic), generator=seeds.torch_generator(seed, "trained_steps", step))
        valid = rollout.scores.valid.nonzero().flatten()
        for row in stochastic[order[: self.config.timesteps_per_step]].tolist():
            yield torch.stack([valid, torch.full_like(valid, row)], 1)
