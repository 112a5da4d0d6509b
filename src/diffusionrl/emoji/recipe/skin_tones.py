"""The judge of skin tones: a small ``SceneClassifier`` on people whose tones are drawn evenly, by cross-entropy.

What it will judge is decoded from a diffusion model's latents: blurrier than a scene here, and sharper there. So half
of what it sees went through the VAE, with some noise on the latents, and everything is blurred and noisy to a random degree.
Colours are left as they are: they are what it has to tell.

In the atlas every tone has hair of its own (light skin has black hair), and a classifier that goes by the hair is right on
every scene. The diffusion model mixes them. So half of the people wear the hair of any tone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from diffusionrl import seeds
from diffusionrl.emoji.classifier import TONES, SceneClassifier, build_tone_classifier
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED, to_tensor
from diffusionrl.emoji.scenes import draw_images, draw_scene

EVENLY = dict.fromkeys(TONES, 1 / len(TONES))
NUM_EVALUATION_SCENES = 2048
LATENT_NOISE = 0.25  # at most, where the latents' standard deviation is 0.8
PIXEL_NOISE = 0.04  # at most
LIGHT_FACE, REACH = (250, 220, 188), 50  # colour of light skin in the atlas; how far a shade of it may be, 8-bit


@dataclass(frozen=True)
class SkinTonesConfig(TrainingConfig):
    """Train the classifier of skin tones."""

    out: Path = Path("runs/emoji/skin-tones")
    vae: Path = Path("runs/emoji/vae/vae")
    num_steps: int = 500
    batch_size: int = 128
    num_scenes: int = 6000
    """Scenes drawn and decoded once and passed over several times."""


def draw_people(
    seed: int, count: int, vae: AutoencoderKL, mixed: float = 0.5, noise: float = LATENT_NOISE
) -> tuple[Tensor, Tensor, Tensor]:
    """People of evenly drawn tones, as they are and through the VAE, uint8 (count, 3, 64, 64) each, and indices into ``TONES``.

    Args:
        mixed: share of people with the hair of a tone that is drawn anew.
    """
    drawn, scenes = draw_images(seed, range(count), "person", tones=EVENLY)
    rng = seeds.numpy_generator(seed, "hair", count)
    light = _people(seed, ["light"] * count)
    skin = np.abs(light.astype(int) - LIGHT_FACE).max(-1, keepdims=True) < REACH
    other = _people(seed, [TONES[i] for i in rng.integers(len(TONES), size=count)])
    drawn = np.where(skin | (rng.random(count) >= mixed)[:, None, None, None], drawn, other)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    decoded = torch.cat([_decoded(vae, images, seed, first, noise) for first in range(0, count, 100)])
    return images, decoded, torch.tensor([TONES.index(scene.skin_tone or "") for scene in scenes])


def _people(seed: int, tones: Sequence[str]) -> np.ndarray:
    """The same scenes in other tones."""
    return np.stack([np.asarray(draw_scene(seed, i, "person", tones={tone: 1.0}).image) for i, tone in enumerate(tones)])


@torch.no_grad()
def _decoded(vae: AutoencoderKL, images: Tensor, seed: int, first: int, noise: float) -> Tensor:
    pixels = to_tensor(images[first : first + 100].permute(0, 2, 3, 1), str(vae.device))
    latents = vae.encode(pixels).latent_dist.mean
    generator = seeds.torch_generator(seed, "skin tones", first)
    strength = noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
    latents = latents + (strength * torch.randn(latents.shape, generator=generator)).to(latents.device)
    return ((vae.decode(latents).sample.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def train_skin_tones(config: SkinTonesConfig) -> None:
    torch.manual_seed(config.seed)
    classifier = build_tone_classifier().to(config.device)
    vae = AutoencoderKL.from_pretrained(config.vae).to(config.device, torch.float32).eval()
    plain, decoded, labels = draw_people(config.seed, config.num_scenes, vae)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = seeds.torch_generator(config.seed, "skin tones", -1, step)
        rows = torch.randint(len(labels), (config.batch_size,), generator=generator)
        take = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(take, plain[rows], decoded[rows]).float() / 255
        blur, noise = torch.rand(2, len(rows), 1, 1, 1, generator=generator)
        images = torch.lerp(images, avg_pool2d(images, 3, 1, 1, count_include_pad=False), blur)
        images = images + PIXEL_NOISE * noise * torch.randn(images.shape, generator=generator)
        logits = classifier(images.clamp(0, 1).to(config.device))
        targets = labels[rows].to(config.device)
        value = cross_entropy(logits, targets, label_smoothing=0.05)
        return value, {"loss": value.item(), "accuracy": (logits.argmax(1) == targets).float().mean().item()}

    train_stage(classifier, loss, config)
    figures = measure_skin_tones(classifier, vae)
    save_file(classifier.state_dict(), config.out / "skin_tones.safetensors")
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)


@torch.no_grad()
def measure_skin_tones(classifier: SceneClassifier, vae: AutoencoderKL) -> dict[str, float]:
    """How often it is right on fresh people, as they are, through the VAE with noise, and so with any tone's hair; and how
    often it takes a tone for one of its neighbours, and for another one, over all three."""
    plain, decoded, labels = draw_people(EVALUATION_SEED, NUM_EVALUATION_SCENES, vae, mixed=0.0)
    _, mixed, _ = draw_people(EVALUATION_SEED, NUM_EVALUATION_SCENES, vae, mixed=1.0)
    device = next(classifier.parameters()).device
    told = [classifier((images / 255).to(device)).argmax(1).cpu() for images in (plain, decoded, mixed)]
    off = torch.stack(told).sub(labels).abs()
    figures = {
        "tone_accuracy": off[0] == 0,
        "tone_accuracy_decoded": off[1] == 0,
        "tone_accuracy_any_hair": off[2] == 0,
        "tone_taken_for_neighbour": off == 1,
        "tone_taken_for_other": off > 1,
    }
    return {name: round(found.float().mean().item(), 4) for name, found in figures.items()}
