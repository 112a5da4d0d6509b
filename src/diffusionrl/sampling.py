"""Images from a model or a run."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from diffusionrl import seeds as addresses
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError
from diffusionrl.evaluation import image_grid
from diffusionrl.policies import StableDiffusionPolicy, check_model, load_pipeline
from diffusionrl.policies.base import chunks
from diffusionrl.rewards.jpeg import to_pil
from diffusionrl.rollout import make_table, sample_trajectories


def load_trained(model: str) -> StableDiffusionPolicy:
    """A policy of a model as it is, or of a run folder: the run's model with what the run exported.

    Raises:
        UserError: no such model or run.
    """
    run_dir = Path(model)
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        check_model(model)
        return StableDiffusionPolicy(load_pipeline(model), lora_rank=None)
    pipeline = load_pipeline(yaml.safe_load(config_file.read_text())["model"])
    if (run_dir / "export" / "unet").is_dir():
        pipeline.unet = type(pipeline.unet).from_pretrained(run_dir / "export" / "unet")
    elif (run_dir / "export" / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(run_dir / "export")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        raise UserError(f"{run_dir} is a run folder without an export: it has not trained yet")
    return StableDiffusionPolicy(pipeline, lora_rank=None)


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
    made = torch.cat(images)
    for index, image in enumerate(made):
        to_pil(image).save(out / f"{index:05d}.png")
    image_grid(made, columns=len(seeds)).save(out / "grid.png")
    return out / "grid.png"
