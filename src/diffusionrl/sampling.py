"""Images from a model or a run."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from diffusionrl import seeds as addresses
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError
from diffusionrl.images import image_grid, to_pil
from diffusionrl.policies import StableDiffusionPolicy, load_pipeline, load_policy
from diffusionrl.policies.base import chunks
from diffusionrl.rollout import make_table, sample_trajectories


def load_trained(model: str) -> StableDiffusionPolicy:
    """A policy of a model as it is, or of a run folder: the run's model with what the run exported.

    Raises:
        UserError: no such model or run.
    """
    run_dir = Path(model)
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        return load_policy(model, training="full")
    pipeline = load_pipeline(yaml.safe_load(config_file.read_text())["model"])
    if (run_dir / "export" / "unet").is_dir():
        pipeline.unet = type(pipeline.unet).from_pretrained(run_dir / "export" / "unet")
    elif (run_dir / "export" / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(run_dir / "export")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        raise UserError(f"{run_dir} is a run folder without an export: it has not trained yet")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return StableDiffusionPolicy(pipeline, lora_rank=None, device=device, source=model)


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
