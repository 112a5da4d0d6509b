"""Images from a model or a run."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusionrl.config import SamplingConfig
from diffusionrl.data.images import image_grid
from diffusionrl.data.media import shown, stills, write_sample
from diffusionrl.data.prompts import Prompt, prompts_given
from diffusionrl.errors import UserError
from diffusionrl.policies import load_trained
from diffusionrl.policies.base import Policy, chunks
from diffusionrl.sampling.rollout import draw_noise, make_table, sample_trajectories


@torch.no_grad()
def draw_images(policy: Policy, jobs: Sequence[tuple[Prompt, int]], sampling: SamplingConfig) -> Tensor:
    """A sample for each prompt and seed, (B, *policy.sample_shape), on the CPU; the same whatever else is asked for."""
    table = make_table(policy, sampling)
    images = []
    for part in chunks(len(jobs), sampling.batch_size):
        asked = [prompt for prompt, _ in jobs[part]]
        draws = [draw_noise(policy, table, [prompt], seed, "sample", 0, [0]) for prompt, seed in jobs[part]]
        start, noise = (torch.cat(each) for each in zip(*draws, strict=True))
        drawn = sample_trajectories(policy, table, asked, start, noise, sampling.guidance)
        images.append(policy.decode(drawn.latents[:, -1], asked).cpu())
    return torch.cat(images)


def sample_images(
    model: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    out: Path,
    model_config: str | None = None,
    lora: Path | None = None,
) -> Path:
    """One image a prompt and seed, as PNG files with captions (``data.folders``) beside a grid (a row a prompt). Returns the
    grid's path.

    Samples that are no images are in ``samples.npy`` too.

    Args:
        prompts: texts, or one built-in set or file of prompts.

    Raises:
        UserError: see ``prompts_given`` and ``load_trained``; or there are no pictures of the samples.
    """
    chosen = prompts_given(prompts)
    policy = load_trained(model, lora, sampling=sampling, example=chosen[0], config=model_config)
    jobs = [(prompt, seed) for prompt in chosen for seed in seeds]
    images = draw_images(policy, jobs, sampling)
    out.mkdir(parents=True)
    samples, failed = shown(policy.show, images)
    if policy.show is not None:
        np.save(out / "samples.npy", images.numpy())
    with (out / "metadata.jsonl").open("w") as captions:
        for index, (sample, (prompt, seed)) in enumerate(zip(samples, jobs, strict=True)):
            write_sample(sample, out / f"{index:05d}.png", policy.sampling_rate)
            captions.write(json.dumps({"file_name": f"{index:05d}.png", "text": prompt.text, "seed": seed}) + "\n")
    image_grid(stills(samples), columns=len(seeds)).save(out / "grid.png")
    if failed is not None:
        raise UserError(f"no pictures of the samples, which are in {out / 'samples.npy'}: {failed}")
    return out / "grid.png"
