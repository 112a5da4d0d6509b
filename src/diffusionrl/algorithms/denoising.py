"""The denoising loss, which reward-weighted regression and the pretraining loss share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionrl.policies.base import Policy


def denoising_losses(policy: Policy, clean: Tensor, embeddings: Tensor, draws: Sequence[int], guidance: float) -> Tensor:
    """|noise - noise_theta(alpha_t x0 + sigma_t noise, t, c)|^2, the mean over the latent dimensions, (B,), with gradient.

    Args:
        clean: x0, (B, C, h, w).
        embeddings: of c, (B, L, D).
        draws: a seed for each sample's t, uniform over the times that the model was trained at, and its noise.
    """
    timesteps, noises = [], []
    for draw in draws:
        generator = torch.Generator().manual_seed(draw)
        timesteps.append(torch.randint(policy.num_train_timesteps, (), generator=generator))
        noises.append(torch.randn(policy.latent_shape, generator=generator))
    timestep, noise = torch.stack(timesteps), torch.stack(noises).to(clean.device)
    alpha, sigma = (column.to(clean.device).view(-1, 1, 1, 1) for column in policy.noise_level(timestep))
    x = alpha * clean + sigma * noise
    _, predicted = policy.denoise(x, timestep.float().to(clean.device), alpha, sigma, embeddings, guidance)
    return (predicted - noise).square().flatten(1).mean(1)
