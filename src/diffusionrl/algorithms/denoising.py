"""The denoising loss, which reward-weighted regression and the pretraining loss share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.base import Policy


def denoising_losses(
    policy: Policy, clean: Tensor, prompts: Sequence[Prompt], draws: Sequence[int], guidance: float | None
) -> Tensor:
    """|noise - noise_theta(alpha_t x0 + sigma_t noise, t, c)|^2, the mean over the latent dimensions, (B,), with gradient.

    Args:
        clean: x0, (B, ...).
        prompts: c, B of them.
        draws: a seed for each sample's t, uniform over the policy's noise levels, and its noise.
    """
    rows, noises = [], []
    for draw in draws:
        generator = torch.Generator().manual_seed(draw)
        rows.append(torch.randint(len(policy.noise_levels), (), generator=generator))
        noises.append(torch.randn(policy.latent_shape, generator=generator))
    levels, noise = policy.noise_levels[torch.stack(rows)], torch.stack(noises).to(clean.device)
    _, predicted = policy.denoise(levels.noisy(clean, noise), levels, prompts, guidance)
    return (predicted - noise).square().flatten(1).mean(1)
