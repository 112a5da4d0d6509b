"""Images from a model or a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusionrl.config import SamplingConfig
from diffusionrl.data.images import image_grid
from diffusionrl.data.media import shown, stills, write_sample
from diffusionrl.data.prompts import prompts_given
from diffusionrl.errors import UserError
from diffusionrl.policies import load_trained
from diffusionrl.policies.base import chunks
from diffusionrl.sampling.rollout import draw_noise, make_table, sample_trajectories


@torch.no_grad()
def sample_images(
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    out: Path,
    model_config: str | None = None,
    lora: Path | None = None,
) -> Path:
    """One image a prompt and seed, as PNG files beside a grid (a row a prompt). Returns the grid's path.

    Samples that are no images are in ``samples.npy`` too.

    Args:
        prompts: texts, or one built-in set or file of prompts.

    Raises:
        UserError: see ``prompts_given`` and ``load_trained``; or there are no pictures of the samples.
    """
    chosen = prompts_given(prompts)
    policy = load_trained(model, lora, sampling=sampling, example=chosen[0], config=model_config)
    table = make_table(policy, sampling)
    jobs = [(prompt, seed) for prompt in chosen for seed in seeds]
    images = []
    for part in chunks(len(jobs), sampling.batch_size):
        asked = [prompt for prompt, _ in jobs[part]]
        draws = [draw_noise(policy, table, [prompt], seed, "sample", 0, [0]) for prompt, seed in jobs[part]]
        start, noise = (torch.cat(each) for each in zip(*draws, strict=True))
        drawn = sample_trajectories(policy, table, asked, start, noise, sampling.guidance)
        images.append(policy.decode(drawn.latents[:, -1], asked).cpu())
    out.mkdir(parents=True)
    samples, failed = shown(policy.show, torch.cat(images))
    if policy.show is not None:
        np.save(out / "samples.npy", torch.cat(images).numpy())
    for index, sample in enumerate(samples):
        write_sample(sample, out / f"{index:05d}.png", policy.sampling_rate)
    image_grid(stills(samples), columns=len(seeds)).save(out / "grid.png")
    if failed is not None:
        raise UserError(f"no pictures of the samples, which are in {out / 'samples.npy'}: {failed}")
    return out / "grid.png"
