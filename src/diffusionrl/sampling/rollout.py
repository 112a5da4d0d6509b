"""Prompts to trajectories, chunk by chunk; rewards are computed while the next chunk is sampled."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffusionrl import interruption, processes, seeds
from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.rewards import Mixture, Reward, RewardQueue, Scores, as_mixture
from diffusionrl.transitions import SAMPLERS, Reduction, SamplerTable, log_density

Needs = Literal["trajectories", "endpoints"]


@dataclass(frozen=True)
class Rollout:
    """Trajectories of N samples over T denoising steps, on the policy's device, and what they scored.

    Prompts and scores are of all samples; tensors are of the n that this process drew, all of them where it is alone.

    Attributes:
        table: the sampler that made them.
        prompts: N prompts.
        embeddings: (n, L, D).
        latents: float32, (n, T + 1, C, h, w), from pure noise to the endpoint; (n, 1, C, h, w) where only endpoints are kept.
        log_probs: float32, (n, T), of the stored latents under the policy that drew them; 0 on deterministic rows; (n, 0) where
            only endpoints are kept.
        images: float32 in [0, 1], (n, 3, H, W), on the CPU.
        scores: N scores.
        seconds: time spent in "rollout", until the last sample is scored, and, overlapping it, in "reward".
        group_size: samples in a row that one process drew.
        batch_size: samples that were drawn at once.
    """

    table: SamplerTable
    prompts: list[Prompt]
    embeddings: Tensor
    latents: Tensor
    log_probs: Tensor
    images: Tensor
    scores: Scores
    seconds: dict[str, float]
    group_size: int = 1
    batch_size: int = sys.maxsize

    @property
    def shares(self) -> list[range]:
        """Which samples each process drew."""
        return [processes.share(len(self.prompts), self.group_size, process) for process in range(processes.count())]

    @property
    def own(self) -> range:
        """Which samples this process drew."""
        return self.shares[processes.index()]

    def batches(self, process: int) -> list[range]:
        """The samples that a process drew at once, batch by batch."""
        return cut(self.shares[process], self.batch_size)

    def whole(self) -> "Rollout":
        """With the tensors of all samples, on every process."""
        sizes = list(map(len, self.shares))
        return replace(
            self,
            embeddings=processes.gather(self.embeddings, sizes),
            latents=processes.gather(self.latents, sizes),
            log_probs=processes.gather(self.log_probs, sizes),
            images=processes.gather(self.images, sizes),
        )


def cut(share: range, size: int) -> list[range]:
    """Samples in batches of ``size``, the last one smaller if need be."""
    return [share[part] for part in chunks(len(share), size)]


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
    """Sample one image a prompt and score it; sample i depends on (seed, purpose, step, i) and its prompt alone. Of several
    processes, each samples and scores its share, and all know the scores. Where their weights are sharded, each runs as many
    batches as the others: one that has none left takes part with a sample that is thrown away.

    Args:
        reduction: of the log-probabilities over the latent dimensions.
        needs: what is kept of a sample, its trajectory or its endpoint.
        timeout: seconds for one call of the reward.
        group_size: samples in a row that belong to one prompt slot: one process draws them, rewards may look at them together.

    Raises:
        UserError: a reward looks at whole groups, and there are none; or there are more processes than groups.
        Interrupted: the run was asked to stop.
    """
    table = make_table(policy, sampling)
    shape = (len(table) + 1, *policy.latent_shape)
    mixture = as_mixture(reward)
    mixture.require_groups(group_size, "group_size", len(prompts), "the number of prompts")
    queue = RewardQueue(mixture, group_size)
    embeddings, latents, log_probs, images = [], [], [], []
    began = time.perf_counter()
    cuts = [cut(processes.share(len(prompts), group_size, each), sampling.batch_size) for each in range(processes.count())]
    batches = cuts[processes.index()]
    for indices in batches:
        chunk = prompts[indices.start : indices.stop]
        noise = seeds.normal(seed, purpose, step, list(indices), shape).to(policy.device)
        texts, metadata = [prompt.text for prompt in chunk], [prompt.metadata for prompt in chunk]
        embeddings.append(policy.embed(texts))
        path, densities = sample_trajectories(policy, table, embeddings[-1], noise, sampling.guidance, reduction)
        whole = needs == "trajectories"
        latents.append(path if whole else path[:, -1:].clone())
        log_probs.append(densities if whole else densities[:, :0])
        images.append(policy.decode(path[:, -1]).cpu())
        queue.add(images[-1], texts, metadata)
    if processes.sharded(policy.trainable().values()):
        for _ in range(max(map(len, cuts)) - len(batches)):
            sample_trajectories(policy, table, embeddings[-1][:1], noise[:1], sampling.guidance, reduction)
    scores = queue.result(timeout)
    found = Rollout(
        table,
        list(prompts),
        torch.cat(embeddings),
        torch.cat(latents),
        torch.cat(log_probs),
        torch.cat(images),
        scores,
        {},
        group_size,
        sampling.batch_size,
    )
    scores = gather_scores(scores, found.shares)
    seconds = {
        "rollout": time.perf_counter() - began,
        "reward": queue.seconds,
    }  # with the wait for scores, one's own and others'
    return replace(found, scores=scores, seconds=seconds)


def gather_scores(own: Scores, shares: Sequence[range]) -> Scores:
    """The scores of all processes, in the order of the samples; what a reward says on one of them, all know."""
    errors = [error for error in processes.ask(own.error) if error]
    sizes = list(map(len, shares))
    values, valid = processes.gather(own.values, sizes), processes.gather(own.valid, sizes)
    parts = {name: processes.gather(part, sizes) for name, part in own.parts.items()}
    return Scores(values, valid, errors[-1] if errors else None, parts)
