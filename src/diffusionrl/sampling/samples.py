"""Images from a model or a run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from diffusionrl import seeds as addresses
from diffusionrl.config import SamplingConfig
from diffusionrl.data.images import image_grid, to_pil
from diffusionrl.policies import load_trained
from diffusionrl.policies.base import chunks
from diffusionrl.sampling.rollout import make_table, sample_trajectories


@torch.no_grad()
def sample_images(model: str, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig, out: Path) -> Path:
    """One image a prompt and seed, as PNG files beside a grid (a row a prompt). Returns the grid's path."""
    policy = load_trained(model)
    table = make_table(policy, sampling)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    shape = (len(table) + 1, *policy.latent_shape)
    images = []
    for part in chunks(len(jobs), sampling.batch_size):
        texts = [prompt for prompt, _ in jobs[part]]
        noise = torch.cat([addresses.normal(seed, "sample", 0, [0], shape) for _, seed in jobs[part]]).to(policy.device)
        latents, _ = sample_trajectories(policy, table, policy.embed(texts), noise, sampling.guidance)
        images.append(policy.decode(latents[:, -1]).cpu())
    out.mkdir(parents=True)
    tiles = [to_pil(image) for image in torch.cat(images)]
    for index, tile in enumerate(tiles):
        tile.save(out / f"{index:05d}.png")
    image_grid(tiles, columns=len(seeds)).save(out / "grid.png")
    return out / "grid.png"
