"""Stage 1: the VAE (``AutoencoderKL``), 64 x 64 pixels to 8 x 8 latents.

Loss: mean squared error, which is what PSNR measures, and a Kullback-Leibler term just large enough that the decoder gets used
to a little noise in its latents. The capacity sits at low resolution, because a convolution at 64 x 64 is what training on a
CPU spends its time on.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.scenes import draw_images

NUM_EVALUATION_SCENES = 512
EVALUATION_SEED = 1_000_003  # scenes of this seed are never trained on


@dataclass(frozen=True)
class VAEConfig(TrainingConfig):
    """Train the VAE."""

    out: Path = Path("runs/emoji/vae")
    num_steps: int = 7000
    latent_channels: int = 16
    kl_weight: float = 2e-4
    """Weight of the KL term, averaged over latents, beside the squared error, averaged over pixels in [-1, 1]."""


def build_vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_tensor(images: object, device: str) -> torch.Tensor:
    """uint8 (N, 64, 64, 3) -> float (N, 3, 64, 64) in [-1, 1]."""
    pixels = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


def train_vae(config: VAEConfig) -> None:
    torch.manual_seed(config.seed)  # initial weights only; a recipe, not the package's run-time path
    vae = build_vae(config.latent_channels).to(config.device)
    noise = torch.Generator(config.device)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        first = step * config.batch_size
        pixels = to_tensor(draw_images(config.seed, range(first, first + config.batch_size))[0], config.device)
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample(noise.manual_seed(step))
        error = (vae.decode(latents).sample - pixels).square().mean()
        divergence = posterior.kl().mean() / latents[0].numel()
        metrics = {"psnr": 10 * math.log10(4 / error.item()), "kl": divergence.item()}
        return error + config.kl_weight * divergence, metrics

    train_stage(vae, loss, config)
    figures = evaluate_vae(vae, config.device)
    vae.register_to_config(scaling_factor=figures["scaling_factor"])
    vae.save_pretrained(config.out / "vae")
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)


@torch.no_grad()
def evaluate_vae(vae: AutoencoderKL, device: str) -> dict[str, float]:
    """PSNR (dB, of the mean squared error over all pixels) on scenes never trained on, and 1 / std of the latents."""
    errors, squares = [], []
    for first in range(0, NUM_EVALUATION_SCENES, 64):
        pixels = to_tensor(draw_images(EVALUATION_SEED, range(first, first + 64))[0], device)
        latents = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        errors.append((decoded - pixels).square().mean().item())
        squares.append(latents.square().mean().item())
    mean_error, mean_square = sum(errors) / len(errors), sum(squares) / len(squares)
    return {"psnr_db": round(10 * math.log10(4 / mean_error), 2), "scaling_factor": round(mean_square**-0.5, 5)}
