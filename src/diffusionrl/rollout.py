"""Prompts to trajectories, chunk by chunk; rewards are computed while the next chunk is sampled."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusionrl import interruption, seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.prompts import Prompt
from diffusionrl.rewards import Mixture, Reward, RewardQueue, Scores, as_mixture
from diffusionrl.transitions import SAMPLERS, Reduction, SamplerTable, log_density

Needs = Literal["trajectories", "endpoints"]


@dataclass(frozen=True)
class Rollout:
    """Trajectories of N samples over T denoising steps, on the policy's device, and what they scored.

    Attributes:
        table: the sampler that made them.
        prompts: N prompts.
        embeddings: (N, L, D).
        latents: float32, (N, T + 1, C, h, w), from pure noise to the endpoint; (N, 1, C, h, w) where only endpoints are kept.
        log_probs: float32, (N, T), of the stored latents under the policy that drew them; 0 on deterministic rows; (N, 0) where
            only endpoints are kept.
        images: float32 in [0, 1], (N, 3, H, W), on the CPU.
        scores: N scores.
        seconds: time spent in "rollout" and, overlapping it, in "reward".
    """

    table: SamplerTable
    prompts: list[Prompt]
    embeddings: Tensor
    latents: Tensor
    log_probs: Tensor
    images: Tensor
    scores: Scores
    seconds: dict[str, float]


def make_table(policy: Policy, config: SamplingConfig) -> SamplerTable:
    """The sampler of a configuration on the model's own time grid.

    Raises:
        UserError: the model or the sampler cannot do that.
    """
    try:
        return SAMPLERS[config.sampler](policy.grid(config.num_steps), config.eta)
    except ValueError as error:
        raise UserError(f"sampling settings do not fit the model: {error}") from error


def predict(
    policy: Policy, table: SamplerTable, x: Tensor, steps: Tensor, embeddings: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Estimates of (x0, noise), for samples that may each be at a denoising step of their own.

    Args:
        x: (B, C, h, w).
        steps: rows of the table, (B,).
    """
    rows = steps.to(table.kept.device)
    shape = (-1, *[1] * (x.ndim - 1))
    grid = table.grid
    timestep, alpha, sigma = (column[rows].to(x.device) for column in (grid.timesteps, grid.alpha, grid.sigma))
    return policy.denoise(x, timestep, alpha.view(shape), sigma.view(shape), embeddings, guidance)


def denoise_step(
    policy: Policy, table: SamplerTable, x: Tensor, steps: Tensor, embeddings: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the next latent; the arguments are those of ``predict``.

    This is the policy of the paper, and the only place where it is evaluated: sampling and updates share it.
    """
    return table.mean(steps, *predict(policy, table, x, steps, embeddings, guidance)), table.std(steps, x)


@torch.no_grad()
def sample_trajectories(
    policy: Policy, table: SamplerTable, embeddings: Tensor, noise: Tensor, guidance: float, reduction: Reduction = "mean"
) -> tuple[Tensor, Tensor]:
    """Latents (B, T + 1, C, h, w) and log-probabilities (B, T) from noise (B, T + 1, C, h, w): the first row starts the
    chain, row i + 1 is the fresh noise of step i."""
    latents, log_probs = [noise[:, 0]], []
    for i in range(len(table)):
        interruption.check()
        steps = torch.full((len(noise),), i, device=noise.device)
        mean, std = denoise_step(policy, table, latents[-1], steps, embeddings, guidance)
        latents.append(mean + std * noise[:, i + 1])
        carries = bool(table.fresh[i] > 0)
        log_probs.append(log_density(latents[-1], mean, std, reduction) if carries else torch.zeros_like(noise[:, 0, 0, 0, 0]))
    return torch.stack(latents, 1), torch.stack(log_probs, 1)


def collect(
    policy: Policy,
    reward: Reward | Mixture,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    purpose: str,
    step: int,
    reduction: Reduction = "mean",
    needs: Needs = "trajectories",
    timeout: float = 600.0,
    group_size: int = 1,
) -> Rollout:
    """Sample one image a prompt and score it; sample i depends on (seed, purpose, step, i) and its prompt alone.

    Args:
        reduction: of the log-probabilities over the latent dimensions.
        needs: what is kept of a sample, its trajectory or its endpoint.
        timeout: seconds for one call of the reward.
        group_size: samples in a row that belong to one prompt slot, for rewards that look at whole groups.

    Raises:
        UserError: a reward looks at whole groups, and there are none.
        Interrupted: the run was asked to stop.
    """
    table = make_table(policy, sampling)
    shape = (len(table) + 1, *policy.latent_shape)
    mixture = as_mixture(reward)
    mixture.require_groups(group_size, "group_size", len(prompts), "the number of prompts")
    queue = RewardQueue(mixture, group_size)
    embeddings, latents, log_probs, images = [], [], [], []
    began = time.perf_counter()
    for part in chunks(len(prompts), sampling.batch_size):
        chunk = prompts[part]
        noise = seeds.normal(seed, purpose, step, list(range(part.start, part.stop)), shape).to(policy.device)
        texts, metadata = [prompt.text for prompt in chunk], [prompt.metadata for prompt in chunk]
        embeddings.append(policy.embed(texts))
        path, densities = sample_trajectories(policy, table, embeddings[-1], noise, sampling.guidance, reduction)
        whole = needs == "trajectories"
        latents.append(path if whole else path[:, -1:].clone())
        log_probs.append(densities if whole else densities[:, :0])
        images.append(policy.decode(path[:, -1]).cpu())
        queue.add(images[-1], texts, metadata)
    rollout_seconds = time.perf_counter() - began
    scores = queue.result(timeout)
    return Rollout(
        table,
        list(prompts),
        torch.cat(embeddings),
        torch.cat(latents),
        torch.cat(log_probs),
        torch.cat(images),
        scores,
        {"rollout": rollout_seconds, "reward": queue.seconds},
    )
